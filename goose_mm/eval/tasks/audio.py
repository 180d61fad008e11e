"""Tagging of clips, in the files of their official pages: AudioSet, ESC-50 and ESC-10."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import numpy as np
from msgspec import Meta
from tqdm import tqdm

from goose_mm.eval.metrics.audio import fold_accuracy, tagging_metrics
from goose_mm.eval.tasks import clip_files
from goose_mm.eval.tasks.clip_files import Clip, files_of, index, waveform
from goose_mm.eval.tasks.official import Files, Name, digest_of, unique
from goose_mm.eval.tasks.task import Item, Scores, Task, TaskOptions, limited, need

CLASSES = "class_labels_indices.csv"
CLIPS = (
    "clips in {0}/ or {0}-*: sounds, .tar (webdataset), .h5 (PANNs), .parquet or a saved dataset"
)
AUDIOSET_PAGES = (
    "get the tables from research.google.com/audioset/download.html (download_strong.html for "
    "events) and the clips yourself, and put them there"
)


class Numbered(TypedDict, total=False):
    index: int


class Class(Numbered):
    mid: Name
    display_name: Name


class Event(TypedDict):
    segment_id: Name
    label: Name


class Sound(NamedTuple):
    """One clip as it is stored."""

    data: Path | bytes | np.ndarray
    rate: int | None  # Hz; None: its file tells
    name: str


class ClipTask(Task):
    """Scores of every label of an audio model; a group is a clip."""

    kind = "audio"
    labels: tuple[str, ...]

    def answer_type(self) -> Any:
        count = len(self.labels)
        return Annotated[list[float], Meta(min_length=count, max_length=count)]

    def ready(self, model: Any) -> None:
        if missing := set(self.labels) - set(model.labels):
            raise ValueError(
                f"the model has no label {sorted(missing)[0]!r} (and {len(missing) - 1} more) of "
                f"{self.name}; it knows {len(model.labels)}"
            )

    def source(self, group: Sequence[Item]) -> Sound:
        return Sound(Path(group[0].group), None, group[0].group)

    def digest(self, source: Sound) -> str:
        rate = () if source.rate is None else (str(source.rate).encode(),)
        return digest_of(source.data, *rate)

    def decode(self, source: Sound, model: Any) -> np.ndarray:
        return waveform(*source, model.config.audio.sample_rate)

    def predict(
        self, model: Any, groups: Sequence[Sequence[Item]], media: Sequence[Any]
    ) -> list[list[Any]]:
        columns = [model.labels.index(label) for label in self.labels]
        rows = model.logits(media)[:, columns]
        return [[[float(f"{x:.7g}") for x in row]] for row in rows.tolist()]


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
        self.official = Files(data)
        classes = read_classes(self.official)
        self.labels = tuple(row["display_name"] for row in classes)
        self.numbers: dict[Any, int] = {}
        for i, row in enumerate(classes):
            self.numbers |= {i: i, row["mid"]: i, row["display_name"]: i}
        table = (read_events if strong else read_segments)(self.official, table_name)

        self.clips: dict[str, Clip] = {}
        self.known: dict[str, list[int]] = {}  # classes of a clip
        unknown = 0
        shown = tqdm(files, desc="looking for clips", unit="file", leave=False, disable=None)
        for key, clip, labels in listed(index(shown), table, table_name):
            classes_of = sorted({self.numbers[x] for x in labels if x in self.numbers})
            if self.known.setdefault(key, classes_of) != classes_of:
                raise ValueError(
                    f"{key} has other labels in {clip.file} than in {self.clips[key].file}"
                )
            if key not in self.clips:
                self.clips[key] = clip
                unknown += sum(x not in self.numbers for x in labels)
        if not any(self.known.values()):
            raise ValueError(
                f"none of {len(self.known)} clips of {split} in {data} is both listed and labelled "
                f"with a class of {CLASSES}; {CLIPS.format(split)}"
            )
        if table is None:
            told = json.dumps(self.known, sort_keys=True)
            self.official.digests[f"{split} (labels)"] = digest_of(told.encode())
        self.items = limited([Item(key, key) for key in self.clips], options.limit)
        self.settings = {
            "split": split,
            "labels": "events of a clip, united" if strong else "of clips",
            "labels of no class": unknown,
            "clips listed": len(table or self.clips),
            "clips found": len(self.clips),
        }

    def source(self, group: Sequence[Item]) -> Sound:
        clip = self.clips[group[0].id]
        return Sound(*clip_files.load(clip), f"{clip.name} in {clip.file}")

    @property
    def order(self) -> list[str]:
        """Ids, not in the order of the files."""
        return sorted(item.id for item in self.items)

    @property
    def targets(self) -> np.ndarray:
        """[clips, classes] of 0 and 1, in this order."""
        found = np.zeros((len(self.items), len(self.labels)), np.int64)
        for row, key in zip(found, self.order, strict=True):
            row[self.known[key]] = 1
        return found

    def score(self, predictions: dict[str, Any]) -> Scores:
        targets = self.targets
        found = tagging_metrics([predictions[key] for key in self.order], targets)
        per_class = dict(zip(self.labels, found.pop("per_class_ap"), strict=True))
        found.pop("per_class_auc")
        counts = dict(zip(self.labels, targets.sum(0).tolist(), strict=True))
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
        own = (data / "meta.csv").is_file()
        table = "meta.csv" if own else "meta/esc50.csv"
        self.official = Files(data)
        self.official.digests[table] = digest_of(data / table)
        self.labels = tuple(sorted({row.label for row in rows}))
        split = options.split or "all"
        if split != "all":
            rows = [row for row in rows if f"fold{row.fold}" == split]
        rows = limited(rows, options.limit)
        names = [os.path.relpath(row.file, data if own else data / "audio") for row in rows]
        self.known = dict(zip(names, rows, strict=True))
        self.items = [Item(name, str(row.file)) for name, row in self.known.items()]
        self.settings = {"split": split, "classes": len(self.labels)}

    def score(self, predictions: dict[str, Any]) -> Scores:
        known = self.truth()
        best = {key: self.labels[int(np.argmax(predictions[key]))] for key in known}
        folds_of = [row.fold for row in known.values()]
        found = fold_accuracy(folds_of, [row.label for row in known.values()], [*best.values()])
        folds = {
            f"fold {fold}": (value, folds_of.count(fold))
            for fold, value in found.pop("fold_accuracy").items()
        }
        items = {key: float(best[key] == row.label) for key, row in known.items()}
        return Scores("mean_of_folds", found, {"fold": folds}, items)

    def baselines(self) -> dict[str, float]:
        counts = Counter(row.label for row in self.truth().values())
        return {"one class always": max(counts.values()) / counts.total()}


def read_classes(official: Files) -> list[Class]:
    """Classes in the order of their numbers."""
    rows = official.table(CLASSES, Class)
    for i, (place, row) in enumerate(rows):
        if row.get("index", i) != i:
            raise ValueError(f"{place}, index: {row['index']} instead of {i}; put them in order")
    unique((place, row["mid"]) for place, row in rows)
    return [row for _, row in rows]


def read_segments(official: Files, name: str) -> dict[str, list[str]] | None:
    """Labels by id of an official table of clips; None if it is not there."""
    if not (official.folder / name).is_file():
        return None

    def fits(row: list[str]) -> bool:
        return len(row) == 4 and all(row)

    rows = official.cells(name, fits, "4 fields: id, start, end, labels")
    unique((place, row[0]) for place, row in rows)
    return {key: [mid.strip() for mid in mids.split(",")] for _, (key, _, _, mids) in rows}


def read_events(official: Files, name: str) -> dict[str, list[str]]:
    """Labels by id of an official table of events: those that occur anywhere in a clip."""
    need(official.folder, {name: "events"}, AUDIOSET_PAGES)
    found: dict[str, dict[str, None]] = {}
    for _, row in official.table(name, Event):
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
