"""`goose-mm eval`: from a benchmark's files and a model, or its predictions, to a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from goose_mm.eval import runner
from goose_mm.eval.predictions import read_foreign
from goose_mm.eval.report import write_report
from goose_mm.eval.tasks.task import Task, TaskOptions

TASKS = {  # name -> where it is; imported when asked for
    "vqav2": ("vqa", "VQAv2"),
    "textvqa": ("vqa", "TextVQA"),
    "gqa": ("gqa", "GQA"),
    "scienceqa": ("scienceqa", "ScienceQA"),
    "audioset": ("audio", "AudioSet"),
    "esc50": ("audio", "ESC50"),
    "lambada": ("text", "Lambada"),
    "bits_per_byte": ("text", "BitsPerByte"),
    "mmlu": ("text", "MMLU"),
}


def open_task(name: str, data: Path, options: TaskOptions) -> Task:
    """A benchmark by name. ValueError if there is none; FileNotFoundError says what it lacks."""
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}, and lab")
    module, kind = TASKS[name]
    task = getattr(import_module(f"goose_mm.eval.tasks.{module}"), kind)
    for option, value in asdict(options).items():
        if value and option not in task.takes:
            raise ValueError(f"{name} has no use for --{option}; it takes {', '.join(task.takes)}")
    return task(data, options)


def evaluate(
    name: str,
    data: Path,
    out: Path,
    options: TaskOptions,
    load: Callable[[str], tuple[str, Any]],
    shard: str = "0/1",
    predictions: Path | None = None,
    skip_bad: bool = False,
) -> dict[str, Any] | None:
    """Run or go on with an evaluation; the report, or None while other shards are at work.

    `load` gives the model's name and the model of a kind ("vision", "audio", "text").
    With `predictions`, those of this file are scored instead, and no model is loaded.
    `skip_bad` leaves out what cannot be decoded.
    """
    place = parse_shard(shard)
    if skip_bad and predictions:
        raise ValueError("--skip-bad is about what a model reads; --predictions needs no model")
    task = open_task(name, data, options)
    if predictions is None:
        called, model = load(task.kind)
        return runner.run(task, model, called, out, place, skip_bad=skip_bad)
    found = read_foreign(predictions, task)
    out.mkdir(parents=True, exist_ok=True)
    runner.settle(out, {"model": f"file {predictions.name}", **runner.describe(task)})
    settings = json.loads((out / "settings.json").read_text())
    return write_report(task, settings, found, out)


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N" with 0 <= I < N."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"--shard is I/N with I from 0 to N - 1, as 0/2; got {text!r}")
    return int(index), int(count)
