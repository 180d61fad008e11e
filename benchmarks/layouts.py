"""Our own data in the official files of the benchmarks, for evaluations.py.

Scenes with their questions as VQAv2, GQA and ScienceQA, books as LAMBADA and MMLU, clips as
AudioSet. All choices follow from the data alone.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

NUMBERS = ("count_all", "count_name", "count_category")
YES_NO = ("exist", "compare")
# GQA's types of what is asked about, by family; its structural types are verify, compare, query
SEMANTIC = {"where": "rel", "relation": "rel", "category": "cat", "background": "global"}
PASSAGE = (25, 150)  # words


def write_vqav2(folder: Path, exams: dict[str, Iterable]) -> None:
    """Ten equal answers each, families as question types."""
    questions, annotations = [], []
    pictures = folder / "val2014"
    pictures.mkdir(parents=True)
    number = 0
    for name, exam in exams.items():
        for picture, asked in exam:
            number += 1
            picture.save(pictures / f"COCO_val2014_{number:012d}.jpg", quality=95)
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


def write_gqa(folder: Path, exam: Iterable) -> None:
    """All questions balanced, none entailed; answers of a family are one global group."""
    rows = {}
    pictures = folder / "images"
    pictures.mkdir(parents=True)
    for number, (picture, asked) in enumerate(exam):
        picture.save(pictures / f"{number}.jpg", quality=95)
        for qa in asked:
            structural = {"exist": "verify", "compare": "compare"}.get(qa.family, "query")
            types = {"structural": structural, "semantic": SEMANTIC.get(qa.family, "obj")}
            rows[str(len(rows))] = {
                "question": qa.question, "imageId": str(number), "answer": qa.answer,
                "isBalanced": True, "types": {**types, "detailed": qa.family}, "entailed": [],
                "groups": {"global": qa.family, "local": None}, "semantic": [],
            }  # fmt: skip
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(rows))


def write_scienceqa(folder: Path, exam: Iterable) -> None:
    """Every question with its answer and up to three others of its family to choose from."""
    scenes = list(exam)
    answers: dict[str, set[str]] = {}
    for _, asked in scenes:
        for qa in asked:
            answers.setdefault(qa.family, set()).add(qa.answer)
    problems = {}
    rng = random.Random(0)
    for picture, asked in scenes:
        for qa in asked:
            others = sorted(answers[qa.family] - {qa.answer})
            choices = [qa.answer, *rng.sample(others, min(3, len(others)))]
            rng.shuffle(choices)
            key = str(len(problems))
            problems[key] = {
                "question": qa.question, "choices": choices, "answer": choices.index(qa.answer),
                "hint": "", "image": "image.png", "grade": "grade1", "subject": "natural science",
            }  # fmt: skip
            place = folder / "test" / key
            place.mkdir(parents=True)
            picture.save(place / "image.png", compress_level=1)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))


def passages(book: Path) -> list[str]:
    """Paragraphs that end with a word which occurred in them before, without the final stop."""
    found = []
    for paragraph in book.read_text(encoding="utf-8").split("\n\n"):
        text = re.sub(r"[^\w\s]+$", "", " ".join(paragraph.split()))
        words = re.findall(r"\w+", text.lower())
        fits = PASSAGE[0] <= len(words) <= PASSAGE[1]
        if fits and len(words[-1]) > 3 and words[-1] in words[:-1] and text[-1].islower():
            found.append(text)
    return found


def write_lambada(folder: Path, books: Iterable[Path]) -> None:
    """Passages whose last word is due."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text}) for book in books for text in passages(book)]
    (folder / "lambada_test.jsonl").write_text("\n".join(lines) + "\n")


def write_mmlu(folder: Path, books: Iterable[Path]) -> None:
    """The last word of a passage among those of three other ones; a book is a subject, its first
    five passages are the examples."""
    for split in ("dev", "test"):
        (folder / split).mkdir(parents=True)
    for book in books:
        rng = random.Random(book.stem)
        parts = [text.rpartition(" ") for text in passages(book)]
        ends = sorted({word for _, _, word in parts})
        rows = []
        for question, _, word in parts:
            choices = [word, *rng.sample([end for end in ends if end != word], 3)]
            rng.shuffle(choices)
            rows.append([f"{question} ...", *choices, "ABCD"[choices.index(word)]])
        for split, some in (("dev", rows[:5]), ("test", rows[5:])):
            with (folder / split / f"{book.stem}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows(some)


def write_audioset(folder: Path, clips: Path, fold: int) -> None:
    """A fold of a folder with meta.csv; every label of the folder is a class."""
    with (clips / "meta.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    mids = {label: f"/m/{i}" for i, label in enumerate(sorted({row["label"] for row in rows}))}
    (folder / "eval").mkdir(parents=True)
    with (folder / "class_labels_indices.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["index", "mid", "display_name"])
        table.writerows([i, mid, label] for i, (label, mid) in enumerate(mids.items()))
    with (folder / "eval_segments.csv").open("w") as file:
        for row in rows:
            if int(row["fold"]) == fold:
                sound = clips / row["filename"]
                shutil.copy(sound, folder / "eval")
                file.write(f'{sound.stem}, 0.000, 5.000, "{mids[row["label"]]}"\n')
