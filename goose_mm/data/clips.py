"""Labelled clips in folds: training batches, and accuracy on the fold that is kept out.

A folder holds meta.csv with the columns filename, fold and label; a checkout of ESC-50 with its
own meta/esc50.csv is read as well. All clips are decoded once into memory.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from goose_mm.audio import AudioRWKV7, as_waveform, load_audio
from goose_mm.config import AudioConfig, ClipData

SPEEDS = (0.8, 0.86, 0.93, 1.0, 1.08, 1.16, 1.25)  # tempo and pitch together, like a tape
ROLL_SHARE = 0.5  # of the training crops come from a clip turned in time
SHORT_SHARE, SHORTEST = 0.5, 0.3  # share of shorter crops, and how short
LOUD_BLOCK = 0.02  # seconds
LOUD_HELD = 0.1  # seconds from a loud block on that a crop must hold
LOUD_RANGE = 1e-3  # power relative to the loudest block: 30 dB
ESC50_NAMES = {  # category in meta/esc50.csv: label of ESC-10
    "crackling_fire": "fire_crackling",
    "crying_baby": "baby_cry",
    "dog": "dog_bark",
    "sneezing": "person_sneeze",
}
NAMED = 20  # bad clips in one report

WHERE = (
    "give a folder with meta.csv (filename, fold, label), or a checkout of ESC-50 by Karol J. "
    "Piczak (repository karolpiczak/ESC-50 on GitHub), which contains ESC-10"
)

log = logging.getLogger(__name__)


class Row(NamedTuple):
    file: Path
    fold: int
    label: str


class Take(NamedTuple):
    """A waveform at one speed, and where its blocks within 30 dB of the loudest begin."""

    waveform: np.ndarray
    loud: np.ndarray


class Clips:
    """Crops of labelled clips with instructions for their augmentation.

    Data contract: `batch(step)` is a pure function of seed and step; `evaluate(model)` scores the
    clips of `config.test_fold`, which are in no batch. `labels` are those of the model, or
    every label found when it names none.
    """

    def __init__(self, config: ClipData, audio: AudioConfig, batch_size: int, seed: int) -> None:
        self.config, self.rate = config, audio.sample_rate
        self.batch_size, self.seed = batch_size, seed
        folder = Path(config.path) if config.path else None
        rows = read_rows(folder, audio.labels, must_exist=False)
        self.labels = audio.labels or tuple(sorted({row.label for row in rows}))
        if unknown := {row.label for row in rows} - set(self.labels):
            raise ValueError(
                f"{config.path}: labels {', '.join(sorted(unknown))} are not among audio.labels"
            )
        folds = sorted({row.fold for row in rows})
        if config.test_fold and config.test_fold not in folds:
            raise ValueError(f"data.test_fold={config.test_fold} is not one of the folds {folds}")
        self.waveforms = load_clips(rows, self.rate, config.skip_bad)
        rows = [row for row in rows if row.file in self.waveforms]
        self.training = [row for row in rows if row.fold != config.test_fold]
        self.held_out = [row for row in rows if row.fold == config.test_fold]
        if not self.training:
            raise ValueError(f"{config.path}: every clip is in test fold {config.test_fold}")
        if config.test_fold and not self.held_out:
            raise ValueError(f"{config.path}: no clip of test fold {config.test_fold} is left")
        self._takes: dict[tuple[int, float], Take] = {}

    def batch(self, step: int) -> dict[str, Tensor]:
        """What `AudioRWKV7.loss` takes: "waveform" [B,S], "length" [B], "target" [B,labels], and
        "partner" [B], "ratio" [B], "seed" and "strength" for the augmentation on the device."""
        random = np.random.default_rng((self.seed, step))
        count, batch = len(self.training), self.batch_size
        chosen = np.concatenate([random.permutation(count) for _ in range(-(-batch // count))])
        size = round(self.config.seconds * self.rate)
        waveform, length = np.zeros((batch, size), np.float32), np.zeros(batch, np.int64)
        smooth = self.config.label_smoothing / len(self.labels)
        target = np.full((batch, len(self.labels)), smooth, np.float32)
        for row, index in enumerate(chosen[:batch]):
            speed = random.choice(SPEEDS) if self.config.augment else 1.0
            crop = self._crop(self._take(int(index), float(speed)), size, random)
            waveform[row, : len(crop)], length[row] = crop, len(crop)
            label = self.labels.index(self.training[index].label)
            target[row, label] += 1 - self.config.label_smoothing
        mixed = random.random(batch) < self.config.mixup
        ratio = np.where(mixed, random.beta(10, 10, batch), 1.0).astype(np.float32)
        return {
            "waveform": torch.from_numpy(waveform),
            "length": torch.from_numpy(length),
            "target": torch.from_numpy(target),
            "partner": torch.from_numpy(random.permutation(batch)),
            "ratio": torch.from_numpy(ratio),
            "seed": torch.tensor(int(random.integers(2**62))),
            "strength": torch.tensor(self.config.augment),
        }

    def evaluate(self, model: AudioRWKV7) -> dict[str, float]:
        """`accuracy` of the most likely tag and `map`, over the held-out fold if there is one."""
        if not self.held_out:
            return {}
        clips = [self.waveforms[row.file] for row in self.held_out]
        scores = model.probabilities(clips).numpy()
        truth = np.array([self.labels.index(row.label) for row in self.held_out])
        return {
            "accuracy": float((scores.argmax(1) == truth).mean()),
            "map": mean_average_precision(scores, np.eye(len(self.labels), dtype=bool)[truth]),
        }

    def _take(self, index: int, speed: float) -> Take:
        """A clip at one speed, resampled when it is first asked for."""
        if (index, speed) not in self._takes:
            clip = self.waveforms[self.training[index].file]
            clip = as_waveform(clip, self.rate * speed, self.rate)
            block = round(LOUD_BLOCK * self.rate)
            blocks = np.pad(clip, (0, -len(clip) % block)).reshape(-1, block)
            power = np.square(blocks).sum(1)
            loud = np.flatnonzero(power >= LOUD_RANGE * power.max()) * block
            self._takes[index, speed] = Take(clip, loud)
        return self._takes[index, speed]

    def _crop(self, take: Take, size: int, random: np.random.Generator) -> np.ndarray:
        """A stretch that holds some of the clip's loud part: never a label on mere silence."""
        clip, loud = take
        if self.config.augment and random.random() < ROLL_SHARE:
            shift = int(random.integers(len(clip)))
            clip, loud = np.roll(clip, shift), (loud + shift) % len(clip)
        if self.config.augment and random.random() < SHORT_SHARE:
            size = round(size * random.uniform(SHORTEST, 1.0))
        size = min(size, len(clip))
        anchor = int(random.choice(loud))
        last = min(anchor, len(clip) - size)
        first = min(last, max(0, anchor + round(LOUD_HELD * self.rate) - size))
        start = int(random.integers(first, last + 1))
        return clip[start : start + size]


