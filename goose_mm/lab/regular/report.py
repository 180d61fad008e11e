"""Random automata against their recognisers."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from itertools import accumulate
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from goose_mm.lab.regular.automata import DFA, random_dfa
from goose_mm.lab.regular.layers import LOUD, hadamard, unit
from goose_mm.lab.regular.plan import Plan
from goose_mm.lab.regular.recogniser import compile_dfa


@torch.no_grad()
def check_random(
    count: int = 200,
    max_length: int = 1000,
    dtype: Literal["float64", "float32"] = "float64",
    seed: int = 0,
    words: int = 4,
    kernel: str = "auto",
) -> dict[str, Any]:
    """Compile random automata of 2-6 states and 2-3 symbols, read random words, count errors.

    Of each automaton's words one has `max_length` symbols, the others up to that; the verdict is
    checked after every symbol. Besides counts, the result holds the least |logit|, 1 if all is
    exact, and how far the longest words bring the two vectors that rounding errors add up in from
    what they stand for: the state's code, whose entries are 1 and -1, and the angle (as a unit
    vector). Verdicts are safe while that is well below 1, and below sin(pi / 10) for the angle.
    """
    rng = random.Random(seed)
    began = time.perf_counter()
    totals: Counter[str] = Counter()
    logit, code, angle = float("inf"), 0.0, 0.0
    for _ in range(count):
        dfa = random_dfa(rng, rng.randint(2, 6), rng.randint(2, 3))
        model = compile_dfa(dfa, getattr(torch, dtype))
        lengths = [max_length, *(rng.randint(0, max_length) for _ in range(words - 1))]
        texts = ["".join(rng.choices(dfa.alphabet, k=length)) for length in lengths]
        logits, state = model(model.encode(texts), kernel=kernel)
        for row, text in zip(logits, texts, strict=True):
            wanted = torch.tensor(verdicts(dfa, text))
            found = row[: len(wanted)]
            totals["prefixes"] += len(wanted)
            totals["accepted"] += int(wanted.sum())
            totals["errors"] += int(((found > 0) != wanted).sum())
            totals["wrong words"] += bool(((found > 0) != wanted).any())
            logit = min(logit, found.abs().min().item())
        plan = Plan.of(dfa)
        grid = torch.stack([unit(math.pi * i / plan.block) for i in range(2 * plan.block)])
        angle = max(angle, strayed(state.wkv[1, 0, 0, 0], grid))
        code = max(code, strayed(state.wkv[3, 0, 0, 0], hadamard(plan.states)))
    settings = {"automata": count, "words": count * words, "max length": max_length}
    measured = {"least logit": logit, "code off by": code, "angle off by": angle}
    measured["seconds"] = time.perf_counter() - began
    return {**settings, "dtype": dtype, "kernel": kernel, "seed": seed, **totals, **measured}


def strayed(held: Float[Tensor, "N"], points: Float[Tensor, "P D"]) -> float:
    """How far the first entries of a row of the state are from the nearest of these points."""
    found = held[: points.shape[1]].double() / LOUD
    return (points - found).abs().amax(1).min().item()


def verdicts(dfa: DFA, word: str) -> list[bool]:
    """Whether the word may end: before its first symbol, and after each."""
    symbols = map(dfa.symbol, word)
    states = accumulate(symbols, lambda q, symbol: dfa.transitions[q][symbol], initial=dfa.start)
    return [q in dfa.accepting for q in states]
