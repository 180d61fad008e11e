"""Likelihoods of text, in the files of their official pages: any documents, LAMBADA, MMLU."""

from __future__ import annotations

import lzma
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from goose_mm.eval.tasks.likelihood import PREFIX_TOKEN, loglikelihoods
from goose_mm.eval.tasks.official import Files
from goose_mm.eval.tasks.task import Item, Scores, Task, TaskOptions, limited, need


class TextTask(Task):
    """Likelihoods of a text model. An item's context follows the prefix token."""

    kind = "text"

    def __init__(self, data: Path) -> None:
        self.official = Files(data)
        self.settings = {"prefix token": PREFIX_TOKEN}

    def ready(self, model: Any) -> None:
        from goose_mm.text.generate import need_tokenizer

        need_tokenizer(model)

    def pairs(self, item: Item) -> list[tuple[str | bytes, str | bytes]]:
        """The (context, continuation) pairs of an item. Each side is tokenized alone, as in the
        official RWKV evaluation, so the last token of a context never reaches across."""
        raise NotImplementedError

    def prediction(self, scores: list[tuple[float, bool]], tokens: int) -> Any:
        """What is written down of the scores of an item's pairs."""
        raise NotImplementedError

    def predict(
        self, model: Any, groups: Sequence[Sequence[Item]], media: Sequence[Any] = ()
    ) -> list[list[Any]]:
        from goose_mm.text.generate import need_tokenizer

        encode = need_tokenizer(model).encode
        pairs = [self.pairs(item) for group in groups for item in group]
        contexts = [[PREFIX_TOKEN, *encode(context)] for some in pairs for context, _ in some]
        continuations = [encode(text) for some in pairs for _, text in some]
        scores = iter(loglikelihoods(model, contexts, continuations))
        lengths = iter(map(len, continuations))
        predictions = iter(
            [
                self.prediction([next(scores) for _ in some], sum(next(lengths) for _ in some))
                for some in pairs
            ]
        )
        return [[next(predictions) for _ in group] for group in groups]


class Document(TypedDict):
    loglikelihood: float
    tokens: Annotated[int, Meta(ge=1)]


class BitsPerByte(TextTask):
    """How well whole documents are predicted: a folder of .txt files, each from its first byte to
    its last. `split` names a folder inside it. Documents of any length are read without a gap."""

    name = "bits_per_byte"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        super().__init__(data)
        folder = data / options.split
        documents = [file for file in sorted(folder.glob("*.txt")) if file.is_file()]
        if not documents:
            raise FileNotFoundError(f"no .txt files in {folder}; put the documents there")
        documents = limited(documents, options.limit)
        self.items = [Item(file.name, str(file)) for file in documents]
        self.sizes = {file.name: file.stat().st_size for file in documents}
        if empty := [file for file in documents if not self.sizes[file.name]]:
            raise ValueError(f"{empty[0]} is empty; remove it")
        self.settings |= {"split": options.split, "context": "the whole document before a token"}

    def answer_type(self) -> Any:
        return Document

    def source(self, group: Sequence[Item]) -> Path:
        return Path(group[0].group)

    def pairs(self, item: Item) -> list[tuple[str | bytes, str | bytes]]:
        return [("", Path(item.group).read_bytes())]

    def prediction(self, scores: list[tuple[float, bool]], tokens: int) -> Any:
        return {"loglikelihood": scores[0][0], "tokens": tokens}

    def score(self, predictions: dict[str, Any]) -> Scores:
        bits = {key: -one["loglikelihood"] / math.log(2) for key, one in predictions.items()}
        each = {key: (bits[key] / size, size) for key, size in self.sizes.items()}
        tokens = sum(one["tokens"] for one in predictions.values())
        values: dict[str, float | None] = {
            "bits per byte": sum(bits.values()) / sum(self.sizes.values()),
            "bits per byte, mean of documents": mean(x for x, _ in each.values()),
            "bits per token": sum(bits.values()) / tokens,
            "bytes per token": sum(self.sizes.values()) / tokens,
        }
        return Scores("bits per byte", values, {"document": each}, {})

    def baselines(self) -> dict[str, float]:
        packed = sum(len(lzma.compress(Path(item.group).read_bytes())) for item in self.items)
        return {"xz": 8 * packed / sum(self.sizes.values()), "bytes at random": 8.0}


class Passage(TypedDict):
    text: str


class LastWord(TypedDict):
    loglikelihood: float
    greedy: bool


class Lambada(TextTask):
    """The last word of a passage that only its whole context gives away (Paperno et al. 2016)."""

    name = "lambada"
    takes = ("limit",)
    files = ("lambada_test.jsonl", "lambada_test_en.jsonl")

    def __init__(self, data: Path, options: TaskOptions) -> None:
        super().__init__(data)
        name = next((name for name in self.files if (data / name).exists()), self.files[0])
        source = (
            f"put it there, or {self.files[1]} of EleutherAI/lambada_openai on the Hugging Face hub"
        )
        need(data, {name: "passages"}, source)
        parts = []
        for place, row in limited(self.official.rows(name, Passage), options.limit):
            parts.append(row["text"].rpartition(" "))
            if not all(map(str.strip, (parts[-1][0], parts[-1][2]))):
                raise ValueError(f"{place}, text: it must end in a word and have others before it")
        self.items = [Item(str(i), str(i), before) for i, (before, _, _) in enumerate(parts)]
        self.targets = {str(i): f" {word}" for i, (_, _, word) in enumerate(parts)}
        self.settings |= {"file": name, "target": "the last word and the space before it"}

    def answer_type(self) -> Any:
        return LastWord

    def pairs(self, item: Item) -> list[tuple[str | bytes, str | bytes]]:
        return [(item.prompt, self.targets[item.id])]

    def prediction(self, scores: list[tuple[float, bool]], tokens: int) -> Any:
        return {"loglikelihood": scores[0][0], "greedy": scores[0][1]}

    def score(self, predictions: dict[str, Any]) -> Scores:
        found = [predictions[item.id] for item in self.items]
        items = {item.id: float(predictions[item.id]["greedy"]) for item in self.items}
        nats = -mean(one["loglikelihood"] for one in found)
        values: dict[str, float | None] = {
            "accuracy": 100 * sum(items.values()) / len(items),
            "perplexity": math.exp(min(nats, 700.0)),  # beyond, a float overflows
        }
        return Scores("accuracy", values, {}, items)

    def baselines(self) -> dict[str, float]:
        word, count = Counter(self.targets.values()).most_common(1)[0]
        return {f"always {word.strip()!r}": 100 * count / len(self.targets)}


