"""VQAv2 and TextVQA: open questions with ten answers each, in the files of their pages."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from goose_mm.eval.metrics.vqa import (
    textvqa_accuracy,
    textvqa_accuracy_vlmevalkit,
    vqa_accuracy,
    vqa_accuracy_lmms_eval,
    vqa_scores,
)
from goose_mm.eval.tasks.official import Name, covered
from goose_mm.eval.tasks.picture import PictureTask, percent, plain
from goose_mm.eval.tasks.task import Item, Scores, TaskOptions, limited, need


class Question(TypedDict):
    question_id: int
    image_id: int
    question: Name


class Answer(TypedDict):
    answer: str


class Annotation(TypedDict):
    question_id: int
    question_type: str
    answer_type: str
    multiple_choice_answer: str
    answers: Annotated[list[Answer], Meta(min_length=1)]


class VQAv2(PictureTask):
    """Open questions on COCO pictures, ten answers each (Goyal et al. 2017)."""

    name = "vqav2"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "val2014"
        super().__init__(data, options, split)
        images = "test2015" if split.startswith("test") else split
        questions = f"v2_OpenEnded_mscoco_{split}_questions.json"
        files = {questions: "questions", images: "pictures"}
        answers = f"v2_mscoco_{split}_annotations.json"
        if not split.startswith("test"):
            files[answers] = "answers"
        need(data, files, "get them from visualqa.org/download, and unpack them there")
        rows = self.official.listed(questions, "questions", Question, "question_id")
        self.items = [
            Item(
                str(row["question_id"]),
                str(data / images / f"COCO_{images}_{row['image_id']:012d}.jpg"),
                self.ask(row["question"]),
            )
            for row in limited(rows, options.limit)
        ]
        self.known = {}
        if answers in files:
            found = self.official.listed(answers, "annotations", Annotation, "question_id")
            self.known = {str(row["question_id"]): row for row in found}
            covered([item.id for item in self.items], self.known, data / answers)
        self.settings["answers"] = "lower case, final stop removed, before scoring"

    def score(self, predictions: dict[str, Any]) -> Scores:
        annotations = list(self.truth().values())
        if not annotations:
            return Scores("VQA accuracy", {"VQA accuracy": None}, {}, {})
        answers = {int(key): plain(value) for key, value in predictions.items()}
        official = vqa_scores(annotations, answers)
        counts = {
            kind: Counter(row[kind] for row in annotations)
            for kind in ("answer_type", "question_type")
        }
        types = {
            kind: {
                name: (value, counts[kind][name]) for name, value in official[f"per_{kind}"].items()
            }
            for kind in counts
        }
        known = {
            str(row["question_id"]): [answer["answer"] for answer in row["answers"]]
            for row in annotations
        }
        values: dict[str, float | None] = {
            "VQA accuracy": official["overall"],
            "VQA accuracy (lmms-eval)": percent(
                vqa_accuracy_lmms_eval(predictions[key], each) for key, each in known.items()
            ),
        }
        items = {key: vqa_accuracy(answers[int(key)], each) for key, each in known.items()}
        return Scores("VQA accuracy", values, types, items)

    def baselines(self) -> dict[str, float]:
        annotations = list(self.truth().values())
        if not annotations:
            return {}
        common = Counter(row["multiple_choice_answer"] for row in annotations)
        always = common.most_common(1)[0][0]
        answers = {row["question_id"]: always for row in annotations}
        return {f"always {always!r}": vqa_scores(annotations, answers)["overall"]}

    def upload(self, predictions: dict[str, Any]) -> Any:
        return [{"question_id": int(k), "answer": plain(v)} for k, v in predictions.items()]


class Asked(TypedDict):
    question_id: int
    image_id: Name
    question: Name


class Answered(Asked):
    answers: Annotated[list[str], Meta(min_length=10, max_length=10)]


class Words(TypedDict):
    image_id: Name
    ocr_tokens: list[str]


class TextVQA(PictureTask):
    """Questions whose answer is written in the picture (Singh et al. 2019)."""

    name = "textvqa"
    takes = (*PictureTask.takes, "ocr")

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "val"
        super().__init__(data, options, split)
        questions = f"TextVQA_0.5.1_{split}.json"
        words = f"TextVQA_Rosetta_OCR_v0.2_{split}.json"
        folder = "test_images" if split == "test" else "train_images"
        files = {questions: "questions", folder: "pictures"}
        if options.ocr:
            files[words] = "OCR tokens"
        need(data, files, "get them from textvqa.org/dataset, and unpack them there")
        kind = Asked if split == "test" else Answered
        rows = self.official.listed(questions, "data", kind, "question_id")
        rows = limited(rows, options.limit)
        tokens: dict[str, list[str]] = {}
        if options.ocr:
            found = self.official.listed(words, "data", Words, "image_id")
            tokens = {row["image_id"]: row["ocr_tokens"] for row in found}
            covered([row["image_id"] for row in rows], tokens, data / words)
        self.items = []
        for row in rows:
            question = row["question"]
            if options.ocr:
                question += f"\nReference OCR token: {', '.join(tokens[row['image_id']])}"
            file = data / folder / f"{row['image_id']}.jpg"
            self.items.append(Item(str(row["question_id"]), str(file), self.ask(question)))
        self.known = {str(row["question_id"]): row["answers"] for row in rows if "answers" in row}
        self.settings["ocr"] = "OCR tokens in the prompt" if options.ocr else "no OCR tokens"

    def score(self, predictions: dict[str, Any]) -> Scores:
        name = f"TextVQA accuracy, {self.settings['ocr']}"
        known = self.truth()
        if not known:
            return Scores(name, {name: None}, {}, {})
        items = {key: textvqa_accuracy(predictions[key], each) for key, each in known.items()}
        official = percent(items.values())
        values: dict[str, float | None] = {
            name: official,
            f"{name} (lmms-eval)": official,  # which has the official rules here
            f"{name} (VLMEvalKit)": percent(
                textvqa_accuracy_vlmevalkit(predictions[key], each) for key, each in known.items()
            ),
        }
        return Scores(name, values, {}, items)

    def upload(self, predictions: dict[str, Any]) -> Any:
        return [{"question_id": int(k), "answer": v} for k, v in predictions.items()]
