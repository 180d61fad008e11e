"""Our vision models in lmms-eval (0.7), as the model `goose`: found by its entry point.

    lmms-eval --model goose --tasks vqav2_val --batch_size 16 \\
        --model_args pretrained=goose-tiny-vision,weights=sha256-0123456789abcdef

`weights` is required: the harness's response cache knows a model by this line alone, and would
answer for an overwritten checkpoint with the old one's words.

    python -m goose_mm.eval.plugins.lmms_eval goose-tiny-vision

prints the line. Requests are answered picture by picture, so that a picture is read once for all
its questions, and pictures with the same settings are read `batch_size` at a time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from goose_mm.eval.tasks.likelihood import load_model, loglikelihoods, sampling, whole_number
from goose_mm.text.generate import need_tokenizer
from goose_mm.vision.decode import image_digest, load_image
from goose_mm.vision.model import VisualRWKV7, prompt_text
from goose_mm.vision.prefix import PrefixCache

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MAX_NEW_TOKENS = 128  # where a task names no length
Look = Callable[[], Sequence[Any]]


class Asked(NamedTuple):
    look: Look  # the pictures of a request: not kept, a benchmark's would fill the memory
    question: str
    settings: dict[str, Any]


class Goose(lmms):
    """What the harness's two kinds of model have in common.

    `pretrained` is a shipped name, a folder, a hub id, or a model; `weights` see above.
    """

    def __init__(
        self,
        pretrained: Any = "goose-tiny-vision",
        weights: str = "",
        batch_size: int | str = 1,
        device: str = "",
        dtype: str = "float32",
        max_batch_size: int | None = None,  # the harness offers it; it is for `batch_size=auto`
    ) -> None:
        super().__init__()
        self.model: VisualRWKV7 = load_model(pretrained, "vision", device, dtype)
        self.batch_size = whole_number(batch_size)
        if isinstance(pretrained, str) and weights != (known := weights_name(self.model)):
            found = f"not {weights}" if weights else "which the response cache goes by"
            raise ValueError(f"model_args must say weights={known}, {found}")

    def answer(self, asked: Sequence[Asked]) -> list[str]:
        """Answers in the order of the requests, each picture read once for its questions."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for i, one in enumerate(asked):
            key = (json.dumps(one.settings, sort_keys=True), *map(image_digest, pictures(one.look)))
            groups.setdefault(key, []).append(i)
        answers = [""] * len(asked)
        bar = tqdm(total=len(asked), desc="goose", file=sys.stderr)
        for keys in self._batches(list(groups)):
            questions = [[asked[i].question for i in groups[key]] for key in keys]
            first = asked[groups[keys[0]][0]]
            settings = self._sampling(first.settings)
            if len(keys[0]) == 2:  # one picture each
                images = [pictures(asked[groups[key][0]].look)[0] for key in keys]
                found = self.model.ask_batch(images, questions, **settings)
            else:
                found = [self.model.ask_many(pictures(first.look) or None, *questions, **settings)]
            for key, some in zip(keys, found, strict=True):
                for i, text in zip(groups[key], some, strict=True):
                    answers[i] = text
                bar.update(len(some))
        bar.close()
        return answers

    def _batches(self, keys: list[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
        """Keys of one picture and the same settings, up to `batch_size` together; others alone."""
        alone = [[key] for key in keys if len(key) != 2]
        by_settings: dict[str, list[tuple[str, ...]]] = {}
        for key in keys:
            if len(key) == 2:
                by_settings.setdefault(key[0], []).append(key)
        for some in by_settings.values():
            for start in range(0, len(some), self.batch_size):
                yield some[start : start + self.batch_size]
        yield from alone

    def reply(self, asked: Asked, cache: PrefixCache) -> str:
        """One answer; pictures that the cache holds are not read again."""
        seen = self.model.prefix(pictures(asked.look) or None, cache)
        return self.model.ask(seen, asked.question, **self._sampling(asked.settings))

    def _sampling(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        own = self.model.config.vision.stop
        return asdict(sampling(gen_kwargs, MAX_NEW_TOKENS, (own,) if own else ()))


class GooseSimple(Goose):
    """For tasks that hand over pictures and a text."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked = []
        for request in requests:
            question, settings, visual, doc_id, task, split = request.args
            look = partial(self._look, visual, task, split, doc_id)
            asked.append(Asked(look, question, settings))
        return self.answer(asked)

    def _look(self, visual: Callable[[Any], Any], task: str, split: str, doc_id: int) -> Any:
        return visual(self.task_dict[task][split][doc_id])

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Of answers behind a picture and a question; both are read once for all their answers."""
        if any(len(request.args) != 6 for request in requests):
            raise ValueError("goose weighs answers to a question; leave out acc_mutual_info")
        encode = need_tokenizer(self.model.lm).encode
        cache, found = PrefixCache(), []
        by_doc = groupby(requests, key=lambda request: request.args[3:])
        for (doc_id, task, split), some in tqdm(by_doc, desc="goose", file=sys.stderr):
            args: list[tuple[Any, ...]] = [request.args for request in some]
            doc = self.task_dict[task][split][doc_id]
            seen = self.model.prefix(pictures(partial(args[0][2], doc)) or None, cache)
            contexts = [encode(prompt_text(self.model.config.vision, arg[0])) for arg in args]
            texts = [arg[1](doc) if callable(arg[1]) else arg[1] for arg in args]
            found += loglikelihoods(
                self.model.lm, contexts, [encode(text) for text in texts], state=seen.state
            )
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        found = []
        for request in requests:
            question, settings, visual, following, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            cache, visuals, outputs, info, done = PrefixCache(), visual(doc), [], None, False
            while not done:
                asked = Asked(partial(list, visuals or ()), question, settings)
                told = [*outputs, self.reply(asked, cache)]
                visuals, question, done, outputs, info = following(
                    doc, previous_output=told, round_idx=len(told), previous_round_info=info
                )
                outputs = told if outputs is None else list(outputs)
            found.append(outputs)
        return found


class GooseChat(Goose):
    """For tasks that hand over a conversation: its pictures come first, then all its words."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked = []
        for request in requests:
            _, messages, settings, doc_id, task, split = request.args
            # words are small and kept; pictures are looked at again when their turn comes
            doc = partial(self._doc, task, split, doc_id)
            look = partial(self._look, messages, doc)
            asked.append(Asked(look, words(messages(doc())), settings))
        return self.answer(asked)

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]

    def _look(self, messages: Callable[[Any], Any], doc: Callable[[], Any]) -> Any:
        return media(messages(doc()))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("the harness weighs answers with simple models; --force_simple")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[Any]:
        found = []
        for request in requests:
            _, messages, settings, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            cache, outputs, info, raw = PrefixCache(), [], None, messages(doc)
            while raw is not None:
                asked = Asked(partial(media, raw), words(raw), settings)
                outputs.append(self.reply(asked, cache))
                step = messages(
                    doc,
                    round_idx=len(outputs),
                    previous_output=list(outputs),
                    previous_round_info=info,
                )
                raw, done, _, info = step if isinstance(step, tuple) else (None, True, None, None)
                raw = None if done else raw
            found.append(outputs)
        return found


def pictures(look: Look) -> tuple[Image.Image, ...]:
    """Upright RGB pictures of a request. ValueError for what is none, as a video."""
    seen = list(look() or ())
    if other := [x for x in seen if not isinstance(x, Image.Image)]:
        kind = type(other[0]).__name__
        raise ValueError(f"goose sees pictures alone, and this task hands over a {kind}")
    return tuple(load_image(x) for x in seen)


def media(messages: Sequence[dict[str, Any]]) -> list[Any]:
    """What is not text in a conversation."""
    return [part["url"] for part in parts(messages) if part["type"] != "text"]


def words(messages: Sequence[dict[str, Any]]) -> str:
    """All text of a conversation. ValueError if the model is to go on from its own words."""
    if any(message["role"] == "assistant" for message in messages):
        raise ValueError("goose answers single questions; take the task without earlier answers")
    return "\n".join(part["text"] for part in parts(messages) if part["type"] == "text")


def parts(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


def weights_name(model: VisualRWKV7) -> str:
    """Weights and configuration in 16 digits. The harness would read bare digits as a number."""
    return f"sha256-{model.fingerprint()[:16]}"


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives."""
    from lmms_eval.models.registry_v2 import ModelManifest

    simple, chat = (f"{__name__}.{kind.__name__}" for kind in (GooseSimple, GooseChat))
    return ModelManifest(model_id="goose", simple_class_path=simple, chat_class_path=chat)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m goose_mm.eval.plugins.lmms_eval PRETRAINED")
    name = weights_name(load_model(sys.argv[1], "vision"))
    print(f"pretrained={sys.argv[1]},weights={name}")
