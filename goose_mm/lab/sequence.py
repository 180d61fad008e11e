"""Recall tasks: multi-query associative recall, and the token tasks of MAD.

Each is a function of (batch, length, generator) and its own settings to ids [B, T] and targets
[B, T], -100 where nothing is due. Tensors live where the generator lives; every random choice
comes from it. MQAR: Arora et al. 2023, "Zoology" (arXiv:2312.04927). MAD: Poli et al. 2024
(arXiv:2403.17844), which trains on every next token of its recall tasks; here only what is scored
is trained. MAD's sixth task, compression, is missing: there a decoder of its own rebuilds the
text from one hidden state, which is no prediction per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# B batch, T tokens, P pairs or places

Batch = tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]
UNSCORED = -100


def mqar(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    vocab: int = 8192,
    pairs: int = 0,
    power: float = 0.01,
) -> Batch:
    """Multi-query associative recall: `pairs` keys with their values, then each key once more.

    The value is due at the second sight of its key. Keys come from the lower half of the
    vocabulary, values from the upper. The queries crowd together at the start, with density
    power * place^(power - 1), and between them is noise. `pairs` 0: a quarter of the length.
    """
    pairs = pairs or length // 4
    if not 1 <= pairs <= min(length // 4, vocab // 2 - 1):
        raise ValueError(
            f"{pairs} pairs need a length of {4 * pairs} and a vocabulary of {2 * pairs + 2} or "
            f"more; got length={length} and vocab={vocab}"
        )
    half, context = vocab // 2, 2 * pairs
    keys = 1 + distinct((batch, pairs), uniform(half - 1, generator), generator)
    values = half + distinct((batch, pairs), uniform(vocab - half, generator), generator)
    slot = torch.arange(1.0, (length - context) // 2 + 1, device=generator.device)
    places = context + 2 * distinct((batch, pairs), slot ** (power - 1), generator)

    ids = integers(0, vocab, (batch, length), generator)
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    ids.scatter_(1, places, keys)
    return ids, torch.full_like(ids, UNSCORED).scatter_(1, places, values)


def recall(
    batch: int,
    length: int,
    generator: torch.Generator,
    *,
    vocab: int = 16,
    noise_vocab: int = 0,
    noise: float = 0.0,
) -> Batch:
    """MAD in-context recall: key, value, key, value. A key keeps its value throughout a text.

    The value is due at every key seen before. With `noise`, that share of the pairs is replaced
    by two tokens out of `noise_vocab` more.
    """
    if length % 2 or bool(noise_vocab) != bool(noise):
        raise ValueError(
            f"length={length} must be even, and noise_vocab={noise_vocab} and noise={noise} "
            "both 0 or neither"
        )
    half, shape = vocab // 2, (batch, length // 2)
    keys = integers(0, half, shape, generator)
    values = integers(half, vocab, shape, generator)
    place = torch.arange(shape[1], device=keys.device)
    junk = torch.rand(shape, generator=generator, device=keys.device) < noise
    first = first_equal(torch.where(junk, -1 - place, keys))  # no junk equals anything
    values = values.gather(1, first)
    targets = torch.full_like(keys, UNSCORED).where(first == place, values)
    ids = torch.stack([keys, values], dim=2)
    if noise:
        mess = integers(vocab, vocab + noise_vocab, (*shape, 2), generator)
        ids = torch.where(junk[..., None], mess, ids)
    nothing = torch.full_like(targets, UNSCORED)
    return ids.flatten(1), torch.stack([targets, nothing], dim=2).flatten(1)


def fuzzy_recall(
    batch: int, length: int, generator: torch.Generator, *, vocab: int = 15, motif: int = 3
) -> Batch:
    """MAD fuzzy recall: keys and values are words of 1 to `motif` different tokens.

    Keys use the lower half of the vocabulary, values the upper, so that words need no spaces.
    Every token of a value is due after a key seen before. The last pair may be cut off.
    """
    half = vocab // 2
    shape = (batch, (length + 1) // 2)  # enough pairs, for none is shorter than two tokens
    if half < motif:
        raise ValueError(f"words of {motif} tokens need vocab={2 * motif} or more, got {vocab}")

    def words(count: int) -> tuple[Tensor, Tensor]:
        letters = distinct((*shape, motif), uniform(count, generator), generator)
        return letters, integers(1, motif + 1, (*shape, 1), generator)

    letter, place = (torch.arange(n, device=generator.device) for n in (motif, shape[1]))
    keys, key_size = words(half)
    code = ((keys + 1) * (letter < key_size) * (half + 1) ** letter).sum(2)
    first = first_equal(code)
    values, value_size = words(vocab - half)
    values = half + values.gather(1, first[..., None].expand_as(values))
    value_size = value_size.gather(1, first[..., None])

    ids = torch.cat([keys, values], dim=2).flatten(1)
    kept = torch.cat([letter < key_size, letter < value_size], dim=2).flatten(1)
    known = (first < place)[..., None].expand(-1, -1, motif)
    due = torch.cat([torch.zeros_like(known), known], dim=2).flatten(1)
    # Close the gaps: what is not kept, or falls beyond the end, goes to a last column of no use.
    column = (kept.cumsum(1) - 1).masked_fill(~kept, length).clamp(max=length)
    text = ids.new_empty(batch, length + 1).scatter_(1, column, ids)
    answers = torch.full_like(text, UNSCORED)
    answers.scatter_(1, column, ids.where(due, UNSCORED))
    return text[:, :length], F.pad(answers[:, 1:length], (0, 1), value=UNSCORED)


def selective_copying(
    batch: int, length: int, generator: torch.Generator, *, vocab: int = 16, count: int = 16
) -> Batch:
    """MAD selective copying: `count` tokens among blanks, a copy sign, then the tokens in order.

    The two last tokens of the vocabulary are the blank and the sign.
    """
    field = length - count - 1
    if field < count:
        raise ValueError(f"{count} tokens to copy need length={2 * count + 1}, got {length}")
    letters = integers(0, vocab - 2, (batch, count), generator)
    places = distinct((batch, count), uniform(field, generator), generator).sort().values
    ids = torch.full((batch, length), vocab - 2, device=generator.device)
    ids.scatter_(1, places, letters)
    ids[:, field] = vocab - 1
    targets = torch.full_like(ids, UNSCORED)
    targets[:, field + 1 :] = letters
    return ids, targets


def memorisation(batch: int, length: int, generator: torch.Generator, *, vocab: int = 256) -> Batch:
    """MAD memorisation: key, blank, key, blank; at each blank the value is due.

    The value of a key is the same in all texts, so only the weights can know it.
    """
    if length % 2:
        raise ValueError(f"length={length} must be even: a key and a blank each")
    book = memory(vocab, generator.device)
    keys = integers(0, len(book), (batch, length // 2), generator)
    ids = torch.stack([keys, torch.full_like(keys, vocab - 1)], dim=2).flatten(1)
    targets = torch.stack([torch.full_like(keys, UNSCORED), book[keys]], dim=2).flatten(1)
    return ids, targets


@cache
def memory(vocab: int, device: torch.device) -> Int[Tensor, " P"]:
    """The value of each key: lower half of the vocabulary, its last token aside, to upper half."""
    half = (vocab - 1) // 2
    order = torch.randperm(half, generator=torch.Generator().manual_seed(12345))
    return (half + order).to(device)


def integers(
    low: int, high: int, shape: tuple[int, ...], generator: torch.Generator
) -> Int[Tensor, "..."]:
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def uniform(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Equal weights for `distinct`."""
    return torch.ones(count, device=generator.device)


