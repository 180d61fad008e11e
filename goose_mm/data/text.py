"""Plain-text books as training sequences, and bits per byte on books never trained on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from goose_mm.config import TextData
from goose_mm.text.model import RWKV7LM
from goose_mm.text.tokenizer import Tokenizer

CHUNK = 1024  # tokens read at once when a book is scored


class Books:
    """Random stretches of the training books; every book follows an end-of-text token.

    Data contract: `batch(step)` is a pure function of seed and step; `evaluate(model)` scores
    the held-out books, each read from its first to its last byte with the state carried on.
    """

    def __init__(self, config: TextData, tokenizer: Tokenizer, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = config.length, batch_size, seed
        self.tokenizer = tokenizer
        training, self.held_out = split(config)
        pieces = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in training.values()]
        self.tokens = np.concatenate([np.asarray(piece, np.int32) for piece in pieces])
        if len(self.tokens) <= self.length + 1:
            raise ValueError(
                f"{config.path} gives {len(self.tokens)} tokens, too few for data.length="
                f"{self.length}; add books or set a smaller data.length"
            )

    def batch(self, step: int) -> dict[str, Tensor]:
        """`ids` [B, length + 1]."""
        random = np.random.default_rng((self.seed, step))
        starts = random.integers(0, len(self.tokens) - self.length, self.batch_size)
        rows = np.stack([self.tokens[s : s + self.length + 1] for s in starts])
        return {"ids": torch.from_numpy(rows.astype(np.int64))}

    def evaluate(self, model: RWKV7LM) -> dict[str, float]:
        """`bits_per_byte` over all held-out books; nothing when there are none."""
        if not self.held_out:
            return {}
        scores = [book_nats(model, self.tokenizer, text) for text in self.held_out.values()]
        nats, size = (sum(column) for column in zip(*scores, strict=True))
        return {"bits_per_byte": nats / size / math.log(2)}


@torch.no_grad()
def book_nats(model: RWKV7LM, tokenizer: Tokenizer, text: str) -> tuple[float, int]:
    """(negative log-likelihood of a text in nats, its length in bytes)."""
    device = model.emb.weight.device
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)], device=device)
    state, nats = None, 0.0
    for start in range(0, len(ids) - 1, CHUNK):
        stretch = ids[start : start + CHUNK + 1]
        logits, state = model(stretch[None, :-1], state)
        nats += F.cross_entropy(logits[0].float(), stretch[1:], reduction="sum").item()
    return nats, len(text.encode())


def book_bits(model: RWKV7LM, tokenizer: Tokenizer, text: str) -> float:
    """Bits per byte of a text, read from its beginning."""
    nats, size = book_nats(model, tokenizer, text)
    return nats / size / math.log(2)


def split(config: TextData) -> tuple[dict[str, str], dict[str, str]]:
    """(training books, held-out books) by file name without `.txt`."""
    folder = Path(config.path)
    files = sorted(folder.glob("*.txt")) if config.path else []
    if not files:
        raise ValueError(
            f"no .txt books in {config.path or 'data.path'}; give a folder with --data.path "
            "(docs/data.md says where to get the books)"
        )
    texts = {f.stem: f.read_text(encoding="utf-8") for f in files}
    if missing := set(config.held_out) - set(texts):
        raise ValueError(f"data.held_out names no file in {folder}: {', '.join(sorted(missing))}")
    held_out = {name: texts.pop(name) for name in config.held_out}
    return texts, held_out


def vocabulary_texts(config: TextData) -> Iterator[str]:
    """What a BPE vocabulary is learned from: the training books and the files in `also`."""
    yield from split(config)[0].values()
    for name in config.also:
        text = Path(name).read_text(encoding="utf-8")
        yield from _strings(json.loads(text)) if name.endswith(".json") else [text]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (s for v in value.values() for s in _strings(v))
    elif isinstance(value, list):
        yield from (s for v in value for s in _strings(v))
