"""GQA: compositional questions from scene graphs, in the files of its page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypedDict

from goose_mm.eval.metrics.gqa import gqa_correct_lmms_eval, gqa_correct_vlmevalkit, gqa_scores
from goose_mm.eval.tasks.official import Name
from goose_mm.eval.tasks.picture import PictureTask, percent, plain
from goose_mm.eval.tasks.task import Item, Scores, TaskOptions, limited, need


class Types(TypedDict):
    structural: str
    semantic: str
    detailed: str


Groups = TypedDict("Groups", {"global": str | None})  # which is no name in Python


class Step(TypedDict):
    operation: str
    argument: str


class Question(TypedDict):
    imageId: Name
    question: Name
    answer: str
    isBalanced: bool
    types: Types
    groups: Groups
    entailed: list[str]
    semantic: list[Step]


class Choices(TypedDict):
    valid: list[str]
    plausible: list[str]


class GQA(PictureTask):
    """Compositional questions from scene graphs (Hudson and Manning 2019)."""

    name = "gqa"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "testdev_balanced"
        super().__init__(data, options, split)
        file = f"{split}_questions.json"
        source = "get them from cs.stanford.edu/people/dorarad/gqa/download.html, unpack them there"
        need(data, {file: "questions", "images": "pictures"}, source)
        rows = self.official.keyed(file, Question)
        self.known = dict(limited(list(rows.items()), options.limit))
        self.items = [
            Item(key, str(data / "images" / f"{row['imageId']}.jpg"), self.ask(row["question"]))
            for key, row in self.known.items()
        ]
        choices = f"{split.partition('_')[0]}_choices.json"
        self.choices: dict[str, Any] | None = None
        if (data / choices).exists():
            balanced = [key for key, row in self.known.items() if row["isBalanced"]]
            self.choices = self.official.keyed(choices, Choices, balanced)
        self.settings["answers"] = "lower case, final stop removed, before scoring"

    def score(self, predictions: dict[str, Any]) -> Scores:
        questions = self.truth()
        answers = {key: plain(value) for key, value in predictions.items()}
        found = gqa_scores(questions, answers, self.choices)
        types = {
            kind: {str(name): pair for name, pair in parts.items()}
            for kind, parts in found.items()
            if isinstance(parts, dict)
        }
        values = {key: value for key, value in found.items() if not isinstance(value, dict)}
        wanted = {key: row["answer"] for key, row in questions.items() if row["isBalanced"]}
        harnesses = {"lmms-eval": gqa_correct_lmms_eval, "VLMEvalKit": gqa_correct_vlmevalkit}
        for harness, correct in harnesses.items():
            values[f"accuracy ({harness})"] = percent(
                correct(predictions[key], answer) for key, answer in wanted.items()
            )
        items = {key: float(answers[key] == answer) for key, answer in wanted.items()}
        return Scores("accuracy", values, types, items)

    def baselines(self) -> dict[str, float]:
        answers = Counter(row["answer"] for row in self.truth().values() if row["isBalanced"])
        common = answers.most_common(1)
        return {f"always {answer!r}": 100 * n / answers.total() for answer, n in common}

    def upload(self, predictions: dict[str, Any]) -> Any:
        return [{"questionId": k, "prediction": plain(v)} for k, v in predictions.items()]
