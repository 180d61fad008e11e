"""AudioSet in every layout: the same clips give the same report, whole, sharded or interrupted."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import sys
import tarfile
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import soundfile

from goose_mm.cli import main
from goose_mm.eval.command import open_task
from goose_mm.eval.tasks import clip_files
from goose_mm.eval.tasks.task import TaskOptions
from goose_mm.hub import load

RATE, SAMPLES = 16000, 8000
LABELS = load("goose-tiny-audio").labels
MIDS = [f"/m/{i}" for i in range(len(LABELS))]
# id, and the classes that are in it
CLIPS = {
    "-abcdefghij": [0, 1],
    "aaaaaaaaaaa": [2],
    "bbbbbbbbbbb": [1, 3],
    "Yyyyyyyyyyy": [0],
    "ccccccccccc": [4, 2],
}
HDF5 = "CI" in os.environ or find_spec("h5py")  # CI installs it
h5 = pytest.mark.skipif(not HDF5, reason="h5py is not installed: pip install h5py")


def pcm(i: int) -> np.ndarray:
    """Noise in bands that differ from clip to clip, int16."""
    random = np.random.default_rng(i)
    time = np.arange(SAMPLES) / RATE
    tone = np.sin(2 * np.pi * (200 + 700 * i) * time * (1 + time))
    return ((0.3 * tone + 0.1 * random.standard_normal(SAMPLES)) * 20000).astype(np.int16)


def encoded(i: int, kind: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, pcm(i), RATE, format=kind, subtype="PCM_16")
    return file.getvalue()


def sounds(data: Path) -> None:
    (data / "eval").mkdir()
    for i, key in enumerate(CLIPS):
        kind = "wav" if i % 2 else "flac"
        prefix = "Y" if i < 2 else ""
        (data / "eval" / f"{prefix}{key}.{kind}").write_bytes(encoded(i, kind))


def tars(data: Path) -> None:
    """Two shards; once the JSON comes first, once the sound."""
    for shard in range(2):
        with tarfile.open(data / f"eval-{shard:04d}.tar", "w") as tar:
            for i, (key, classes) in enumerate(CLIPS.items()):
                if i % 2 != shard:
                    continue
                parts = {
                    "flac": encoded(i, "flac"),
                    "json": json.dumps({"labels": [MIDS[c] for c in classes]}).encode(),
                }
                for ending in sorted(parts, reverse=bool(shard)):
                    member = tarfile.TarInfo(f"some/{key}.{ending}")
                    member.size = len(parts[ending])
                    tar.addfile(member, io.BytesIO(parts[ending]))


def hdf5(data: Path) -> None:
    """As PANNs packs: Y before the id, samples times 32767, targets as bools."""
    import h5py

    (data / "eval").mkdir()
    with h5py.File(data / "eval" / "eval.h5", "w") as file:
        names = [f"Y{key}.wav".encode() for key in CLIPS]
        targets = np.zeros((len(CLIPS), len(LABELS)), bool)
        for row, classes in enumerate(CLIPS.values()):
            targets[row, classes] = True
        waves = np.stack([pcm(i) for i in range(len(CLIPS))]) / 32768
        file.create_dataset("audio_name", data=np.array(names, "S20"))
        file.create_dataset("waveform", data=np.round(waves * 32767).astype(np.int16))
        file.create_dataset("target", data=targets)
        file.attrs["sample_rate"] = RATE


def rows():
    from datasets import Audio, Dataset, Features, List, Value

    made = [
        {
            "video_id": key,
            "audio": {"bytes": encoded(i, "wav"), "path": None},
            "labels": [MIDS[c] for c in classes],
        }
        for i, (key, classes) in enumerate(CLIPS.items())
    ]
    kinds = {
        "video_id": Value("string"),
        "audio": {"bytes": Value("binary"), "path": Value("string")},
        "labels": List(Value("string")),
    }
    plain = Dataset.from_list(made, features=Features(kinds))
    return plain.cast_column("audio", Audio(decode=False))


def parquet(data: Path) -> None:
    """Row groups of two: a clip is not found by its row alone."""
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        rows().data.table, data / "eval-00000-of-00001.parquet", row_group_size=2
    )


def saved(data: Path) -> None:
    rows().save_to_disk(str(data / "eval"))


LAYOUTS = [sounds, tars, pytest.param(hdf5, marks=h5), parquet, saved]


def audioset(data: Path, layout, table: bool = True) -> Path:
    data.mkdir()
    with (data / "class_labels_indices.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "mid", "display_name"])
        writer.writerows(zip(range(len(LABELS)), MIDS, LABELS, strict=True))
    if table:
        lines = ["# a", "# b", "# c"]
        for key, classes in [*CLIPS.items(), ("gone_gone_g", [0])]:
            lines.append(f'{key}, 0.0, 10.0, "{",".join(MIDS[c] for c in classes)}"')
        (data / "eval_segments.csv").write_text("\n".join(lines) + "\n")
    layout(data)
    return data


def run(data: Path, out: Path, *more: str) -> int:
    return main(
        ["eval", "audioset", "--data", str(data), "--out", str(out), "--device", "cpu", *more]
    )


def report(out: Path) -> str:
    return (out / "report.json").read_text()


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> dict[bool, str]:
    """The report of plain sound files, with and without a clip that the table alone knows."""
    found = {}
    for missing in (True, False):
        folder = tmp_path_factory.mktemp("usual")
        data = audioset(folder / "data", sounds)
        if not missing:
            table = data / "eval_segments.csv"
            table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
        assert run(data, folder / "out") == 0
        found[missing] = report(folder / "out")
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_clips_give_the_same_report_in_every_layout(layout, usual, tmp_path):
    assert run(audioset(tmp_path / "data", layout), tmp_path / "out") == 0
    assert report(tmp_path / "out") == usual[True]
    settings = json.loads(usual[True])["settings"]
    assert (settings["clips listed"], settings["clips found"]) == (6, 5)
    if layout is not sounds:  # whose labels stand in the table alone
        assert run(audioset(tmp_path / "bare", layout, table=False), tmp_path / "other") == 0
        assert report(tmp_path / "other") == usual[False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_clip_is_read_once_in_shards_and_after_a_kill(layout, usual, tmp_path, monkeypatch):
    read = []
    fetch = clip_files.load
    monkeypatch.setattr(clip_files, "load", lambda clip: read.append(clip.name) or fetch(clip))
    data = audioset(tmp_path / "data", layout)
    for shard in ("0/2", "1/2"):
        assert run(data, tmp_path / "shared", "--shard", shard) == 0
    assert report(tmp_path / "shared") == usual[True]
    assert len(read) == len(set(read)) == len(CLIPS)
    file = tmp_path / "shared" / "predictions-0-of-2.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][: len(lines[1]) // 2])
    (tmp_path / "shared" / "report.json").unlink()
    read.clear()
    assert run(data, tmp_path / "shared", "--shard", "0/2") == 0
    assert report(tmp_path / "shared") == usual[True]
    assert len(read) == len(set(read)) == len(lines)  # one batch, which is predicted whole


def test_waveforms_are_those_of_the_files(tmp_path):
    for layout in (sounds, tars, parquet, saved, *([hdf5] if HDF5 else [])):
        task = open_task("audioset", audioset(tmp_path / layout.__name__, layout), TaskOptions())
        assert sorted(task.clips) == sorted(CLIPS)
        for i, key in enumerate(CLIPS):
            sound, rate = clip_files.load(task.clips[key])
            if layout is sounds:
                sound, rate = soundfile.read(sound)
            elif layout is not hdf5:
                sound, rate = soundfile.read(io.BytesIO(sound))
            assert rate == RATE
            np.testing.assert_allclose(sound, pcm(i) / 32768, atol=2e-5)
            assert set(np.flatnonzero(task.targets[task.order.index(key)])) == set(CLIPS[key])


def test_strong_labels_of_a_clip_are_the_union_of_its_events(tmp_path):
    data = audioset(tmp_path / "data", sounds)
    lines = ["segment_id\tstart_time_seconds\tend_time_seconds\tlabel"]
    for key, classes in CLIPS.items():
        for c in [*classes, *classes]:
            lines.append(f"{key}_30000\t0.1\t2.5\t{MIDS[c]}")
    lines.append("aaaaaaaaaaa_30000\t0.0\t1.0\t/t/dd00001")  # strong labels have more classes
    (data / "audioset_eval_strong.tsv").write_text("\n".join(lines) + "\n")
    task = open_task("audioset", data, TaskOptions(split="eval_strong"))
    assert task.order == sorted(f"{key}_30000" for key in CLIPS)
    for row, key in zip(task.targets, task.order, strict=True):
        assert set(np.flatnonzero(row)) == set(CLIPS[key.removesuffix("_30000")])
    assert task.settings["labels of no class"] == 1
    assert task.settings["labels"] == "events of a clip, united"


def test_what_is_missing_or_broken_is_one_line(tmp_path, capsys, monkeypatch):
    outs = (tmp_path / f"out{i}" for i in count())  # a folder holds what was done of one set

    def complaint(data: Path, *more: str) -> str:
        assert run(data, next(outs), *more) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    def broken(name: str, layout, change=lambda content: content[:700]) -> Path:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        data = audioset(tmp_path / "data", layout)
        file = data / name
        file.write_bytes(change(file.read_bytes()))
        return data

    nothing = tmp_path / "nothing"
    nothing.mkdir()
    said = complaint(nothing)
    for part in ("class_labels_indices.csv (classes)", "eval_segments.csv (labels)", "eval (clips"):
        assert part in said
    assert "research.google.com/audioset/download.html" in said and "put them there" in said
    empty = audioset(tmp_path / "empty", lambda data: (data / "eval").mkdir())
    assert "eval is empty: clips in eval/ or eval-*: sounds, .tar" in complaint(empty)
    plain = audioset(tmp_path / "plain", sounds)
    assert "audioset_eval_strong.tsv (events)" in complaint(plain, "--split", "eval_strong")
    bare = audioset(tmp_path / "bare", sounds, table=False)
    assert "tells no labels: put eval_segments.csv there" in complaint(bare)
    assert "damaged or no plain tar" in complaint(broken("eval-0001.tar", tars))
    assert "damaged or no parquet" in complaint(broken("eval-00000-of-00001.parquet", parquet))
    assert "Yaaaaaaaaaaa.wav" in complaint(
        broken("eval/Yaaaaaaaaaaa.wav", sounds, lambda content: content[:30])
    )
    said = complaint(
        broken("eval-0000.tar", tars, lambda content: content.replace(b"fLaC", b"gone"))
    )
    assert "eval-0000.tar: cannot decode" in said
    monkeypatch.setitem(sys.modules, "h5py", None)
    (nothing / "eval").mkdir()
    shutil.copy(bare / "class_labels_indices.csv", nothing)
    (nothing / "eval" / "x.h5").touch()
    assert "pip install h5py" in complaint(nothing)


@h5
def test_other_hdf5_says_what_it_lacks(tmp_path):
    import h5py

    def other(data):
        with h5py.File(data / "eval.h5", "w") as file:
            file["mp3"] = np.zeros(3)

    with pytest.raises(ValueError, match=r"lacks audio_name, waveform, target; .* as PANNs does"):
        open_task("audioset", audioset(tmp_path / "data", other), TaskOptions())


def test_a_table_cannot_name_a_sound_outside_of_its_folder(tmp_path):
    from datasets import Dataset

    (tmp_path / "data").mkdir()
    (tmp_path / "secret.wav").write_bytes(encoded(0, "wav"))
    for path in ("../secret.wav", str(tmp_path / "secret.wav")):
        rows = {"id": ["a"], "audio": [{"bytes": None, "path": path}]}
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / "eval.parquet")
        (clip,) = clip_files.index(clip_files.files_of(tmp_path / "data", "eval"))
        with pytest.raises(ValueError, match=r"outside of .*put the sounds beside the table"):
            clip_files.load(clip)