def distinct(
    shape: tuple[int, ...], weights: Float[Tensor, " n"], generator: torch.Generator
) -> Int[Tensor, "..."]:
    """Indices drawn by weight one after another, all different along the last axis of `shape`.

    Gumbel's trick: noise of that shape is added to the log-weights, and the largest are taken.
    """
    *rows, count = shape
    noise = torch.empty(*rows, len(weights), device=generator.device)
    noise.exponential_(generator=generator)
    return (weights.log() - noise.log()).topk(count).indices


def first_equal(items: Int[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """For every item, the first place in its row where the same one stands."""
    return (items[:, :, None] == items[:, None, :]).int().argmax(2)


TASKS: dict[str, tuple[Callable[..., Batch], dict[str, Any]]] = {
    "mqar": (mqar, {}),
    "recall": (recall, {}),
    "noisy_recall": (recall, {"noise_vocab": 16, "noise": 0.2}),
    "fuzzy_recall": (fuzzy_recall, {}),
    "selective_copying": (selective_copying, {}),
    "memorisation": (memorisation, {}),
}


class Texts:
    """Texts of one of TASKS. ValueError for an unknown option of it."""

    def __init__(self, name: str, **options: Any) -> None:
        self.make, own = TASKS[name]
        settings = list(signature(self.make).parameters.values())[3:]
        known = {p.name: p.default for p in settings}
        if unknown := set(options) - set(known):
            raise ValueError(
                f"task {name} has no option {min(unknown)!r}; it has {', '.join(known)}"
            )
        self.options = {**known, **own, **options}
        self.vocab_size = self.options["vocab"] + self.options.get("noise_vocab", 0)

    def __call__(self, batch: int, length: int, generator: torch.Generator) -> Batch:
        return self.make(batch, length, generator, **self.options)
