"""How `chunked.py` cuts the batch: spans of tokens, small enough for the caches, in scan order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# B batch, T tokens, H heads, N head size; in a span: C chunks of Q tokens, b rows, t tokens

CHUNK = 16
SPAN = 128
TILE = 2**17  # elements of a tensor worked on at a time on CPU, if a single row has no more


class Span(NamedTuple):
    """At most SPAN tokens of some rows of the batch, cut into chunks in the order of the scan."""

    rows: slice
    start: int
    stop: int
    reverse: bool
    slot: int  # of the state before it among the saved ones; negative: the scan begins here

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def chunk(self) -> int:
        return min(CHUNK, self.tokens)

    def part(self, x: Float[Tensor, "B T H N"]) -> Float[Tensor, "b t H N"]:
        return x[self.rows, self.start : self.stop]

    def load(self, x: Float[Tensor, "B T H N"], dtype: torch.dtype) -> Float[Tensor, "C b H Q N"]:
        """Zeros fill up the last chunk: such a token leaves the state alone."""
        x = self.part(x).to(dtype)
        if self.reverse:
            x = x.flip(1)
        if missing := -self.tokens % self.chunk:
            x = F.pad(x, (0, 0, 0, 0, 0, missing))
        return x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)

    def unload(
        self, x: Float[Tensor, "C b H Q N"], into: Float[Tensor, "B T H N"], add: bool = False
    ) -> None:
        """Put back what `load` would give."""
        x, target = x.permute(1, 0, 3, 2, 4), self.part(into)
        if self.reverse or self.tokens % self.chunk:
            x = x.flatten(1, 2)[:, : self.tokens]
            x = x.flip(1) if self.reverse else x
        else:
            target = target.unflatten(1, (-1, self.chunk))
        target.add_(x) if add else target.copy_(x)


def plan(
    r: Float[Tensor, "B T H N"], offsets: list[int] | None, reverse: bool
) -> Iterator[tuple[slice, list[Span]]]:
    """All scans, each as the states it runs on and its spans.

    One scan is a packed sequence, or some rows of the batch: on CPU few, to stay in the caches.
    """
    B, T, H, N = r.shape
    if offsets is None:
        step = max(1, TILE // (min(T, SPAN) * H * N)) if r.device.type == "cpu" else B
        scans = [(slice(i, i + step), slice(i, i + step), 0, T) for i in range(0, B, step)]
    else:
        numbered = enumerate(pairwise(offsets))
        scans = [(slice(i, i + 1), slice(0, 1), start, stop) for i, (start, stop) in numbered]
    for states, rows, start, stop in scans:
        spans = []
        for first in range(start, stop, SPAN):
            last = min(first + SPAN, stop)
            tokens = (start + stop - last, start + stop - first) if reverse else (first, last)
            slot = first // SPAN - 1 if first > start else -1
            spans.append(Span(rows, *tokens, reverse, slot))
        yield states, spans
