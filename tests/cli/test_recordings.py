"""`tag` with what people have: one bad file loses no other, pipes, odd names, long files."""

import io
import json
import os
import sys

import numpy as np
import pytest
import soundfile

from goose_mm import checkpoint, cli, hub
from goose_mm.audio import load_audio
from goose_mm.cli import recordings
from goose_mm.config import AudioConfig, AudioModel, BackboneConfig

RATE = 16000


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    backbone = BackboneConfig(dim=32, num_layers=1, head_size=16)
    config = AudioModel(backbone=backbone, audio=AudioConfig(labels=("bell", "rain")))
    checkpoint.save_model(folder, config, hub.build_model(config).state_dict())
    return str(folder)


@pytest.fixture
def clip(tmp_path) -> str:
    path = str(tmp_path / "clip.flac")
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, RATE), RATE)
    return path


@pytest.fixture
def bad(tmp_path) -> str:
    (tmp_path / "bad.wav").write_text("no sound")
    return str(tmp_path / "bad.wav")


def test_a_bad_recording_loses_no_other(model, clip, bad, capsys):
    files = [clip, bad, "absent.wav", clip]
    assert cli.main(["tag", *files, "--model", model]) == 2
    out, err = capsys.readouterr()
    assert out.count(f"{clip}:\n") == 2 and out.count("\n") == 6
    first, second = err.splitlines()
    assert first.startswith(f"goose-mm: {bad}: cannot decode")
    assert second == "goose-mm: absent.wav: no such file"

    assert cli.main(["tag", *files, "--model", model, "--json"]) == 2
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["audio"] for row in rows] == files
    assert [("tags" in row, "error" in row) for row in rows] == [(1, 0), (0, 1), (0, 1), (1, 0)]
    assert rows[1]["error"] in first


def test_remarks_go_to_stderr_in_a_line_each(model, tmp_path, capsys):
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 1)) * [1, -1]
    soundfile.write(tmp_path / "a.wav", stereo, RATE)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:40_000])
    assert cli.main(["tag", str(tmp_path / "a.wav"), "--model", model]) == 0
    out, err = capsys.readouterr()
    phase, damage = err.splitlines()
    assert out.count("\n") == 2 and "opposite phase" in phase and "damaged" in damage
    assert all(line.startswith(f"goose-mm: {tmp_path / 'a.wav'}: ") for line in (phase, damage))


def test_a_name_that_is_not_utf8(model, clip, tmp_path, capsys):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve.flac")
    os.rename(clip, name)
    for flag in ([], ["--json"]):
        assert cli.main(["tag", name, name, "--model", model, *flag]) == 0
        out, err = capsys.readouterr()
        assert out.count(r"na\udcefve.flac") == 2 and err == ""
        assert not flag or json.loads(out.splitlines()[0])["audio"] == name


class Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


def test_a_pipe(model, clip, monkeypatch, capsys):
    with open(clip, "rb") as file:
        for data, code, lines, said in (
            (file.read(), 0, 2, ""),
            (b"", 2, 0, "goose-mm: stdin is empty (0 bytes)\n"),
        ):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe(data)))
            assert cli.main(["tag", "-", "--model", model]) == code
            out, err = capsys.readouterr()
            assert (out.count("\n"), err) == (lines, said)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_takes_long_shows_how_far_it_is(clip, monkeypatch):
    monkeypatch.setattr(recordings, "PATIENCE", 0.0)
    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", terminal)
        with recordings.watched(clip) as file:
            assert len(load_audio(file, RATE)) == RATE
            assert file.bar.disable or file.bar.n == os.path.getsize(clip)
        assert ("clip.flac: " in terminal.getvalue()) == terminal.isatty()
