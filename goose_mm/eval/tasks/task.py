"""What an evaluation needs to know of a benchmark: its items, and how predictions are scored.

A task is built from a folder that holds the official files as they are downloaded. Its items come
in groups, one for each picture, clip or document, which is read once for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from goose_mm.eval.tasks.official import Files, digest_of

T = TypeVar("T")
SHORT_ANSWER = "{question}\nAnswer the question using a single word or phrase."


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What a task may be asked for; empty means the task's own choice."""

    split: str = ""
    prompt: str = ""  # with {question} in it
    ocr: bool = False  # TextVQA: put the official OCR tokens into the prompt
    blind: bool = False  # answer without the picture
    limit: int = 0  # only this many items, the first; 0: all

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"--limit is a number of items, or 0 for all; got {self.limit}")


class Item(NamedTuple):
    id: str  # unique in the task
    group: str  # the file it is about, or any name that items share
    prompt: str = ""


class Scores(NamedTuple):
    """Scores by name; a name says the evaluator where evaluators differ. None: not measured."""

    headline: str  # the one to print first
    values: dict[str, float | None]
    types: dict[str, dict[str, tuple[float, int]]]  # breakdowns: kind -> type -> (score, count)
    items: dict[str, float]  # what each item adds to the mean that is the headline; {}: no mean


class Task(ABC):
    """One benchmark. `kind` is that of the model it needs; `settings` all that decides a score.

    What an item is about, beside its words, is a source: `source` says which, and `decode` makes
    of it what a model is given. The official files are all read before the first prediction.
    """

    name: str
    kind: str
    takes: tuple[str, ...] = ("split", "limit")  # the options that mean something to it
    items: list[Item]
    settings: dict[str, Any]
    official: Files
    known: dict[str, Any]  # what the official files tell of an item, by its id; {}: it is secret

    @abstractmethod
    def ready(self, model: Any) -> None:
        """FileNotFoundError or ValueError if the model cannot be asked, or not about all items."""

    def source(self, group: Sequence[Item]) -> Any:
        """The picture, sound or document that a group is about: a file, its bytes or samples;
        None if there is none."""
        return None

    def digest(self, source: Any) -> str:
        """Of all that `source` holds."""
        return "" if source is None else digest_of(source)

    def decode(self, source: Any, model: Any) -> Any:
        """What the model is given of a source. ValueError if that is damaged or something else."""
        return None

    @abstractmethod
    def predict(
        self, model: Any, groups: Sequence[Sequence[Item]], media: Sequence[Any]
    ) -> list[list[Any]]:
        """A prediction, as JSON can hold it, for every item of some groups, of which `media` holds
        what `decode` made of their sources."""

    @abstractmethod
    def score(self, predictions: dict[str, Any]) -> Scores:
        """The scores of predictions by item id; every one of `items` has one."""

    def answer_type(self) -> Any:
        """The type of a prediction."""
        return str

    def truth(self) -> dict[str, Any]:
        """What is known of `items`: a run leaves out those that it could not read."""
        return {item.id: self.known[item.id] for item in self.items if self.known}

    def baselines(self) -> dict[str, float]:
        """Scores without a model, by the headline's measure."""
        return {}

    def upload(self, predictions: dict[str, Any]) -> Any:
        """The file that the official server takes, or None."""
        return None


def grouped(items: Iterable[Item]) -> list[list[Item]]:
    """Items of one group together, groups and items in the order of the task."""
    items = list(items)
    first = {}
    for i, item in enumerate(items):
        first.setdefault(item.group, i)
    ordered = sorted(items, key=lambda item: first[item.group])
    return [list(group) for _, group in groupby(ordered, key=lambda item: item.group)]


def need(folder: Path, files: dict[str, str], source: str) -> None:
    """FileNotFoundError that says which of `files` (path: what it is) are missing, and the cure."""
    missing = [f"{path} ({what})" for path, what in files.items() if not (folder / path).exists()]
    if missing:
        raise FileNotFoundError(f"not in {folder}: {', '.join(missing)}; {source}")


def limited(rows: list[T], limit: int) -> list[T]:
    """The first rows; all if `limit` is 0. ValueError if there are none."""
    if not rows:
        raise ValueError("the task has no items: its files are empty, or the split names none")
    return rows[:limit] if limit else rows
