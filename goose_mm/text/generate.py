"""From logits to text: samplers, batched decoding, stop strings, streaming.

Every row of a batch has its own random generator and its own penalties, so a batch of prompts
gives what one prompt at a time gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Integral
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from goose_mm.backbone import RWKV7, State
from goose_mm.text.tokenizer import Tokenizer

HUGE = 1e30  # larger settings act as this one does, and float32 counts with it


@runtime_checkable
class LanguageModel(Protocol):
    """What is asked of a model that writes; `RWKV7LM` is one."""

    tokenizer: Tokenizer | None
    emb: nn.Embedding
    backbone: RWKV7
    head: nn.Linear

    def __call__(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]: ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. Applied in the official order: penalties, top-p, top-k,
    temperature. `temperature=0` (or `top_k=1`) is greedy, infinity draws evenly among those that
    top-p and top-k leave. ValueError for settings that mean nothing."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    presence_penalty: float = 0.0  # once per token already written
    frequency_penalty: float = 0.0  # for every time it was written
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        seed = 0 if self.seed is None else self.seed
        checks = {
            "max_new_tokens must be a whole number": isinstance(self.max_new_tokens, Integral),
            "top_k must be a whole number": isinstance(self.top_k, Integral),
            "seed must be a whole number": isinstance(seed, Integral),
            "max_new_tokens must be at least 1": self.max_new_tokens >= 1,
            "temperature must be 0 or more": self.temperature >= 0,
            "top_p must lie in (0, 1]": 0 < self.top_p <= 1,
            "top_k must be 0 or more": self.top_k >= 0,
            "presence_penalty must be finite": abs(self.presence_penalty) < inf,
            "frequency_penalty must be finite": abs(self.frequency_penalty) < inf,
            "seed must fit in 64 bits": -(2**63) <= seed < 2**64,
            "stop strings must not be empty": all(self.stop),
        }
        for message, holds in checks.items():
            if not holds:
                name = message.split()[0]
                raise ValueError(f"{message}, got {getattr(self, name, self.stop)!r}")


class Sampler:
    """Chooses one token per row and remembers what every row has written."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self.sampling = sampling
        self.written: Tensor | None = None
        self.random = [torch.Generator() for _ in range(rows)]
        for generator in self.random:
            if sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(sampling.seed)

    def __call__(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
        s = self.sampling
        logits = logits.float()
        if s.presence_penalty or s.frequency_penalty:
            if self.written is None:
                self.written = torch.zeros_like(logits)
            presence, frequency = (
                max(-HUGE, min(penalty, HUGE))
                for penalty in (s.presence_penalty, s.frequency_penalty)
            )
            logits = logits - presence * (self.written > 0)
            logits = logits - frequency * self.written
        greedy = s.temperature == 0 or s.top_k == 1
        token = logits.argmax(-1) if greedy else self._draw(logits)
        if self.written is not None:
            self.written.scatter_add_(1, token[:, None], torch.ones_like(logits[:, :1]))
        return token

    def _draw(self, logits: Float[Tensor, "B V"]) -> Int[Tensor, "B"]:
        s = self.sampling
        behind = logits - logits.amax(-1, keepdim=True)  # the likeliest token is at 0
        behind, order = behind.sort(dim=-1, descending=True, stable=True)
        if s.top_p < 1:  # the fewest tokens that reach top_p together, one at least
            before = torch.softmax(behind, -1).cumsum(-1)[:, :-1]
            behind[:, 1:].masked_fill_(before >= s.top_p, -inf)
        if s.top_k:
            behind[:, s.top_k :] = -inf
        # in logarithms: a power of a chance would underflow, that of the likeliest token too
        temperature = max(1 / HUGE, min(s.temperature, HUGE))
        edges = (behind.double() / temperature).exp().cumsum(-1)
        point = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.random])
        rank = torch.searchsorted(edges, point.to(edges)[:, None] * edges[:, -1:], right=True)
        return order.gather(1, rank.clamp(max=edges.shape[-1] - 1)).squeeze(1)


@torch.no_grad()
def prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: State | None = None
) -> tuple[Float[Tensor, "B V"], State]:
    """Read prompts of mixed lengths at once; logits after the last token of each, and states."""
    ids, mask = pad(prompts, model.emb.weight.device)
    hidden, state = model.backbone(model.emb(ids), state, mask=None if mask.all() else mask)
    last = mask.sum(1) - 1
    return model.head(hidden[torch.arange(len(prompts)), last]), state


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad token lists: ids [B,T] and mask [B,T], True where a token is real."""
    if not rows or not all(len(row) for row in rows):
        raise ValueError("every prompt needs at least one token")
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = True
    return ids.to(device), mask.to(device)


def decode(
    model: LanguageModel, logits: Float[Tensor, "B V"], state: State, sampling: Sampling
) -> Iterator[Int[Tensor, "B"]]:
    """Yield the next token of every row, `max_new_tokens` times. The caller's state is kept."""
    sampler = Sampler(sampling, len(logits))
    for step in range(sampling.max_new_tokens):
        token = sampler(logits)
        yield token
        if step + 1 < sampling.max_new_tokens:
            with torch.no_grad():
                step_logits, state = model(token[:, None], state)
            logits = step_logits[:, -1]


class Writer:
    """Turns one row's tokens into text: whole characters, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder = tokenizer.stream_decoder()
        self.eos_id, self.stop = tokenizer.eos_id, stop
        self.pending = ""  # may be the beginning of a stop string
        self.done = False

    def push(self, token: int) -> str:
        """Text that is certain after this token."""
        if self.done:
            return ""
        if token == self.eos_id:
            return self.finish()
        self.pending += self.decoder.push(token)
        found = [i for i in (self.pending.find(s) for s in self.stop) if i >= 0]
        if found:
            self.done = True
            return self.pending[: min(found)]
        held = max((_overlap(self.pending, s) for s in self.stop), default=0)
        text = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(text) :]
        return text

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        if self.done:
            return ""
        self.done = True
        return self.pending + self.decoder.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(stop), len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )


def write(
    model: LanguageModel, tokenizer: Tokenizer, logits: Tensor, state: State, sampling: Sampling
) -> Iterator[list[str]]:
    """Decode a batch; yield the new text of every row after each token, until all are done."""
    writers = [Writer(tokenizer, sampling.stop) for _ in range(len(logits))]
    for tokens in decode(model, logits, state, sampling):
        yield [writer.push(token) for writer, token in zip(writers, tokens.tolist(), strict=True)]
        if all(writer.done for writer in writers):
            return
    yield [writer.finish() for writer in writers]


def need_tokenizer(model: LanguageModel) -> Tokenizer:
    """ValueError says why there is none, if `goose_mm.load` found out."""
    if model.tokenizer is None:
        reason = getattr(model, "no_tokenizer", "") or "set model.tokenizer, or load a folder"
        raise ValueError(f"this model has no tokenizer: {reason}")
    return model.tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A document starts after the end-of-text token: it stands before every prompt."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def complete(model: LanguageModel, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Continuations of a batch of prompts."""
    tokenizer = need_tokenizer(model)
    logits, state = prefill(model, [encode_prompt(tokenizer, p) for p in prompts])
    pieces = zip(*write(model, tokenizer, logits, state, sampling), strict=True)
    return ["".join(row) for row in pieces]


def stream_text(model: LanguageModel, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The continuation of one prompt as it is written."""
    tokenizer = need_tokenizer(model)
    logits, state = prefill(model, [encode_prompt(tokenizer, prompt)])
    for (piece,) in write(model, tokenizer, logits, state, sampling):
        if piece:
            yield piece
