"""VisualRWKV-7: a frozen eye, a projector, and a language model that reads the picture first.

    before_image | picture tokens | "\\n" question "\\n\\nAssistant:" | " " answer "\\n\\n"

The picture comes before every question, so the state behind it can be kept: N questions cost one
reading of the picture (`ask_many`, `Prefix`), and a training batch reads each picture once for
all its questions. Picture tokens enter like word embeddings, before the stack's first norm.
"""

# B pictures, S pixels a side, P picture tokens, Q questions a picture, T text tokens, C channels

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from goose_mm.backbone import State
from goose_mm.backbone.time_mix import upcast
from goose_mm.checkpoint import digest
from goose_mm.config import ConfigError, TextModel, VisionConfig, VisionModel
from goose_mm.text.generate import Sampling, need_tokenizer, prefill, write
from goose_mm.text.model import RWKV7LM
from goose_mm.text.tokenizer import Tokenizer
from goose_mm.vision.decode import Picture, image_digest, load_image
from goose_mm.vision.encoders import align, build_encoder
from goose_mm.vision.prefix import Prefix, PrefixCache
from goose_mm.vision.preprocess import as_pictures, normalise, transform
from goose_mm.vision.projector import build_projector

Pictures = Picture | list[Picture] | tuple[Picture, ...]


