"""Scores of the shipped models on data they were not trained on; writes results/tiny_models.json.

    python benchmarks/tiny_models.py --books BOOKS --stickers STICKERS \
        --clip-runs runs/fold1 runs/fold2 runs/fold3 runs/fold4 --style-run runs/style

Each part is measured if its data are given, and keeps its last result otherwise. `--clip-runs` are
`train audio_tiny --data.test-fold N`, one for each fold; `--style-run` is a vision run with
`--data.held-out-style`, to score a drawing style that no training picture had.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "tiny_models.json"


@dataclass(frozen=True)
class Options:
    books: str = ""  # folder of .txt books
    stickers: str = ""  # folder of emoji96, tux192, clothing224 and their vocabulary
    clip_runs: tuple[str, ...] = ()  # one training run per fold
    style_run: str = ""  # a vision run with a style held out
    style: str = "noto"  # the style that run never saw
    scenes: int = 200  # of every examination


def measured(command: str) -> dict[str, Any]:
    """Where and when a number was made."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "command": command,
    }


def books(folder: str) -> dict[str, Any]:
    """Bits per byte of every book that the text recipe holds out."""
    import goose_mm
    from goose_mm.config import load_recipe
    from goose_mm.data.text import book_bits, split

    recipe = load_recipe("text_tiny")
    _, held_out = split(replace(recipe.data, path=folder))
    model = goose_mm.load("goose-tiny-text")
    scores = {name: book_bits(model, model.tokenizer, text) for name, text in held_out.items()}
    size = {name: len(text.encode()) for name, text in held_out.items()}
    total = sum(scores[name] * size[name] for name in scores) / sum(size.values())
    return {"bits_per_byte": total, "books": scores}


def clip_runs(folders: tuple[str, ...]) -> dict[str, Any]:
    """Last evaluation of each leave-one-fold-out run; the epoch is never chosen by the test."""
    folds = {}
    for folder in folders:
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
        last = [line for line in lines if "evaluation" in line][-1]
        folds[Path(folder).name] = {"steps": last["step"], **last["evaluation"]}
    accuracy = [fold["accuracy"] for fold in folds.values()]
    mean, deviation = statistics.mean(accuracy), statistics.pstdev(accuracy)
    return {"accuracy": mean, "deviation": deviation, "folds": folds}


def stickers(model_name: str, folder: str, held_out_style: str, scenes: int) -> dict[str, Any]:
    """Accuracy by examination and family, with the question-only baseline of each."""
    import goose_mm
    from goose_mm.config import load_recipe
    from goose_mm.data.scenes.pictures import Scenes, evaluate_answers

    model = goose_mm.load(model_name)
    recipe = load_recipe("vision_tiny")
    data = replace(recipe.data, path=folder, held_out_style=held_out_style)
    made = Scenes(data, recipe.vision, model.lm.tokenizer, 1, seed=0)
    blind = made.baselines(scenes)
    exams = {}
    for kind in made.exams:
        right = evaluate_answers(model, made.exam(kind, scenes))
        exams[kind] = {
            family: {
                "accuracy": score,
                "blind": blind[kind if family == "overall" else f"{kind}/{family}"],
            }
            for family, score in right.items()
        }
    return exams


def main(options: Options) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    call = "python benchmarks/tiny_models.py"
    if options.books:
        results["text"] = measured(f"{call} --books BOOKS") | books(options.books)
    if options.clip_runs:
        runs = " ".join(Path(run).name for run in options.clip_runs)
        results["audio"] = measured(f"{call} --clip-runs {runs}") | clip_runs(options.clip_runs)
    if options.stickers:
        exams = stickers("goose-tiny-vision", options.stickers, "", options.scenes)
        results["vision"] = measured(f"{call} --stickers STICKERS") | {"exams": exams}
    if options.stickers and options.style_run:
        exams = stickers(options.style_run, options.stickers, options.style, options.scenes)
        source = measured(f"{call} --stickers STICKERS --style-run RUN --style {options.style}")
        results["vision_unseen_style"] = source | {"style": options.style, "exams": exams}
    if not (options.books or options.clip_runs or options.stickers):
        print("nothing measured: give --books, --clip-runs or --stickers (see --help)")
        return
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
