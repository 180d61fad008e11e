"""Labelled clips in the files people have them in: sounds, tars, HDF5, parquet, saved datasets.

`index` walks over all clips of a split and tells what each is called and labelled; `load` fetches
the sound of one. Only names and labels are held, so a set of any size is read clip by clip, in the
order of the files, and any part of it may be skipped.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from goose_mm.audio import as_waveform, load_audio

SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
NAMES = ("video_id", "ytid", "id", "audio_name", "filename")  # columns, the first that is there
LABELS = ("labels", "human_labels")
INT16 = 32767  # PANNs' full scale
ROWS = 4096  # of labels that are read at once


class Clip(NamedTuple):
    """One clip of a file. Labels are mids, display names or class numbers; None: not told."""

    name: str  # without folder and ending
    labels: tuple[Any, ...] | None
    file: Path
    at: int = 0  # tar: where its bytes begin; elsewhere its row
    size: int = 0  # tar: how many they are


def files_of(data: Path, split: str) -> list[Path]:
    """Files that hold a split: all in the folder `split`, and those called `split` or `split-...`.

    A folder that `datasets` saved counts as one file.
    """
    folder = data / split
    if (folder / "state.json").is_file():
        return [folder]
    inside = folder.iterdir() if folder.is_dir() else iter(())
    beside = data.glob(f"{split}[.-]*")
    return sorted(file for file in chain(inside, beside) if file.suffix.lower() in READERS)


def index(files: Iterable[Path]) -> Iterator[Clip]:
    """Every clip of some files. ValueError if one is damaged or not laid out as it should be."""
    for file in files:
        yield from (_saved_clips if file.is_dir() else READERS[file.suffix.lower()])(file)


def load(clip: Clip) -> tuple[Path | bytes | np.ndarray, int | None]:
    """The sound: a file, the bytes of a file, or samples with their rate in Hz."""
    if clip.file.is_dir():
        return _held(_saved(clip.file)[clip.at]["audio"], clip), None
    match clip.file.suffix.lower():
        case ".tar":
            with clip.file.open("rb") as file:
                file.seek(clip.at)
                return file.read(clip.size), None
        case ".h5" | ".hdf5":
            found = _hdf5(clip.file)
            samples = found["waveform"][clip.at].astype(np.float32) / INT16
            return samples, int(found.attrs["sample_rate"])
        case ".parquet":
            group, row = _place(clip.file, clip.at)
            return _held(_row_group(clip.file, group)[row].as_py(), clip), None
    return clip.file, None


def waveform(
    sound: Path | bytes | np.ndarray, rate: int | None, name: str, sample_rate: int
) -> np.ndarray:
    """Mono samples [samples] at `sample_rate` of what `load` gave.

    Raises ValueError when the sound cannot be decoded; `name` says which it is.
    """
    if isinstance(sound, np.ndarray):
        return as_waveform(sound, float(rate or 0), sample_rate, name)
    return load_audio(sound, sample_rate, name)


def stem(name: str) -> str:
    """A file's name without folder and, if it is that of a sound, ending."""
    base = os.path.basename(name)
    plain, ending = os.path.splitext(base)
    return plain if ending.lower() in SOUNDS else base


def _sound(file: Path) -> Iterator[Clip]:
    yield Clip(file.stem, None, file)


def _tar_clips(file: Path) -> Iterator[Clip]:
    """webdataset: the files of a clip follow each other and share the name before the first dot."""
    key, sound, labels = "", None, None
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, base = os.path.split(member.name)
                name, _, ending = base.partition(".")
                if os.path.join(folder, name) != key:
                    if sound:
                        yield sound._replace(labels=labels)
                    key, sound, labels = os.path.join(folder, name), None, None
                if f".{ending.lower()}" in SOUNDS:
                    sound = Clip(name, None, file, member.offset_data, member.size)
                elif ending.lower() == "json":
                    labels = _told(json.load(tar.extractfile(member)), f"{member.name} in {file}")  # type: ignore[arg-type]
                tar.members.clear()  # type: ignore[missing-attribute]  # else it keeps every header
    except (tarfile.TarError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} is damaged or no plain tar ({error}); unpack or repack it"
        ) from None
    if sound:
        yield sound._replace(labels=labels)


def _told(values: Any, where: str) -> tuple[Any, ...] | None:
    """The labels of a JSON object or a row: a list, or mids in one string with commas."""
    found = values.get("labels") if isinstance(values, dict) else None
    if found is None:
        return None
    labels = found.split(",") if isinstance(found, str) else found
    if not isinstance(labels, list) or not all(isinstance(label, str | int) for label in labels):
        raise ValueError(f"{where}: labels must be a list of names or numbers, not {found!r}")
    return tuple(labels)


