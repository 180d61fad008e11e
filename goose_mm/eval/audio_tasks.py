"""Tagging of clips, in the files of their official pages: AudioSet, ESC-50 and ESC-10."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from goose_mm.eval.audio_metrics import fold_accuracy, tagging_metrics
from goose_mm.eval.task import Item, Scores, Task, TaskOptions, limited, need

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")


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
        rows = model.logits([group[0].group for group in groups])[:, columns]
        return [[[float(f"{x:.7g}") for x in row]] for row in rows.tolist()]

    def matrix(self, predictions: dict[str, Any]) -> np.ndarray:
        return np.array([predictions[item.id] for item in self.items])


class AudioSet(ClipTask):
    """Multi-label tags of 10 s clips (Gemmeke et al. 2017); says how many clips were found."""

    name = "audioset"

    def __init__(self, data: Path, options: TaskOptions) -> None:
        split = options.split or "eval"
        table, names = f"{split}_segments.csv", "class_labels_indices.csv"
        files = {table: "segments", names: "labels", split: "clips"}
        source = (
            "get the tables from research.google.com/audioset/download.html, and the clips yourself"
        )
        need(data, files, source)
        with (data / names).open(newline="", encoding="utf-8") as file:
            known = {row["mid"]: row["display_name"] for row in csv.DictReader(file)}
        self.labels = tuple(known.values())
        with (data / table).open(newline="", encoding="utf-8") as file:
            lines = (line for line in file if not line.startswith("#"))
            rows = list(csv.reader(lines, skipinitialspace=True))
        index = {mid: i for i, mid in enumerate(known)}
        items, targets = [], {}
        for key, _, _, mids in rows:
            clip = find_clip(data / split, key)
            if clip is None:
                continue
            items.append(Item(key, str(clip)))
            targets[key] = [index[mid] for mid in mids.split(",")]
        self.items = limited(items, options.limit)
        self.targets = np.zeros((len(self.items), len(known)), np.int64)
        for row, item in enumerate(self.items):
            self.targets[row, targets[item.id]] = 1
        self.settings = {"split": split, "clips listed": len(rows), "clips found": len(items)}

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
        return Scores("pooled_accuracy", found, {"fold": folds}, items)

    def baselines(self) -> dict[str, float]:
        return {"one class always": max(map(self.targets.count, self.targets)) / len(self.targets)}


def find_clip(folder: Path, key: str) -> Path | None:
    """The file of an AudioSet id: as the id says or, as many downloads have it, behind a Y."""
    files = (folder / f"{prefix}{key}{ending}" for prefix in ("", "Y") for ending in SOUNDS)
    return next((file for file in files if file.exists()), None)
