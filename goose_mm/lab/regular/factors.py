"""Any map of n states as at most n - 1 maps that one token can apply (Lemma 3 of the paper).

A map f is written as its images, `f[q]` for each state q. RWKV-7 "Goose", arXiv:2503.14456,
appendix on expressivity, where the elementary maps are matrices: identity, swap and copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from goose_mm.lab.regular.automata import DFA

Map = tuple[int, ...]


class Factor(NamedTuple):
    """An elementary map. "swap" exchanges x and y, "merge" sends x to y, all other states stay.

    A merge is the paper's copy seen from the states: as a matrix it copies row y into row x.
    """

    kind: Literal["identity", "swap", "merge"] = "identity"
    x: int = 0
    y: int = 0

    def __call__(self, state: int) -> int:
        if self.kind == "identity" or state not in (self.x, self.y):
            return state
        return self.x if self.kind == "swap" and state == self.y else self.y

    def matrix(self, states: int) -> Float[Tensor, "n n"]:
        """G with `one_hot(q) @ G == one_hot(self(q))`."""
        return torch.eye(states, dtype=torch.float64)[[self(q) for q in range(states)]]


def factorise(images: Sequence[int]) -> list[Factor]:
    """Factors that give `images` when applied in this order; at most n - 1, none for the identity.

    This is the problem of moving registers in parallel, j <- f(j). Where nobody else still needs
    the old content of j, it is overwritten at once; in the end only cycles are left, each of
    length k worth k - 1 swaps. Moves compose the other way round than maps do, hence the reversal.

    Raises:
        ValueError: an image that is no state.
    """
    states = range(len(images))
    if strange := [q for q in images if q not in states]:
        raise ValueError(f"{strange[0]} is no state; images must lie in 0..{len(images) - 1}")
    source = {j: images[j] for j in states if images[j] != j}
    factors = []
    while free := sorted(set(source) - set(source.values())):
        for j in free:
            factors.append(Factor("merge", j, source.pop(j)))
    while source:
        first, j = source.popitem()
        hole = first
        while j != first:
            factors.append(Factor("swap", hole, j))
            hole, j = j, source.pop(j)
    return factors[::-1]


def apply(factors: Sequence[Factor], states: int) -> Map:
    """The map of these factors, the first applied first."""
    images = []
    for q in range(states):
        for factor in factors:
            q = factor(q)
        images.append(q)
    return tuple(images)


def word_map(dfa: DFA, word: Sequence[int]) -> Map:
    """Where each state goes when it reads these symbols."""
    images = tuple(range(dfa.states))
    for symbol in word:
        images = tuple(dfa.transitions[q][symbol] for q in images)
    return images


def block_length(dfa: DFA, longest: int | None = None) -> int | None:
    """The least b >= 1 for which every word of b symbols is a product of at most b factors.

    `max(1, states - 1)` always is enough; None if `longest` is not.
    """
    maps = {tuple(range(dfa.states))}
    for length in range(1, 1 + (max(1, dfa.states - 1) if longest is None else longest)):
        maps = {tuple(row[f] for f in images) for images in maps for row in columns(dfa)}
        if all(len(factorise(images)) <= length for images in maps):
            return length
    return None


def columns(dfa: DFA) -> list[Map]:
    """The map of each symbol."""
    return list(zip(*dfa.transitions, strict=True))