@lru_cache(maxsize=8)
def _hdf5(file: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{file} needs h5py, which is not installed: pip install h5py") from None
    try:
        found = h5py.File(file)
    except OSError as error:
        raise ValueError(f"{file} is damaged or no HDF5: {error}") from None
    lacking = [name for name in ("audio_name", "waveform", "target") if name not in found]
    if lacking or "sample_rate" not in found.attrs:
        raise ValueError(
            f"{file} lacks {', '.join(lacking) or 'the attribute sample_rate'}; it must be packed "
            "as PANNs does: audio_name, waveform (int16), target (bool), sample_rate"
        )
    return found


def _hdf5_clips(file: Path) -> Iterator[Clip]:
    found = _hdf5(file)
    for start in range(0, len(found["audio_name"]), ROWS):
        some = slice(start, start + ROWS)
        rows = zip(found["audio_name"][some], found["target"][some], strict=True)
        for row, (name, target) in enumerate(rows, start):
            yield Clip(stem(name.decode()), tuple(np.flatnonzero(target).tolist()), file, row)


@lru_cache(maxsize=8)
def _parquet(file: Path) -> Any:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(file)
    except ArrowInvalid as error:
        raise ValueError(f"{file} is damaged or no parquet: {error}") from None


@lru_cache(maxsize=2)
def _row_group(file: Path, group: int) -> Any:
    return _parquet(file).read_row_group(group, columns=["audio"])["audio"]


def _place(file: Path, row: int) -> tuple[int, int]:
    """Group and place in it of a row."""
    metadata = _parquet(file).metadata
    for group in range(metadata.num_row_groups):
        if row < (rows := metadata.row_group(group).num_rows):
            return group, row
        row -= rows
    raise IndexError(row)


def _parquet_clips(file: Path) -> Iterator[Clip]:
    found = _parquet(file)
    name, labels = _columns(found.schema_arrow.names, file)
    columns = [name or "audio.path", *([labels] if labels else [])]
    rows = (row for batch in found.iter_batches(columns=columns) for row in batch.to_pylist())
    yield from _rows(rows, name, labels, file)


@lru_cache(maxsize=8)
def _saved(folder: Path) -> Any:
    from datasets import Audio, load_from_disk

    found = load_from_disk(str(folder))
    if "audio" not in found.column_names:  # as in _columns, which says so
        return found
    return found.cast_column("audio", Audio(decode=False))


def _saved_clips(folder: Path) -> Iterator[Clip]:
    found = _saved(folder)
    name, labels = _columns(found.column_names, folder)
    kept = [column for column in (name or "audio", labels) if column]
    yield from _rows(found.select_columns(kept), name, labels, folder)


def _columns(names: list[str], file: Path) -> tuple[str | None, str | None]:
    """The columns of names and labels, if there are any. ValueError without one of sounds."""
    if "audio" not in names:
        raise ValueError(f"{file} has no column audio; it has {', '.join(names)}")
    name = next((column for column in NAMES if column in names), None)
    return name, next((column for column in LABELS if column in names), None)


def _rows(
    rows: Iterable[dict[str, Any]], name: str | None, labels: str | None, file: Path
) -> Iterator[Clip]:
    for at, row in enumerate(rows):
        called = row[name] if name else row["audio"]["path"]
        if not called:
            raise ValueError(f"{file}: row {at} has no name; add a column {NAMES[0]}")
        told = _told({"labels": row[labels] if labels else None}, f"row {at} of {file}")
        yield Clip(stem(str(called)), told, file, at)


def _held(sound: dict[str, Any], clip: Clip) -> Path | bytes:
    """An undecoded `Audio` of `datasets`: bytes, or else the path of a file."""
    if sound["bytes"] is not None:
        return sound["bytes"]
    folder = clip.file.parent.resolve()
    file = (folder / (sound["path"] or "")).resolve()
    if not file.is_relative_to(folder):
        raise ValueError(
            f"{clip.name} in {clip.file} is said to lie at {file}, outside of {folder}; put the "
            "sounds beside the table, or their bytes into it"
        )
    if not file.is_file():
        raise ValueError(f"{clip.name} in {clip.file} has neither bytes nor a file at {file}")
    return file


READERS: dict[str, Callable[[Path], Iterator[Clip]]] = {
    **dict.fromkeys(SOUNDS, _sound),
    ".tar": _tar_clips,
    ".h5": _hdf5_clips,
    ".hdf5": _hdf5_clips,
    ".parquet": _parquet_clips,
}