def load_clips(rows: list[Row], sample_rate: int, skip_bad: bool) -> dict[Path, np.ndarray]:
    """The waveform of every clip. ValueError that names all bad ones, unless they are skipped."""
    waveforms, bad, hint = {}, [], ""
    for row in rows:
        try:
            waveforms[row.file] = load_audio(row.file, sample_rate)
        except (ValueError, OSError) as error:
            bad.append(str(error))
            hint = f"; {WHERE}" if isinstance(error, FileNotFoundError) else hint
    if bad and not skip_bad:
        more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise ValueError(
            f"{len(bad)} of {len(rows)} clips cannot be used: {'; '.join(bad[:NAMED])}{more}; mend "
            f"them, or leave them out with --data.skip-bad{hint}"
        )
    for reason in bad:
        log.warning("left out: %s", reason)
    if not waveforms:
        raise ValueError(f"none of {len(rows)} clips can be used, such as {rows[0].file}")
    return waveforms


def read_rows(folder: Path | None, labels: tuple[str, ...], must_exist: bool = True) -> list[Row]:
    """The clips that a folder lists; of ESC-50, those that carry one of `labels`.

    Raises ValueError when there is no list or it cannot be used, FileNotFoundError when clips
    that it names are absent though they `must_exist`.
    """
    if folder is None or not folder.is_dir():
        raise ValueError(f"no folder of clips at {str(folder or 'data.path')!r}: {WHERE}")
    if (folder / "meta.csv").is_file():
        table = folder / "meta.csv"
        rows = _read(table, folder, "label")
    elif (folder / "meta" / "esc50.csv").is_file():
        table = folder / "meta" / "esc50.csv"
        found = _read(table, folder / "audio", "category")
        named = (row._replace(label=ESC50_NAMES.get(row.label, row.label)) for row in found)
        rows = [row for row in named if not labels or row.label in labels]
    else:
        raise ValueError(f"{folder} has neither meta.csv nor meta/esc50.csv: {WHERE}")
    if not rows:
        raise ValueError(f"{table} lists no clips with the labels of the model")
    missing = [row.file for row in rows if must_exist and not row.file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(rows)} clips in {table} are missing, such as {missing[0]}: "
            f"{WHERE}"
        )
    return rows


