"""What a model still knows of what it read long ago: loss by position, a pass key, a sound.

RWKV-7 "Goose" (arXiv:2503.14456), its experiments on long context, for models of any size.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from goose_mm.audio import AudioRWKV7
from goose_mm.audio.decode import load_audio
from goose_mm.eval.tasks.likelihood import PREFIX_TOKEN, loglikelihoods
from goose_mm.text import RWKV7LM
from goose_mm.text.generate import need_tokenizer

SPAN = 512  # tokens read at once; the state carries the rest
KEY = "The pass key is {}. Remember it. "
ASK = "The pass key is"


@torch.inference_mode()
def losses(model: RWKV7LM, text: str, length: int, pieces: int) -> Float[Tensor, "B T"]:
    """Nats of every token of the first `pieces` pieces of a text, each read from a fresh state.

    ValueError if the text has less than one piece.
    """
    ids = need_tokenizer(model).encode(text)
    count = min(pieces, len(ids) // length)
    if not count:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one piece of {length}")
    targets = torch.tensor(ids[: count * length]).view(count, length)
    read = F.pad(targets[:, :-1], (1, 0), value=PREFIX_TOKEN)
    device = next(model.parameters()).device
    state, found = None, []
    for start in range(0, length, SPAN):
        some = slice(start, start + SPAN)
        logits, state = model(read[:, some].to(device), state)
        wanted = targets[:, some].to(device)
        found.append(F.cross_entropy(logits.float().mT, wanted, reduction="none").cpu())
    return torch.cat(found, 1)


def loss_by_position(model: RWKV7LM, text: str, length: int, pieces: int = 32) -> dict[str, Any]:
    """Mean nats a token, between positions that double: a model that uses its past goes down."""
    found = losses(model, text, length, pieces).double()
    edges = [0, *(2**i for i in range(4, 40) if 2**i < length), length]
    bins = [{"from": a, "to": b, "nats": found[:, a:b].mean().item()} for a, b in pairwise(edges)]
    return {"length": length, "pieces": len(found), "bins": bins}


def passkey(
    model: RWKV7LM,
    filler: str,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 8,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Whether a five-digit key, told at some depth of a filler text, is the likeliest at its end.

    Each row also has the nats of the key's digits, and those of a key never told, `nats_unseen`:
    the difference is what the model remembers, even where it is not enough.
    """
    encode, rng, rows = need_tokenizer(model).encode, random.Random(seed), []
    words = encode(filler)
    if len(words) < max(lengths):
        raise ValueError(f"the filler has {len(words)} tokens, {max(lengths)} are wanted")
    for length in lengths:
        for depth in depths:
            contexts, keys = [], []
            for _ in range(trials):
                told, other = (f" {rng.randrange(10_000, 100_000)}" for _ in range(2))
                start = rng.randrange(len(words) - length + 1)
                here, cut = words[start : start + length], round(depth * length)
                said = encode(KEY.format(told.strip()))
                context = [PREFIX_TOKEN, *here[:cut], *said, *here[cut:], *encode(ASK)]
                contexts += [context, context]
                keys += [encode(told), encode(other)]
            scores = loglikelihoods(model, contexts, keys)
            row = {"length": length, "depth": depth, "trials": trials}
            row["found"] = sum(hit for _, hit in scores[::2]) / trials
            row["nats"] = -sum(score for score, _ in scores[::2]) / trials
            row["nats_unseen"] = -sum(score for score, _ in scores[1::2]) / trials
            rows.append(row)
    return rows


def needle(
    model: AudioRWKV7, clip: Path, hay: Path, label: str, seconds: Sequence[float]
) -> list[dict[str, Any]]:
    """The score of a clip's label in a longer and longer recording, by where in it the clip is.

    The hay is repeated to the wanted length. `without` is the score of the hay alone.
    """
    if label not in model.labels:
        raise ValueError(f"the model has no label {label!r}; it has {', '.join(model.labels)}")
    rate, column = model.config.audio.sample_rate, model.labels.index(label)
    sound, noise = load_audio(clip, rate), load_audio(hay, rate)
    rows = []
    for length in seconds:
        wanted = max(round(length * rate), len(sound))
        long = np.tile(noise, -(-wanted // len(noise)))[:wanted]
        mixes = [long]
        for depth in (0.0, 0.5, 1.0):
            start = round(depth * (wanted - len(sound)))
            mixes.append(np.concatenate([long[:start], sound, long[start + len(sound) :]]))
        scores = model.probabilities(mixes, rate)[:, column].tolist()
        row = {"seconds": wanted / rate, "without": scores[0]}
        row |= dict(zip(("start", "middle", "end"), scores[1:], strict=True))
        rows.append(row)
    return rows


def save(out: Path, name: str, found: Any) -> Path:
    """Write what was found as `out`/`name`.json."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path
