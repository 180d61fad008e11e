"""Evaluates the shipped models with `goose-mm eval`; writes results/evaluations/*.json.

    python benchmarks/evaluations.py --books BOOKS --stickers STICKERS --clips ESC10

Each part is measured if its data are given, and keeps its last result otherwise. The scenes are
those of examination, on none of which the model was trained, in VQAv2's layout. `--clips` needs
the run of `train audio_tiny --data.test-fold 4` as `--clip-run`, and scores it on that fold.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "evaluations"
UNSEEN = ("railway_children", "white_fang")
NUMBERS = ("count_all", "count_name", "count_category")
YES_NO = ("exist", "compare")


@dataclass
class Options:
    books: str = ""  # folder of .txt books
    stickers: str = ""  # folder of emoji96, tux192, clothing224 and their vocabulary
    clips: str = ""  # folder with meta.csv
    clip_run: str = ""  # an audio model that has not heard fold 4
    scenes: int = 100  # of every examination


def write_vqav2(folder: Path, exams: dict[str, Iterable]) -> None:
    """Scenes in VQAv2's files: ten equal answers each, families as question types."""
    questions, annotations = [], []
    (folder / "val2014").mkdir(parents=True)
    number = 0
    for name, exam in exams.items():
        for picture, asked in exam:
            number += 1
            picture.save(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", quality=95)
            for qa in asked:
                key = {"question_id": len(questions) + 1, "image_id": number}
                kind = "yes/no" if qa.family in YES_NO else "other"
                kind = "number" if qa.family in NUMBERS else kind
                questions.append({**key, "question": qa.question})
                answers = [{"answer": qa.answer, "answer_id": i + 1} for i in range(10)]
                annotations.append({
                    **key, "answers": answers, "multiple_choice_answer": qa.answer,
                    "answer_type": kind, "question_type": f"{name}: {qa.family}",
                })  # fmt: skip
    for file, key, rows in (
        ("v2_OpenEnded_mscoco_val2014_questions.json", "questions", questions),
        ("v2_mscoco_val2014_annotations.json", "annotations", annotations),
    ):
        (folder / file).write_text(json.dumps({key: rows}))


def examine(task: str, data: Path, out: Path, *more: str) -> None:
    """One run of the command, as a person would start it."""
    call = [sys.executable, "-m", "goose_mm.cli", "eval", task, "--data", str(data)]
    subprocess.run([*call, "--out", str(out), *more], check=True, stdout=subprocess.DEVNULL)


def keep(name: str, out: Path) -> None:
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
            (work / "books").mkdir()
            for name in UNSEEN:
                text = Path(options.books, f"{name}.txt").read_text(encoding="utf-8")
                (work / "books" / f"{name}.txt").write_text(text, encoding="utf-8")
            examine("bits_per_byte", work / "books", work / "bits")
            keep("bits_per_byte", work / "bits")
        if options.stickers:
            import goose_mm
            from goose_mm.config import load_recipe
            from goose_mm.data.vision import Scenes

            recipe = load_recipe("vision_tiny")
            tokenizer = goose_mm.load("goose-tiny-vision").lm.tokenizer
            data = replace(recipe.data, path=options.stickers)
            made = Scenes(data, recipe.vision, tokenizer, 1, seed=0)
            exams = {kind: made.exam(kind, options.scenes) for kind in made.exams}
            write_vqav2(work / "scenes", exams)
            short = ("--prompt", "{question}")
            examine("vqav2", work / "scenes", work / "out" / "blind", "--blind", *short)
            examine("vqav2", work / "scenes", work / "out", *short)
            keep("vqav2_scenes", work / "out")
        if options.clips and options.clip_run:
            fold = ("--split", "fold4", "--model", options.clip_run)
            examine("esc50", Path(options.clips), work / "clips", *fold)
            keep("esc10_fold4", work / "clips")
    if not (options.books or options.stickers or options.clips):
        print("nothing measured: give --books, --stickers or --clips (see --help)")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Options, description=__doc__))