def _read(table: Path, folder: Path, label: str) -> list[Row]:
    """The rows of a table, each clip once. ValueError names the line that cannot be used."""
    columns = ("filename", "fold", label)
    rows: dict[str, tuple[int, Row]] = {}
    for line, cells in _cells(table, columns):
        name, fold, called = (cells[column] for column in columns)
        if not fold.isdecimal() or not int(fold):
            raise ValueError(f"{table}, line {line}: fold must be 1 or more, got {fold!r}")
        if not name or not called:
            raise ValueError(f"{table}, line {line}: {label if name else 'filename'} is empty")
        row = Row(folder / name, int(fold), called)
        before, same = rows.setdefault(os.path.normpath(row.file), (line, row))
        if same[1:] != row[1:]:
            raise ValueError(
                f"{table}: {name} stands in line {before} (fold {same.fold}, {same.label}) and in "
                f"line {line} (fold {fold}, {called}); a clip has one fold and one label"
            )
    return [row for _, row in rows.values()]


def _cells(table: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, cell by column) of a table whose cells , or ; or tabs separate."""
    data = table.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{table}, line {line}: this is not UTF-8 text; save it as such") from None
    lines = re.split("\r\n|\r|\n", text)
    heading = next((line for line in lines if line.strip()), "")
    separator = max(",;\t", key=heading.count)
    header: list[str] = []
    for number, line in enumerate(lines, 1):
        try:
            row = next(csv.reader([line], delimiter=separator, strict=True), [])
        except csv.Error as error:
            raise ValueError(f"{table}, line {number}: {error}") from None
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if not header:
            header = [cell.casefold() for cell in cells]
            if lacking := set(columns) - set(header):
                raise ValueError(f"{table} lacks the columns {', '.join(sorted(lacking))}")
            continue
        found = dict(zip(header, cells, strict=False))
        if not found.keys() >= set(columns) or any(cells[len(header) :]):
            raise ValueError(
                f"{table}, line {number}: {len(cells)} cells, but the heading has {len(header)}; "
                f"put quotes around a cell that holds {separator!r}"
            )
        yield number, found
    if not header:
        raise ValueError(f"{table} is empty")


def mean_average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """Unweighted mean over labels [n, labels] that occur; equal scores are one threshold."""
    precisions = []
    for score, true in zip(scores.T, truth.T, strict=True):
        if not true.any():
            continue
        _, group = np.unique(-score, return_inverse=True)
        taken = np.bincount(group).cumsum()
        hits = np.bincount(group, weights=true)
        precisions.append(float((hits * (hits.cumsum() / taken)).sum() / true.sum()))
    return float(np.mean(precisions))
