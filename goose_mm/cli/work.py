"""The verbs that work: train, convert, eval, doctor."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from goose_mm.cli.flags import Call, read
from goose_mm.cli.inputs import open_model
from goose_mm.config import load_recipe


def train(recipe: Positional[str]) -> None:
    """Train a model. Every field of a recipe is a flag: `goose-mm train RECIPE --help`.

    Args:
        recipe: The name of a shipped recipe, or a .toml file.
    """
    raise AssertionError("parsed by parse_train")


def parse_train(name: str, flags: Sequence[str]) -> Call:
    """The flags of `train` are the fields of the recipe that is named first."""
    recipe, out = load_recipe(name), Path("runs") / Path(name).stem
    place = Annotated[Path, arg(help="Folder of the run; one that holds a checkpoint is resumed.")]
    device = Annotated[str, arg(help="cpu or cuda; cuda when there is one.")]
    run = dataclasses.make_dataclass(
        "run",
        [
            ("recipe", Annotated[recipe.__class__, arg(name="")], recipe),
            ("out", place, out),
            ("device", device, ""),
        ],
    )
    chosen = read(run, flags, f"goose-mm train {name}", f"Train the recipe {name}.")
    return functools.partial(_train, chosen.recipe, chosen.out, chosen.device)


def _train(recipe: Any, out: Path, device: str) -> None:
    from goose_mm.hub import usable_device
    from goose_mm.train.loop import train as run

    for name, value in run(recipe, out, device=usable_device(device)).items():
        print(f"{name} {value:.4f}")


def convert(
    src: Positional[str],
    dst: Positional[str],
    *,
    to: Literal["auto", "goose", "rwkv", "fla"] = "auto",
    force: bool = False,
) -> None:
    """Convert a checkpoint between our folders, official .pth files and fla/HF folders.

    Args:
        src: A shipped name, a model folder, a checkpoint file or a hub id.
        dst: Where to write; the ending .pth means the official format.
        to: The format to write; auto goes by the name of DST.
        force: Replace what is there.
    """
    from goose_mm import checkpoint, hub

    source = hub.locate(src)
    checkpoint.convert(source, dst, to=None if to == "auto" else to, force=force)
    if said := hub.lost_words(source, Path(dst)):
        print(f"goose-mm: {said}", file=sys.stderr)
    print(dst)


def evaluate(
    task: Positional[str],
    *,
    data: Path,
    out: Path,
    model: str = "",
    split: str = "",
    prompt: str = "",
    ocr: bool = False,
    blind: bool = False,
    limit: int = 0,
    shard: str = "0/1",
    predictions: Path | None = None,
    skip_bad: bool = False,
    device: str = "",
) -> None:
    """Score a model on a benchmark. Killed, it goes on with the same command.

    Args:
        task: vqav2, textvqa, gqa, scienceqa, audioset, esc50, lambada, bits_per_byte, mmlu, or
            lab for experiments: see `goose-mm eval lab --help`.
        data: Folder of the benchmark's official files.
        out: Folder of the run: predictions, report.md, report.json, figure.svg.
        model: A shipped name, a folder, an official .pth or a hub id.
        split: Part of the data, by the official name.
        prompt: What to ask, with {question} in it.
        ocr: Give TextVQA's OCR tokens with the question.
        blind: Answer without the picture.
        limit: Only this many items, the first.
        shard: I/N: this process does part I of N.
        predictions: Score this file instead of running a model.
        skip_bad: Leave out pictures and clips that cannot be decoded; the report counts them.
        device: cpu or cuda; cuda when there is one.
    """
    from goose_mm.eval import command
    from goose_mm.eval.tasks.task import TaskOptions

    def load(kind: str) -> tuple[str, Any]:
        name = model or f"goose-tiny-{kind}"
        return name, open_model(name, kind, device)

    options = TaskOptions(split=split, prompt=prompt, ocr=ocr, blind=blind, limit=limit)
    report = command.evaluate(task, data, out, options, load, shard, predictions, skip_bad)
    if report is not None:
        for name, value in report["scores"].items():
            print(f"{name}  {'not measured' if value is None else f'{value:.4g}'}")
        print(out / "report.md", file=sys.stderr)


def doctor() -> int:
    """Check this installation: versions that fit, devices, kernels, models. Exit 1 if broken."""
    from goose_mm.cli.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    return int(any(finding.broken for finding in findings))
