"""Questions about pictures, in the files of their pages: VQAv2, TextVQA, GQA, ScienceQA.

The official score comes first. What a harness would print of the same answers stands beside it
under the harness's name; harnesses score answers as the model gave them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from goose_mm.eval.metrics.gqa import gqa_correct_lmms_eval, gqa_correct_vlmevalkit, gqa_scores
from goose_mm.eval.metrics.scienceqa import parse_choice, scienceqa_scores
from goose_mm.eval.metrics.vqa import (
    textvqa_accuracy,
    textvqa_accuracy_vlmevalkit,
    vqa_accuracy,
    vqa_accuracy_lmms_eval,
    vqa_scores,
)
from goose_mm.eval.tasks.task import SHORT_ANSWER, Item, Scores, Task, TaskOptions, limited, need

MAX_NEW_TOKENS = 128


class PictureTask(Task):
    """Greedy answers of a vision model; the picture of a group is read once."""

    kind = "vision"
    takes = ("split", "limit", "prompt", "blind")
    default_prompt = SHORT_ANSWER

    def __init__(self, options: TaskOptions, split: str) -> None:
        self.options = options
        self.prompt = options.prompt or self.default_prompt
        if "{question}" not in self.prompt:
            raise ValueError(f"--prompt must contain {{question}}, it is {self.prompt!r}")
        self.settings = {
            "split": split,
            "prompt": self.prompt,
            "blind": options.blind,
            "decoding": f"greedy, at most {MAX_NEW_TOKENS} tokens",
        }

    def predict(self, model: Any, groups: Sequence[Sequence[Item]]) -> list[list[Any]]:
        return [
            model.ask_many(
                None if self.options.blind or not group[0].group else group[0].group,
                [item.prompt for item in group],
                max_new_tokens=MAX_NEW_TOKENS,
            )
            for group in groups
        ]

    def ask(self, question: str) -> str:
        return self.prompt.replace("{question}", question)


def plain(text: str) -> str:
    """Lower case without the final stop, as LLaVA converts answers before they are uploaded."""
    return text.strip().rstrip(".").lower()


def percent(scores: Iterable[float]) -> float | None:
    found = list(scores)
    return 100 * sum(found) / len(found) if found else None


class VQAv2(PictureTask):
    """Open questions on COCO pictures, ten answers each (Goyal et al. 2017)."""

    name = "vqav2"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "val2014"
        super().__init__(options, split)
        images = "test2015" if split.startswith("test") else split
        questions = f"v2_OpenEnded_mscoco_{split}_questions.json"
        files = {questions: "questions", images: "pictures"}
        answers = f"v2_mscoco_{split}_annotations.json"
        if not split.startswith("test"):
            files[answers] = "answers"
        need(data, files, "get them from visualqa.org/download, and unpack them there")
        rows = json.loads((data / questions).read_text())["questions"]
        items = [
            Item(
                str(row["question_id"]),
                str(data / images / f"COCO_{images}_{row['image_id']:012d}.jpg"),
                self.ask(row["question"]),
            )
            for row in rows
        ]
        self.items = limited(items, options.limit)
        wanted = {item.id for item in self.items}
        self.annotations = []
        if answers in files:
            found = json.loads((data / answers).read_text())["annotations"]
            self.annotations = [row for row in found if str(row["question_id"]) in wanted]
        self.settings["answers"] = "lower case, final stop removed, before scoring"

    def score(self, predictions: dict[str, Any]) -> Scores:
        if not self.annotations:
            values = {"VQA accuracy": None}
            return Scores("VQA accuracy", values, {}, {})
        answers = {int(key): plain(value) for key, value in predictions.items()}
        official = vqa_scores(self.annotations, answers)
        counts = {
            kind: Counter(row[kind] for row in self.annotations)
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
            for row in self.annotations
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
        if not self.annotations:
            return {}
        common = Counter(row["multiple_choice_answer"] for row in self.annotations)
        always = common.most_common(1)[0][0]
        answers = {row["question_id"]: always for row in self.annotations}
        return {f"always {always!r}": vqa_scores(self.annotations, answers)["overall"]}

    def upload(self, predictions: dict[str, Any]) -> Any:
        return [{"question_id": int(k), "answer": plain(v)} for k, v in predictions.items()]


class TextVQA(PictureTask):
    """Questions whose answer is written in the picture (Singh et al. 2019)."""

    name = "textvqa"
    takes = (*PictureTask.takes, "ocr")

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "val"
        super().__init__(options, split)
        questions = f"TextVQA_0.5.1_{split}.json"
        words = f"TextVQA_Rosetta_OCR_v0.2_{split}.json"
        folder = "test_images" if split == "test" else "train_images"
        files = {questions: "questions", folder: "pictures"}
        if options.ocr:
            files[words] = "OCR tokens"
        need(data, files, "get them from textvqa.org/dataset, and unpack them there")
        rows = json.loads((data / questions).read_text())["data"]
        tokens: dict[str, list[str]] = {}
        if options.ocr:
            found = json.loads((data / words).read_text())["data"]
            tokens = {row["image_id"]: row["ocr_tokens"] for row in found}
        items = []
        for row in rows:
            seen = ", ".join(tokens.get(row["image_id"], []))
            question = row["question"] + (f"\nReference OCR token: {seen}" if options.ocr else "")
            file = data / folder / f"{row['image_id']}.jpg"
            items.append(Item(str(row["question_id"]), str(file), self.ask(question)))
        self.items = limited(items, options.limit)
        wanted = {item.id for item in self.items}
        self.answers = {
            str(row["question_id"]): row["answers"]
            for row in rows
            if "answers" in row and str(row["question_id"]) in wanted
        }
        self.settings["ocr"] = "OCR tokens in the prompt" if options.ocr else "no OCR tokens"

    def score(self, predictions: dict[str, Any]) -> Scores:
        name = f"TextVQA accuracy, {self.settings['ocr']}"
        if not self.answers:
            return Scores(name, {name: None}, {}, {})
        items = {
            key: textvqa_accuracy(predictions[key], known) for key, known in self.answers.items()
        }
        official = percent(items.values())
        values: dict[str, float | None] = {
            name: official,
            f"{name} (lmms-eval)": official,  # which has the official rules here
            f"{name} (VLMEvalKit)": percent(
                textvqa_accuracy_vlmevalkit(predictions[key], known)
                for key, known in self.answers.items()
            ),
        }
        return Scores(name, values, {}, items)

    def upload(self, predictions: dict[str, Any]) -> Any:
        return [{"question_id": int(k), "answer": v} for k, v in predictions.items()]


class GQA(PictureTask):
    """Compositional questions from scene graphs (Hudson and Manning 2019)."""

    name = "gqa"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "testdev_balanced"
        super().__init__(options, split)
        file = f"{split}_questions.json"
        source = "get them from cs.stanford.edu/people/dorarad/gqa/download.html, unpack them there"
        need(data, {file: "questions", "images": "pictures"}, source)
        rows = json.loads((data / file).read_text())
        items = [
            Item(key, str(data / "images" / f"{row['imageId']}.jpg"), self.ask(row["question"]))
            for key, row in rows.items()
        ]
        self.items = limited(items, options.limit)
        self.questions = {item.id: rows[item.id] for item in self.items}
        choices = data / f"{split.partition('_')[0]}_choices.json"
        self.choices = json.loads(choices.read_text()) if choices.exists() else None
        self.settings["answers"] = "lower case, final stop removed, before scoring"

    def score(self, predictions: dict[str, Any]) -> Scores:
        answers = {key: plain(value) for key, value in predictions.items()}
        found = gqa_scores(self.questions, answers, self.choices)
        types = {
            kind: {str(name): pair for name, pair in parts.items()}
            for kind, parts in found.items()
            if isinstance(parts, dict)
        }
        values = {key: value for key, value in found.items() if not isinstance(value, dict)}
        wanted = {key: row["answer"] for key, row in self.questions.items() if row["isBalanced"]}
        harnesses = {"lmms-eval": gqa_correct_lmms_eval, "VLMEvalKit": gqa_correct_vlmevalkit}
        for harness, correct in harnesses.items():
            values[f"accuracy ({harness})"] = percent(
                correct(predictions[key], answer) for key, answer in wanted.items()
            )
        items = {key: float(answers[key] == answer) for key, answer in wanted.items()}
        return Scores("accuracy", values, types, items)

    def baselines(self) -> dict[str, float]:
        known = {k: row for k, row in self.questions.items() if row["isBalanced"]}
        always = Counter(row["answer"] for row in known.values()).most_common(1)[0]
        return {f"always {always[0]!r}": 100 * always[1] / len(known)}

    def upload(self, predictions: dict[str, Any]) -> Any:
        return [{"questionId": k, "prediction": plain(v)} for k, v in predictions.items()]


class ScienceQA(PictureTask):
    """School questions with choices, some with a picture (Lu et al. 2022)."""

    name = "scienceqa"
    default_prompt = "{question}\nAnswer with the option's letter from the given choices directly."

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "test"
        super().__init__(options, split)
        files = {"problems.json": "questions", "pid_splits.json": "splits", split: "pictures"}
        need(data, files, "get them from scienceqa.github.io, and unpack the pictures there")
        problems = json.loads((data / "problems.json").read_text())
        names = json.loads((data / "pid_splits.json").read_text())[split]
        items = []
        for key in names:
            row = problems[key]
            context = f"Context: {row['hint']}\n" if row["hint"] else ""
            choices = "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(row["choices"]))
            question = f"{context}{row['question']}\n{choices}"
            picture = str(data / split / key / row["image"]) if row["image"] else ""
            items.append(Item(key, picture, self.ask(question)))
        self.items = limited(items, options.limit)
        self.problems = {item.id: problems[item.id] for item in self.items}

    def score(self, predictions: dict[str, Any]) -> Scores:
        values: dict[str, float | None] = {}
        for mode in ("llava", "lenient"):
            found = scienceqa_scores(self.problems, predictions, mode=mode)
            values |= {f"{key} ({mode} parser)": value for key, value in found.items()}
        found = scienceqa_scores(self.problems, predictions, mode="lmms_eval")
        values |= {f"{key} (lmms-eval)": found[key] for key in ("Avg", "IMG")}
        items = {
            key: float(parse_choice(predictions[key], len(row["choices"])) == row["answer"])
            for key, row in self.problems.items()
        }
        return Scores("Avg (llava parser)", values, {}, items)

    def baselines(self) -> dict[str, float]:
        chance = [1 / len(row["choices"]) for row in self.problems.values()]
        return {"a choice at random": 100 * sum(chance) / len(chance)}