class VisualRWKV7(nn.Module):
    """A picture and a question in, an answer out. Trained are `projector.` and `lm.`."""

    def __init__(self, config: VisionModel, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        vision = config.vision
        if not vision.encoders:
            raise ConfigError("vision.encoders is empty: a vision model needs at least one")
        if "{question}" not in vision.prompt:
            raise ConfigError(f"vision.prompt must contain {{question}}, it is {vision.prompt!r}")
        self.config = config
        self.lm = RWKV7LM(TextModel(backbone=config.backbone, text=config.text), tokenizer)
        encoders = [build_encoder(spec) for spec in vision.encoders]
        self.encoders = nn.ModuleList(encoders)
        nothing = [torch.empty(0, *e.grid, e.dim) for e in encoders]
        _, rows, columns, d_in = align(nothing).shape
        self.grid = (rows, columns)
        self.projector = build_projector(vision, config.backbone, d_in, self.grid)
        self._weights_seen: tuple[object, str] = (None, "")

    @property
    def device(self) -> torch.device:
        return self.lm.emb.weight.device

    def preprocess(self, pictures: Sequence[Picture]) -> list[Tensor]:
        """Normalised pictures [B, 3, S, S], once for every encoder. Raises like `load_image`."""
        images = [load_image(picture) for picture in pictures]
        return [transform(images, spec) for spec in self.config.vision.encoders]

    def image_tokens(self, pixels: Tensor | Sequence[Tensor]) -> Float[Tensor, "B P C"]:
        """Tokens of a batch of pictures, row by row of the patch grid.

        A tensor holds pictures, uint8 or floats in 0..1 [B, 3, H, W], and is normalised here for
        every encoder. A list is what `preprocess` gives: one normalised tensor for every encoder.
        """
        if isinstance(pixels, Tensor):
            pixels = as_pictures(pixels).to(self.device)
            views = [normalise(pixels, spec) for spec in self.config.vision.encoders]
        else:
            views = list(pixels)
        if len(views) != len(self.encoders):
            raise ValueError(
                f"{len(self.encoders)} encoders need as many normalised tensors, got {len(views)}"
            )
        if not all(view.is_floating_point() for view in views):
            raise ValueError("a list holds normalised floats; give pictures as one tensor")
        seen = [
            encoder(view.to(self.device))
            for encoder, view in zip(self.encoders, views, strict=True)
        ]
        return self.projector(align(seen).to(self.lm.emb.weight.dtype))

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the answers: the mean over a row's answer tokens, then over rows
        (VisualRWKV's sample-level loss), so that a long answer weighs as much as a short one.

        batch: `pixels` uint8 [B,3,S,S], or absent to train without pictures; `ids` int64 [1,T], the
        texts behind the pictures, packed: Q for each picture, all of the first before those of the
        second; `cu_seqlens` int32 [B*Q+1], where each begins; `target` bool [1,T], True for answer
        tokens, never the first of a text. Texts without answer tokens do not count. Metrics:
        `loss`, and `exact`, the share of texts whose every answer token was the likeliest given
        the right tokens before it.
        """
        ids, cu_seqlens, target = batch["ids"], batch["cu_seqlens"], batch["target"]
        count = len(batch["pixels"]) if "pixels" in batch else 1
        pictures = [self.image_tokens(batch["pixels"])] if "pixels" in batch else []
        state, _ = self._read(pictures, count)
        state = state.repeat((len(cu_seqlens) - 1) // count)
        hidden, _ = self.lm.backbone(self.lm.emb(ids), state, cu_seqlens=cu_seqlens)

        place = target[0, 1:].nonzero().squeeze(1)  # of the token before, which predicts it
        row = torch.searchsorted(cu_seqlens, place, right=True) - 1
        logits = upcast(self.lm.head(hidden[0, place]))
        answer = ids[0, place + 1]
        losses = F.cross_entropy(logits, answer, reduction="none")
        wrong = (logits.argmax(-1) != answer).to(losses)
        tokens, loss_sum, wrong_sum = (
            losses.new_zeros(len(cu_seqlens) - 1).index_add(0, row, values)
            for values in (torch.ones_like(losses), losses, wrong)
        )
        rows = (tokens > 0).sum().clamp(min=1)
        loss = (loss_sum / tokens.clamp(min=1)).sum() / rows
        exact = ((tokens > 0) & (wrong_sum == 0)).sum() / rows
        return loss, {"loss": loss.detach(), "exact": exact}

    def _read(self, pictures: Sequence[Float[Tensor, "B P C"]], count: int) -> tuple[State, int]:
        """State after `before_image` and the pictures' tokens, and how many tokens that were.

        Several pictures of one conversation are separated by a newline, as in VisualRWKV.
        """
        tokenizer = need_tokenizer(self.lm)

        def text(words: str) -> Tensor:
            ids = torch.tensor(tokenizer.encode(words), dtype=torch.long, device=self.device)
            return self.lm.emb(ids).expand(count, -1, -1)

        parts = [text(self.config.vision.before_image)]
        for i, tokens in enumerate(pictures):
            parts += [text("\n"), tokens] if i else [tokens]
        stream = torch.cat(parts, dim=1)
        if not stream.shape[1]:
            return State.zeros(self.config.backbone, count, self.device, stream.dtype), 0
        return self.lm.backbone(stream)[1], stream.shape[1]

    @torch.no_grad()
    def prefix(self, pictures: Pictures | None, cache: PrefixCache | None = None) -> Prefix:
        """Read one picture, or the pictures of one conversation in order, for later questions.

        With a cache, a picture that was read before by the same weights is not read again.
        None stands for no picture at all: what the model answers blind.
        """
        images = [load_image(picture) for picture in _as_list(pictures)]

        def read() -> Prefix:
            tokens = self.image_tokens(self.preprocess(images)) if images else None
            state, length = self._read([] if tokens is None else tokens.split(1), 1)
            return Prefix(state, length, self.fingerprint())

        if cache is None:
            return read()
        return cache.get((self.fingerprint(), *map(image_digest, images)), read)

    def fingerprint(self) -> str:
        """sha256 of configuration and weights; worked out again only after a weight changed."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        version = tuple(
            (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors.values()
        )
        if self._weights_seen[0] != version:
            settings = json.dumps(asdict(self.config), sort_keys=True)
            self._weights_seen = (version, digest(tensors, settings))
        return self._weights_seen[1]

    def ask(self, image: Pictures | Prefix | None, question: str, **settings: Any) -> str:
        """Answer one question about a picture (several in a list, a `Prefix`, or None: blind).

        Greedy, at most 24 tokens; `settings` are fields of `Sampling` that override this, but
        `stop` adds to the end of a turn. ValueError or FileNotFoundError for a bad picture,
        ValueError for an empty question or an empty list of pictures.
        """
        return self.ask_many(image, [question], **settings)[0]

    def ask_many(
        self,
        image: Pictures | Prefix | None,
        questions: Sequence[str],
        *,
        batch_size: int = 64,
        **settings: Any,
    ) -> list[str]:
        """Answers to questions about one picture, which is read once; `batch_size` at a time.

        Every answer is the one `ask` would give: the questions do not see each other.
        """
        prompts, sampling = self._prompts(questions), self._sampling(batch_size, settings)
        prefix = image if isinstance(image, Prefix) else self.prefix(image)
        if prefix.fingerprint != self.fingerprint():
            raise ValueError("this prefix was made by another model, or before its weights changed")
        owners = [0] * len(prompts)
        return self._answers(prefix.state.to(self.device), owners, prompts, batch_size, sampling)

    def ask_batch(
        self,
        images: Tensor | Sequence[Picture] | None,
        questions: Sequence[Sequence[str]],
        *,
        batch_size: int = 64,
        **settings: Any,
    ) -> list[list[str]]:
        """Answers to `questions[i]` about `images[i]`, all pictures read at once.

        `images` are pictures, or a tensor [B, 3, H, W] of them, uint8 or floats in 0..1, or None
        to answer blind. ValueError for any other tensor.
        """
        if isinstance(images, Tensor):
            images = as_pictures(images)
        if images is not None and len(images) != len(questions):
            raise ValueError(f"{len(images)} images but questions for {len(questions)}")
        prompts, sampling = [*map(self._prompts, questions)], self._sampling(batch_size, settings)
        if not prompts:
            return []
        owners = [i for i, some in enumerate(questions) for _ in some]
        with torch.inference_mode():
            pictures = []
            if images is not None:
                pixels = images if isinstance(images, Tensor) else self.preprocess(images)
                pictures = [self.image_tokens(pixels)]
            state, _ = self._read(pictures, len(questions))
        flat = [prompt for some in prompts for prompt in some]
        answers = iter(self._answers(state, owners, flat, batch_size, sampling))
        return [[next(answers) for _ in some] for some in questions]

    def _prompts(self, questions: Sequence[str]) -> list[list[int]]:
        if isinstance(questions, str):
            raise ValueError("questions must be a list; ask() takes a single one")
        encode = need_tokenizer(self.lm).encode  # never yields the end-of-text id
        return [encode(prompt_text(self.config.vision, question)) for question in questions]

    def _sampling(self, batch_size: int, settings: dict[str, Any]) -> Sampling:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        greedy: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.0}
        sampling = Sampling(**(greedy | settings))
        end = self.config.vision.stop
        return replace(sampling, stop=(*sampling.stop, end)) if end else sampling

    def _answers(
        self,
        state: State,
        owners: list[int],
        prompts: list[list[int]],
        batch_size: int,
        sampling: Sampling,
    ) -> list[str]:
        """The answer to every prompt, continued from row `owners[i]` of the state."""
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            some = slice(start, start + batch_size)
            logits, after = prefill(self.lm, prompts[some], state.select(owners[some]))
            pieces = write(self.lm, need_tokenizer(self.lm), logits, after, sampling)
            answers += ["".join(row).strip() for row in zip(*pieces, strict=True)]
        return answers


def prompt_text(vision: VisionConfig, question: str) -> str:
    """What stands between the picture and the answer. ValueError for an empty question.

    Blank lines end a turn, so those inside a question become single newlines.
    """
    question = re.sub(r"\n\s*\n", "\n", question.strip())
    if not question:
        raise ValueError("the question is empty")
    return vision.prompt.replace("{question}", question)


def _as_list(pictures: Pictures | None) -> list[Picture]:
    if pictures is None:
        return []
    if not isinstance(pictures, (list, tuple)):
        return [pictures]
    if not pictures:
        raise ValueError("the list of pictures is empty; give one, or None to answer blind")
    return list(pictures)