LETTERS = "ABCD"
# the two spaces are in the official script, and so in what other models were asked
HEADING = "The following are multiple choice questions (with answers) about  {subject}.\n\n"


class MMLU(TextTask):
    """School and professional questions with four choices in 57 subjects (Hendrycks et al. 2021).

    The first `shots` questions of the subject's dev file stand, answered, before every question.
    """

    name = "mmlu"

    def __init__(self, data: Path, options: TaskOptions, shots: int = 5) -> None:
        split = options.split or "test"
        root = data / "data" if (data / "data").is_dir() else data
        super().__init__(root)
        source = "unpack data.tar of github.com/hendrycks/test there"
        need(root, {split: "questions", **({"dev": "examples"} if shots else {})}, source)
        files = sorted((root / split).glob(f"*_{split}.csv"))
        items, self.answers, self.subjects, self.headings = [], {}, {}, {}
        for file in files:
            subject = file.name.removesuffix(f"_{split}.csv")
            examples = self.read(f"dev/{subject}_dev.csv")[:shots] if shots else []
            if len(examples) < shots:
                raise ValueError(
                    f"{root}/dev/{subject}_dev.csv has {len(examples)} examples for {shots} shots; "
                    "take fewer"
                )
            self.headings[subject] = heading(subject, examples)
            for i, row in enumerate(self.read(f"{split}/{file.name}")):
                key = f"{subject}/{i}"
                items.append(Item(key, key, question(row)))
                self.answers[key], self.subjects[key] = row[-1], subject
        self.items = limited(items, options.limit)
        self.settings |= {
            "split": split,
            "shots": shots,
            "prompt": HEADING.rstrip(),
            "choices": "the likeliest of ' A', ' B', ' C', ' D'",
        }

    def read(self, name: str) -> list[list[str]]:
        """Rows of an official table: question, four choices, letter; words are left as they are."""

        def fits(row: list[str]) -> bool:
            return len(row) == len(LETTERS) + 2 and row[-1].strip() in tuple(LETTERS)

        told = "question, A, B, C, D and the answer's letter"
        rows = self.official.cells(name, fits, told, cut=False)
        return [[*row[:-1], row[-1].strip()] for _, row in rows]

    def answer_type(self) -> Any:
        return Annotated[list[float], Meta(min_length=len(LETTERS), max_length=len(LETTERS))]

    def pairs(self, item: Item) -> list[tuple[str | bytes, str | bytes]]:
        context = self.headings[self.subjects[item.id]] + item.prompt
        return [(context, f" {letter}") for letter in LETTERS]

    def predict(
        self, model: Any, groups: Sequence[Sequence[Item]], media: Sequence[Any] = ()
    ) -> list[list[Any]]:
        # subject by subject: then the examples are what all contexts share, and are read once
        found: dict[str, list[Any]] = {}
        for subject in dict.fromkeys(self.subjects[group[0].id] for group in groups):
            some = [group for group in groups if self.subjects[group[0].id] == subject]
            for group, predicted in zip(some, super().predict(model, some), strict=True):
                found[group[0].id] = predicted
        return [found[group[0].id] for group in groups]

    def prediction(self, scores: list[tuple[float, bool]], tokens: int) -> Any:
        return [value for value, _ in scores]

    def score(self, predictions: dict[str, Any]) -> Scores:
        items = {}
        for item in self.items:
            chosen = max(range(len(LETTERS)), key=predictions[item.id].__getitem__)
            items[item.id] = float(LETTERS[chosen] == self.answers[item.id])
        by_subject: dict[str, list[float]] = {}
        for key, value in items.items():
            by_subject.setdefault(self.subjects[key], []).append(value)
        subjects = {k: (100 * sum(v) / len(v), len(v)) for k, v in by_subject.items()}
        micro = "accuracy, micro average over questions"
        values: dict[str, float | None] = {
            micro: 100 * sum(items.values()) / len(items),
            "accuracy, macro average over subjects": mean(x for x, _ in subjects.values()),
        }
        return Scores(micro, values, {"subject": subjects}, items)

    def baselines(self) -> dict[str, float]:
        counts = Counter(self.answers[item.id] for item in self.items)
        letter, count = counts.most_common(1)[0]
        share = 100 * count / len(self.items)
        return {"a choice at random": 100 / len(LETTERS), f"always {letter!r}": share}


def question(row: Sequence[str]) -> str:
    choices = zip(LETTERS, row[1:-1], strict=True)
    return row[0] + "".join(f"\n{letter}. {text}" for letter, text in choices) + "\nAnswer:"


def heading(subject: str, examples: Sequence[Sequence[str]]) -> str:
    """What stands before every question of a subject: a sentence, and answered questions."""
    words = HEADING.format(subject=subject.replace("_", " "))
    return words + "".join(f"{question(row)} {row[-1]}\n\n" for row in examples)
