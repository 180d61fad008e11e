"""Our text models in lm-evaluation-harness (0.4.13), as the model `goose`.

The harness finds no models by entry points: a module that registers one has to be imported. So

    python -m goose_mm.eval.plugins.lm_eval run --model goose \\
        --model_args pretrained=goose-tiny-text --tasks lambada_openai,arc_easy

is its own command line (`lm_eval`) with `goose` added. From Python, import this module and give
`model="goose"`, or an instance of `GooseLM`, to `lm_eval.simple_evaluate`. A response cache
(`--use_cache`) knows requests, not weights: give every checkpoint a cache of its own.

Unlike the harness's Hugging Face models, nothing is ever cut off: there is no longest context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  registers the harness's own: it does so only before all others
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from goose_mm.eval.tasks.likelihood import (
    PREFIX_TOKEN,
    load_model,
    loglikelihoods,
    sampling,
    whole_number,
)
from goose_mm.text.generate import need_tokenizer, prefill, write
from goose_mm.text.model import RWKV7LM


@register_model("goose")
class GooseLM(TemplateLM):
    """`pretrained` is a shipped name, a folder, an official .pth, a hub id, or a model.

    `add_bos_token`: the end-of-text token, id 0, stands before every context and prompt, as in
    training. Without it, it stands only where nothing else would: before what is scored without a
    context, and before a rolled text. The harness's Hugging Face models do what their tokenizer
    does by itself unless told: that of `goose_mm.hf` puts it there, others may not. Say which in a
    report.
    """

    def __init__(
        self,
        pretrained: Any = "goose-tiny-text",
        batch_size: int | str = 64,
        device: str = "",
        dtype: str = "float32",
        add_bos_token: bool = True,
        max_gen_toks: int = 256,
        max_batch_size: int | None = None,  # the harness offers it; it is for `batch_size=auto`
    ) -> None:
        super().__init__()
        self.model: RWKV7LM = load_model(pretrained, "text", device, dtype)
        self.words = need_tokenizer(self.model)
        self.batch_size = whole_number(batch_size)
        self.add_bos_token = add_bos_token
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return PREFIX_TOKEN

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        first = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [PREFIX_TOKEN] * first + self.words.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's rule; but where a last token swallows the continuation whole, which leaves
        nothing to score, the two sides are encoded apart."""
        before, after = super()._encode_pair(context, continuation)
        return before, after or self.tok_encode(continuation, add_special_tokens=False)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        # task by task: the examples before every question of a task are then read once
        by_task: dict[str | None, list[int]] = {}
        for i, request in enumerate(requests):
            by_task.setdefault(request.task_name, []).append(i)
        for places in tqdm(by_task.values(), desc="loglikelihood", disable=disable_tqdm):
            some = super().loglikelihood([requests[i] for i in places], disable_tqdm=True)
            for i, scores in zip(places, some, strict=True):
                found[i] = scores
                self.cache_hook.add_partial("loglikelihood", requests[i].args, scores)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        contexts = [context for _, context, _ in requests]
        continuations = [continuation for _, _, continuation in requests]
        return loglikelihoods(self.model, contexts, continuations, batch_size=self.batch_size)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts after the prefix token: exact, without windows. 0 for an empty text."""
        texts = [self.words.encode(request.args[0]) for request in requests]
        full = [i for i, text in enumerate(texts) if text]
        found = [0.0] * len(texts)
        for some in tqdm(list(self._batches(full)), desc="rolling", disable=disable_tqdm):
            ids = [texts[i] for i in some]
            scores = loglikelihoods(self.model, [[PREFIX_TOKEN]] * len(ids), ids)
            for i, (score, _) in zip(some, scores, strict=True):
                found[i] = score
                self.cache_hook.add_partial("loglikelihood_rolling", requests[i].args, score)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        found = [""] * len(requests)
        asked: list[tuple[Any, ...]] = [request.args for request in requests]
        by_settings: dict[str, list[int]] = {}
        for i, (_, chosen) in enumerate(asked):
            by_settings.setdefault(json.dumps(chosen, sort_keys=True), []).append(i)
        batches = [some for places in by_settings.values() for some in self._batches(places)]
        for some in tqdm(batches, desc="generate_until", disable=disable_tqdm):
            settings = sampling(asked[some[0]][1], self.max_gen_toks)
            prompts = [self.tok_encode(asked[i][0]) or [PREFIX_TOKEN] for i in some]
            pieces = write(self.model, self.words, *prefill(self.model, prompts), settings)
            for i, row in zip(some, zip(*pieces, strict=True), strict=True):
                found[i] = "".join(row)
                self.cache_hook.add_partial("generate_until", requests[i].args, found[i])
        return found

    def _batches(self, places: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(places), self.batch_size):
            yield places[start : start + self.batch_size]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
