"""Evaluates the shipped models with `goose-mm eval`; writes results/evaluations/*.json.

    python benchmarks/evaluations.py --books BOOKS --stickers STICKERS --clips ESC10 --clip-run RUN

Each part is measured if its data are given, and keeps its last result otherwise. Layouts are those
of layouts.py: unseen books as documents, LAMBADA and MMLU, scenes of examination, on none of which
the model was trained, as VQAv2, GQA and ScienceQA, clips as ESC-50 and AudioSet. `--clips` needs
the run of `train audio_tiny --data.test-fold 4` as `--clip-run`, and scores it on that fold.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from layouts import (
    write_audioset,
    write_gqa,
    write_lambada,
    write_mmlu,
    write_scienceqa,
    write_vqav2,
)

RESULTS = Path(__file__).parent / "results" / "evaluations"
UNSEEN = ("railway_children", "white_fang")
FOLD = 4


@dataclass
class Options:
    books: str = ""  # folder of .txt books
    stickers: str = ""  # folder of emoji96, tux192, clothing224 and their vocabulary
    clips: str = ""  # folder with meta.csv
    clip_run: str = ""  # an audio model that has not heard fold 4
    scenes: int = 100  # of every examination


def examine(task: str, data: Path, name: str, *more: str, blind: bool = False) -> None:
    """One run of the command, as a person would start it, its report kept as NAME.json."""
    call = [sys.executable, "-m", "goose_mm", "eval", task, "--data", str(data), *more]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        if blind:
            command = [*call, "--out", str(out / "blind"), "--blind"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        subprocess.run([*call, "--out", place], check=True, stdout=subprocess.DEVNULL)
        report = json.loads((out / "report.json").read_text())
        report["cost"] = json.loads((out / "cost.json").read_text())
    report["hardware"] = f"{platform.machine()}, {os.cpu_count()} CPU cores"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name}: {report['measure']} {report['score']:.4g}")


def main(options: Options) -> None:
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        if options.books:
            books = [Path(options.books, f"{name}.txt") for name in UNSEEN]
            (work / "bits_per_byte").mkdir()
            for book in books:
                shutil.copy(book, work / "bits_per_byte")
            write_lambada(work / "lambada", books)
            write_mmlu(work / "mmlu", books)
            for task in ("bits_per_byte", "lambada", "mmlu"):
                examine(task, work / task, f"{task}_books")
        if options.stickers:
            import goose_mm
            from goose_mm.config import load_recipe
            from goose_mm.data.scenes.pictures import Scenes

            recipe = load_recipe("vision_tiny")
            tokenizer = goose_mm.load("goose-tiny-vision").lm.tokenizer
            data = replace(recipe.data, path=options.stickers)
            made = Scenes(data, recipe.vision, tokenizer, 1, seed=0)
            exams = {kind: made.exam(kind, options.scenes) for kind in made.exams}
            write_vqav2(work / "vqav2", exams)
            write_gqa(work / "gqa", made.exam("seen", options.scenes))
            write_scienceqa(work / "scienceqa", made.exam("seen", options.scenes // 4))
            for task in ("vqav2", "gqa"):
                examine(task, work / task, f"{task}_scenes", "--prompt", "{question}", blind=True)
            examine("scienceqa", work / "scienceqa", "scienceqa_scenes")
        if options.clips and options.clip_run:
            clips = Path(options.clips)
            write_audioset(work / "audioset", clips, FOLD)
            model = ("--model", options.clip_run)
            examine("esc50", clips, f"esc10_fold{FOLD}", "--split", f"fold{FOLD}", *model)
            examine("audioset", work / "audioset", f"audioset_esc10_fold{FOLD}", *model)
    if not (options.books or options.stickers or (options.clips and options.clip_run)):
        print("nothing measured: give --books, --stickers, or --clips and --clip-run (see --help)")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
