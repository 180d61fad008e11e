"""ScienceQA: school questions with choices, in the files of its page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from goose_mm.eval.metrics.scienceqa import parse_choice, scienceqa_scores
from goose_mm.eval.tasks.official import Name
from goose_mm.eval.tasks.picture import PictureTask
from goose_mm.eval.tasks.task import Item, Scores, TaskOptions, limited, need


class Problem(TypedDict):
    question: Name
    choices: Annotated[list[str], Meta(min_length=1)]
    answer: Annotated[int, Meta(ge=0)]
    hint: str | None
    image: str | None
    subject: str
    grade: str


class ScienceQA(PictureTask):
    """School questions with choices, some with a picture (Lu et al. 2022)."""

    name = "scienceqa"
    default_prompt = "{question}\nAnswer with the option's letter from the given choices directly."

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "test"
        super().__init__(data, options, split)
        problems, splits = "problems.json", "pid_splits.json"
        files = {problems: "questions", splits: "splits", split: "pictures"}
        need(data, files, "get them from scienceqa.github.io, and unpack the pictures there")
        names = self.official.listed(splits, split, str)
        self.known = self.official.keyed(problems, Problem, limited(names, options.limit))
        self.items = []
        for key, row in self.known.items():
            if row["answer"] >= len(row["choices"]):
                said = f"{row['answer']} is none of {len(row['choices'])} choices, which begin at 0"
                raise ValueError(f"{data / problems}, {key}, answer: {said}")
            context = f"Context: {row['hint']}\n" if row["hint"] else ""
            choices = "\n".join(f"{chr(65 + i)}. {text}" for i, text in enumerate(row["choices"]))
            question = f"{context}{row['question']}\n{choices}"
            picture = str(data / split / key / row["image"]) if row["image"] else ""
            self.items.append(Item(key, picture, self.ask(question)))

    def score(self, predictions: dict[str, Any]) -> Scores:
        problems, values = self.truth(), {}
        for mode in ("llava", "lenient"):
            found = scienceqa_scores(problems, predictions, mode=mode)
            values |= {f"{key} ({mode} parser)": value for key, value in found.items()}
        found = scienceqa_scores(problems, predictions, mode="lmms_eval")
        values |= {f"{key} (lmms-eval)": found[key] for key in ("Avg", "IMG")}
        items = {
            key: float(parse_choice(predictions[key], len(row["choices"])) == row["answer"])
            for key, row in problems.items()
        }
        return Scores("Avg (llava parser)", values, {}, items)

    def baselines(self) -> dict[str, float]:
        chance = [1 / len(row["choices"]) for row in self.truth().values()]
        return {"a choice at random": 100 * sum(chance) / len(chance)}
