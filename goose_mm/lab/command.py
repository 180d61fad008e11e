"""`goose-mm eval lab`: the experiments as verbs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional


def learn(
    task: Positional[str],
    *,
    out: Path,
    layers: tuple[int, ...] = (1, 2),
    swaps: bool = False,
    pause: int = 0,
    steps: int = 10_000,
    length: int = 64,
    dim: int = 128,
    batch_size: int = 512,
    lr: float = 2e-3,
    max_minutes: float = 10,
    workers: int = 1,
    device: str = "",
) -> None:
    """Train RWKV-7, a transformer and a diagonal RNN of equal size on a task; one figure.

    Args:
        task: A group, as S5, A5, Z60, parity, S3; or mqar, recall, noisy_recall, fuzzy_recall,
            selective_copying, memorisation.
        out: Folder of the results.
        layers: How many; each is a model.
        swaps: Only swaps of two as tokens, instead of every element of the group.
        pause: Silent tokens after each element of a group, which give a layer more steps for it.
        steps: At most, of each model.
        length: Tokens of the longest training texts; twice and four times that is tested.
        dim: Width of the models.
        batch_size: Texts of a step.
        lr: Learning rate.
        max_minutes: At most, of each model.
        workers: Models that are trained at once.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.hub import usable_device
    from goose_mm.lab.experiment import compare

    options: dict[str, Any] = {"generators": "swaps"} if swaps else {}
    if pause:
        options["pause"] = pause
    what = {
        "task": task, "options": options, "steps": steps, "length": length, "dim": dim,
        "batch_size": batch_size, "lr": lr,
    }  # fmt: skip
    running = {"device": usable_device(device), "workers": workers, "max_minutes": max_minutes}
    compare(what, out, layers=layers, **running)
    print(out / "accuracy.svg")


def regular(
    expression: Positional[str],
    *words: Positional[str],
    precision: Literal["float64", "float32"] = "float64",
) -> None:
    """Compile a regular expression into the weights of an RWKV-7; say which words it accepts.

    Args:
        expression: Such as "(ab|ba)*": letters, |, *, +, ?, brackets.
        words: Words to read.
        precision: Of the weights and the state.
    """
    import torch

    from goose_mm.lab.regular.recogniser import compile_regex

    model = compile_regex(expression, dtype=getattr(torch, precision))
    for word, accepted in zip(words, model.accepts(list(words)), strict=True):
        print(f"{word}  {'yes' if accepted else 'no'}")


def automata(
    *,
    count: int = 200,
    max_length: int = 1000,
    precision: Literal["float64", "float32"] = "float64",
    seed: int = 0,
) -> None:
    """Compile random automata, read random words with them, and count the errors.

    Args:
        count: How many automata, of 2 to 6 states and 2 or 3 symbols.
        max_length: Symbols of the longest words.
        precision: Of the weights and the state.
        seed: Of automata and words.
    """
    from goose_mm.lab.regular.report import check_random

    print(json.dumps(check_random(count, max_length, precision, seed), indent=1))


def precision(
    *, out: Path, lengths: tuple[int, ...] = (64, 256, 1024, 4096), device: str = ""
) -> None:
    """Measure the rounding error of every kernel by dtype and length; one figure.

    Args:
        out: Folder of the results.
        lengths: Tokens.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.hub import usable_device
    from goose_mm.lab.precision import report

    report(out, lengths, usable_device(device))
    print(out / "precision.svg")


def position(
    text: Positional[Path],
    *,
    out: Path,
    model: str = "goose-tiny-text",
    length: int = 4096,
    pieces: int = 32,
    device: str = "",
) -> None:
    """Measure a text model's loss by position: does it go on to learn from what it reads?

    Args:
        text: A long text file.
        out: Folder of the result.
        model: A shipped name, a folder, an official .pth or a hub id.
        length: Tokens of a piece.
        pieces: At most this many.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.hub import open_model
    from goose_mm.lab.long_context import loss_by_position, save

    found = loss_by_position(
        open_model(model, "text", device), text.read_text("utf-8"), length, pieces
    )
    for part in found["bins"]:
        print(f"{part['from']}-{part['to']}  {part['nats']:.4f}")
    print(save(out, "position", found))


def passkey(
    filler: Positional[Path],
    *,
    out: Path,
    model: str = "goose-tiny-text",
    lengths: tuple[int, ...] = (128, 512, 2048),
    trials: int = 8,
    device: str = "",
) -> None:
    """Tell a text model a number, let it read on, and ask for the number.

    Args:
        filler: A long text file, read between telling and asking.
        out: Folder of the result.
        model: A shipped name, a folder, an official .pth or a hub id.
        lengths: Tokens of filler.
        trials: For each length and depth.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.hub import open_model
    from goose_mm.lab.long_context import passkey, save

    read = open_model(model, "text", device)
    rows = passkey(read, filler.read_text("utf-8"), lengths, trials=trials)
    for row in rows:
        told = "length {length}, depth {depth}: found {found:.2f}, nats {nats:.2f}"
        print((told + " (a key never told {nats_unseen:.2f})").format(**row))
    print(save(out, "passkey", rows))


def needle(
    clip: Positional[Path],
    hay: Positional[Path],
    label: Positional[str],
    *,
    out: Path,
    model: str = "goose-tiny-audio",
    seconds: tuple[float, ...] = (10, 30, 120),
    device: str = "",
) -> None:
    """Hide a clip in a long recording, and see how its label's score fades.

    Args:
        clip: The sound to hide.
        hay: The recording around it, repeated as often as needed.
        label: What the clip is.
        out: Folder of the result.
        model: A shipped name or a folder.
        seconds: Lengths of the recording.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.hub import open_model
    from goose_mm.lab.long_context import needle, save

    rows = needle(open_model(model, "audio", device), clip, hay, label, seconds)
    for row in rows:
        print(
            "{seconds:g} s: {start:.3f} {middle:.3f} {end:.3f}, without {without:.3f}".format(**row)
        )
    print(save(out, "needle", rows))


VERBS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (learn, regular, automata, precision, position, passkey, needle)
}
