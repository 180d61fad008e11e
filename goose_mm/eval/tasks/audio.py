"""Tagging of clips, in the files of their official pages: AudioSet, ESC-50 and ESC-10."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from goose_mm.eval.metrics.audio import fold_accuracy, tagging_metrics
from goose_mm.eval.tasks.clip_files import Clip, files_of, index, waveform
from goose_mm.eval.tasks.task import Item, Scores, Task, TaskOptions, limited, need

CLASSES = "class_labels_indices.csv"
CLIPS = (
    "clips in {0}/ or {0}-*: sounds, .tar (webdataset), .h5 (PANNs), .parquet or a saved dataset"
)
AUDIOSET_PAGES = (
    "get the tables from research.google.com/audioset/download.html (download_strong.html for "
    "events) and the clips yourself, and put them there"
)


class ClipTask(Task):
    """Scores of every label of an audio model; a group is a clip."""

    kind = "audio"
    labels: tuple[str, ...]

    def predict(self, model: Any, groups: Sequence[Sequence[Item]]) -> list[list[Any]]:
        if missing := set(self.labels) - set(model.labels):
            raise ValueError(
                f"the model has no label {sorted(missing)[0]!r} (and {len(missing) - 1} more) of "
                f"{self.name}; it knows {len(model.labels)}"
            )
        columns = [model.labels.index(label) for label in self.labels]
        rate = model.config.audio.sample_rate
        rows = model.logits([self.sound(group[0], rate) for group in groups])[:, columns]
        return [[[float(f"{x:.7g}") for x in row]] for row in rows.tolist()]

    def sound(self, item: Item, sample_rate: int) -> Any:
        """What the model is given: a file, or samples at its rate."""
        return item.group

    def matrix(self, predictions: dict[str, Any]) -> np.ndarray:
        return np.array([predictions[item.id] for item in self.items])


class AudioSet(ClipTask):
    """Multi-label tags of 10 s clips (Gemmeke et al. 2017); says how many clips were found.

    Labels come from `SPLIT_segments.csv`, for a split like `eval_strong` from the events of
    `audioset_eval_strong.tsv` (Hershey et al. 2021), all of a clip together; without a table
    from the files of the clips. Classes are those of `class_labels_indices.csv`.
    """

    name = "audioset"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "eval"
        strong = split.endswith("_strong")
        table_name = f"audioset_{split}.tsv" if strong else f"{split}_segments.csv"
        files = files_of(data, split) or files_of(data, split.removesuffix("_strong"))
        if not files or not (data / CLASSES).is_file():
            tables = {CLASSES: "classes", table_name: "labels", split: CLIPS.format(split)}
            need(data, tables, AUDIOSET_PAGES)
            raise FileNotFoundError(f"{data / split} is empty: {CLIPS.format(split)}")
        with (data / CLASSES).open(newline="", encoding="utf-8") as file:
            classes = list(csv.DictReader(file))
        self.labels = tuple(row["display_name"] for row in classes)
        self.numbers: dict[Any, int] = {}
        for i, row in enumerate(classes):
            self.numbers |= {i: i, row["mid"]: i, row["display_name"]: i}
        table = (read_events if strong else read_segments)(data / table_name)

        self.clips: dict[str, Clip] = {}
        targets: dict[str, set[int]] = {}
        unknown = 0
        shown = tqdm(files, desc="looking for clips", unit="file", leave=False, disable=None)
        for key, clip, labels in listed(index(shown), table, table_name):
            if key not in self.clips:
                self.clips[key] = clip
                targets[key] = {self.numbers[x] for x in labels if x in self.numbers}
                unknown += sum(x not in self.numbers for x in labels)
        if not any(targets.values()):
            raise ValueError(
                f"none of {len(targets)} clips of {split} in {data} is both listed and labelled "
                f"with a class of {CLASSES}; {CLIPS.format(split)}"
            )
        self.items = limited([Item(key, key) for key in self.clips], options.limit)
        self.order = sorted(item.id for item in self.items)  # not that of the files
        self.targets = np.zeros((len(self.order), len(classes)), np.int64)
        for row, key in enumerate(self.order):
            self.targets[row, list(targets[key])] = 1
        self.settings = {
            "split": split,
            "labels": "events of a clip, united" if strong else "of clips",
            "labels of no class": unknown,
            "clips listed": len(table or self.clips),
            "clips found": len(self.clips),
        }

    def sound(self, item: Item, sample_rate: int) -> Any:
        return waveform(self.clips[item.id], sample_rate)

    def matrix(self, predictions: dict[str, Any]) -> np.ndarray:
        return np.array([predictions[key] for key in self.order])

    def score(self, predictions: dict[str, Any]) -> Scores:
        found = tagging_metrics(self.matrix(predictions), self.targets)
        per_class = dict(zip(self.labels, found.pop("per_class_ap"), strict=True))
        found.pop("per_class_auc")
        counts = dict(zip(self.labels, self.targets.sum(0).tolist(), strict=True))
        types = {
            "average precision": {k: (v, counts[k]) for k, v in per_class.items() if v is not None}
        }
        found["skipped"] = float(
            len(found["skipped"]) if isinstance(found["skipped"], list) else found["skipped"]
        )
        return Scores("mAP", found, types, {})

    def baselines(self) -> dict[str, float]:
        share = self.targets.mean(0)
        return {"any constant score": float(share[share > 0].mean())}


class ESC50(ClipTask):
    """Environmental sounds in five official folds (Piczak 2015); ESC-10 is its part of ten classes.

    A model must not be scored on a fold it was trained on: `split` names the one that was kept
    out, as "fold3"; several folds need several models, whose predictions are scored together.
    """

    name = "esc50"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        from goose_mm.data.clips import read_rows

        rows = read_rows(data, ())
        self.labels = tuple(sorted({row.label for row in rows}))
        split = options.split or "all"
        if split != "all":
            rows = [row for row in rows if f"fold{row.fold}" == split]
        self.items = limited([Item(row.file.name, str(row.file)) for row in rows], options.limit)
        kept = rows[: len(self.items)]
        self.folds = [row.fold for row in kept]
        self.targets = [self.labels.index(row.label) for row in kept]
        self.settings = {"split": split, "classes": len(self.labels)}

    def score(self, predictions: dict[str, Any]) -> Scores:
        best = self.matrix(predictions).argmax(1).tolist()
        found = fold_accuracy(self.folds, self.targets, best)
        folds = {
            f"fold {fold}": (value, self.folds.count(fold))
            for fold, value in found.pop("fold_accuracy").items()
        }
        items = {
            item.id: float(guess == target)
            for item, guess, target in zip(self.items, best, self.targets, strict=True)
        }
        return Scores("mean_of_folds", found, {"fold": folds}, items)

    def baselines(self) -> dict[str, float]:
        return {"one class always": max(map(self.targets.count, self.targets)) / len(self.targets)}


def read_segments(path: Path) -> dict[str, list[str]] | None:
    """Labels by id of an official table of clips; None if it is not there."""
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        lines = (line for line in file if not line.startswith("#"))
        rows = list(csv.reader(lines, skipinitialspace=True))
    if wrong := next((row for row in rows if len(row) != 4), None):
        raise ValueError(f"{path}: a row has {len(wrong)} fields instead of 4: {wrong}")
    return {key: mids.split(",") for key, _, _, mids in rows}


def read_events(path: Path) -> dict[str, list[str]]:
    """Labels by id of an official table of events: those that occur anywhere in a clip."""
    need(path.parent, {path.name: "events"}, AUDIOSET_PAGES)
    found: dict[str, dict[str, None]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        if lacking := {"segment_id", "label"} - set(rows.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns {', '.join(sorted(lacking))}")
        for row in rows:
            found.setdefault(row["segment_id"], {})[row["label"]] = None
    return {key: list(labels) for key, labels in found.items()}


def listed(
    clips: Iterable[Clip], table: dict[str, list[str]] | None, name: str
) -> Iterator[tuple[str, Clip, Sequence[Any]]]:
    """(id, clip, labels) of the clips that a table lists; of all without a table.

    Many downloads put a Y before the id; files of strong labels may leave out where in the
    video the clip begins, as in ID_30000.
    """
    if table is None:
        for clip in clips:
            if clip.labels is None:
                raise ValueError(f"{clip.file} tells no labels: put {name} there; {AUDIOSET_PAGES}")
            yield re.sub("^Y(?=.{11}$)", "", clip.name), clip, clip.labels
        return
    ids = {}
    for key in table:
        video = re.sub(r"(?<=^.{11})_\d+$", "", key)
        for called in (key, f"Y{key}", video, f"Y{video}"):
            ids.setdefault(called, key)
    for clip in clips:
        if key := ids.get(clip.name):
            yield key, clip._replace(labels=None), table[key]
