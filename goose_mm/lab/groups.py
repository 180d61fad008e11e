"""Word problems of finite groups: after every token, which element is the product so far?

RWKV-7 "Goose" (arXiv:2503.14456, state tracking) asks it of A5, A4 x Z5 and Z60, as Merrill et
al. 2024 (arXiv:2404.08819) do. Two easier readings of a group are those of Grazzi et al. 2024
(arXiv:2411.12537): only swaps for tokens, which one reflection each can follow, and pauses after
each element, which give a layer several reflections for it.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

# B words, T tokens, G elements of a group, n points its permutations move

Permutation = tuple[int, ...]


class Group(NamedTuple):
    """A finite group; element 0 is the identity. `table[g, h]` is first g, then h."""

    elements: tuple[Permutation, ...]
    table: Int[Tensor, "G G"]

    @property
    def order(self) -> int:
        return len(self.elements)

    def generators(self, kind: str) -> list[int]:
        """Elements a word may contain: "all", or "swaps", those that move two points at most."""
        if kind not in ("all", "swaps"):
            raise ValueError(f'generators={kind!r}; choose "all" or "swaps"')
        moved = [sum(i != p for i, p in enumerate(element)) for element in self.elements]
        chosen = [g for g, count in enumerate(moved) if kind == "all" or count <= 2]
        if len(chosen) == 1:
            raise ValueError('this group contains no swap; use generators="all"')
        return chosen


@cache
def group(name: str) -> Group:
    """S5, A5, Z60, in general S, A or Z and a number, "parity" for Z2, products such as A4xZ5."""
    elements: list[Permutation] = [()]
    for factor in ("Z2" if name == "parity" else name).split("x"):
        elements = [
            (*left, *(len(left) + p for p in right))
            for left in elements
            for right in factor_elements(factor)
        ]
    number = {element: g for g, element in enumerate(elements)}
    rows = [[number[then(g, h)] for h in elements] for g in elements]
    return Group(tuple(elements), torch.tensor(rows))


def factor_elements(name: str) -> list[Permutation]:
    """All permutations of a symmetric, alternating or cyclic group, the identity first."""
    match = re.fullmatch(r"([SAZ])([1-9]\d?)", name)
    if match is None or (match[1] != "Z" and int(match[2]) > 6):
        raise ValueError(f'no group {name!r}; give S1..S6, A1..A6, Z1..Z99, "parity", or A4xZ5')
    kind, points = match[1], range(int(match[2]))
    if kind == "Z":
        return [(*points[shift:], *points[:shift]) for shift in points]
    every = itertools.permutations(points)
    return [p for p in every if kind == "S" or even(p)]


def then(first: Permutation, second: Permutation) -> Permutation:
    """The permutation that applies `first`, then `second`."""
    return tuple(second[p] for p in first)


def even(permutation: Permutation) -> bool:
    pairs = itertools.combinations(permutation, 2)
    return sum(p > q for p, q in pairs) % 2 == 0


def running_products(table: Int[Tensor, "G G"], word: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Product of the first t elements for every t, in O(log T) steps of doubling reach."""
    product, reach = word, 1
    while reach < word.shape[1]:
        longer = table[product[:, :-reach], product[:, reach:]]
        product = torch.cat([product[:, :reach], longer], dim=1)
        reach *= 2
    return product


class Words:
    """Words of a group in random elements. Token g is element g; one more token is the pause.

    Args:
        name: the group, see `group`.
        generators: "all" elements, or "swaps" and the identity.
        pause: silent tokens after each element; the product is due on the last of them.
    """

    def __init__(
        self, name: str, device: torch.device, *, generators: str = "all", pause: int = 0
    ) -> None:
        if pause < 0:
            raise ValueError(f"pause={pause} tokens; give 0 or more")
        chosen = group(name)
        self.pause, self.silence = pause, chosen.order
        self.vocab_size = chosen.order + (pause > 0)
        self.table = chosen.table.to(device)
        self.letters = torch.tensor(chosen.generators(generators), device=device)

    def __call__(
        self, batch: int, length: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Tokens and the product after each (-100 before the last pause); T = length tokens."""
        stride = self.pause + 1
        if length % stride:
            raise ValueError(
                f"length={length} cannot hold whole elements with pause={self.pause}; "
                f"make it a multiple of {stride}"
            )
        shape = (batch, length // stride)
        drawn = torch.randint(
            len(self.letters), shape, generator=generator, device=self.letters.device
        )
        word = self.letters[drawn]
        ids = word.new_full((batch, length), self.silence)
        targets = word.new_full((batch, length), -100)
        ids[:, ::stride] = word
        targets[:, self.pause :: stride] = running_products(self.table, word)
        return ids, targets
