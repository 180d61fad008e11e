"""From logits to tokens: how the next one is chosen.

Every row of a batch has its own random generator and its own penalties, so a batch gives what one
row at a time gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor

HUGE = 1e30  # larger settings act as this one does, and float32 counts with it


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
