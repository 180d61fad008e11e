"""Decoding: what is read, what it becomes, and one clear line for everything else."""

import os
import stat
import sys

import numpy as np
import pytest
import soundfile
import soxr
import torch

from goose_mm.audio import as_waveform, load_audio, read_blocks
from goose_mm.audio.decode import BLOCK

RATE = 16000


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def test_channels_are_averaged(tmp_path):
    stereo = noise(1000, 2)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    got = load_audio(tmp_path / "a.wav", RATE)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, stereo.mean(1), atol=1e-7)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "aiff"])
def test_formats(tmp_path, suffix):
    tone = 0.5 * np.sin(np.arange(RATE) * 2 * np.pi * 440 / RATE).astype(np.float32)
    soundfile.write(tmp_path / f"tone.{suffix}", tone, RATE)
    got = load_audio(tmp_path / f"tone.{suffix}", RATE)
    assert abs(len(got) - RATE) <= 1 and np.abs(got[:RATE] - tone[: len(got)]).max() < 0.1


def test_blocks_resample_as_the_whole(tmp_path):
    sound = noise(3 * BLOCK + 17)
    soundfile.write(tmp_path / "a.wav", sound, 44100, subtype="FLOAT")
    blocks = list(read_blocks(tmp_path / "a.wav", RATE))
    assert len(blocks) > 3 and max(map(len, blocks)) <= BLOCK
    whole = soxr.resample(sound, 44100, RATE, quality="HQ")
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    np.testing.assert_array_equal(as_waveform(sound, 44100, RATE), whole)


def test_eight_channels_at_192_khz(tmp_path):
    soundfile.write(tmp_path / "a.wav", noise(19200, 8), 192_000)
    assert len(load_audio(tmp_path / "a.wav", RATE)) == 1600


@pytest.mark.parametrize("rate", [8000, RATE, 192_000])
def test_one_sample_is_sound(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.array([0.25], np.float32), rate)
    assert 1 <= len(load_audio(tmp_path / "a.wav", RATE)) <= 2


def test_float_above_full_scale_is_kept(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.full(500, 3.5, np.float32), RATE, subtype="FLOAT")
    assert load_audio(tmp_path / "a.wav", RATE).max() == 3.5


def test_path_that_looks_like_an_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("-0DdlOuIFUI.wav", "wb") as file:
        soundfile.write(file, noise(100), RATE, format="wav")
    assert len(load_audio("-0DdlOuIFUI.wav", RATE)) == 100


@pytest.mark.parametrize(
    "array",
    [
        np.array([16384, -32768], np.int16),
        np.array([2**30, -(2**31)], np.int32),
        np.array([192, 0], np.uint8),
        np.array([0.5, -1.0], np.float64),
        torch.tensor([0.5, -1.0], dtype=torch.bfloat16),
        torch.tensor([0.5, -1.0], requires_grad=True),
        [0.5, -1.0],
    ],
)
def test_full_scale_of_every_type(array):
    np.testing.assert_array_equal(as_waveform(array, RATE, RATE), [0.5, -1.0])


def test_channels_lie_on_the_shorter_axis():
    stereo = noise(2, 300)
    np.testing.assert_allclose(as_waveform(stereo, RATE, RATE), stereo.mean(0), atol=1e-7)
    np.testing.assert_allclose(as_waveform(stereo.T, RATE, RATE), stereo.mean(0), atol=1e-7)


def broken_files(folder):
    bad = noise(100_000)
    bad[[3, 70_000]] = np.nan, np.inf
    soundfile.write(folder / "nan.wav", bad, RATE, subtype="FLOAT")
    soundfile.write(folder / "header.wav", noise(0), RATE)
    (folder / "zero.wav").touch()
    (folder / "text.wav").write_text("this is no sound\n" * 20)
    (folder / "folder.wav").mkdir()
    (folder / "cut.flac").write_bytes(b"fLaC\0\0\0\x22")
    soundfile.write(folder / "slow.wav", noise(100), 10)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nan.wav", "2 of 100000 samples are NaN"),
        ("header.wav", "no samples"),
        ("zero.wav", "empty"),
        ("text.wav", "cannot decode.*ffmpeg"),
        ("folder.wav", "is a folder"),
        ("cut.flac", "cannot decode"),
        ("slow.wav", "10 Hz is outside"),
    ],
)
def test_broken_files(tmp_path, monkeypatch, name, says):
    monkeypatch.setenv("PATH", "")
    broken_files(tmp_path)
    with pytest.raises(ValueError, match=says) as error:
        load_audio(tmp_path / name, RATE)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.wav: no such file"):
        load_audio("nowhere.wav", RATE)


@pytest.mark.parametrize(
    ("array", "rate", "says"),
    [
        (np.zeros(0), RATE, "no samples"),
        (np.zeros((2, 3, 4)), RATE, r"shape \(2, 3, 4\)"),
        (np.float32(1), RATE, r"shape \(\)"),
        (np.zeros((500, 500)), RATE, "no axis looks like channels"),
        (np.zeros(10, np.int64), RATE, "dtype int64"),
        (np.zeros(10, complex), RATE, "dtype complex128"),
        (np.zeros(10, bool), RATE, "dtype bool"),
        (["a", "b"], RATE, "dtype <U1"),
        ([[1.0], [1.0, 2.0]], RATE, "ragged"),
        (np.array([1.0, np.nan]), RATE, "1 of 2 samples"),
        (np.array([1e30, 0.0]), RATE, "1 of 2 samples"),
        (np.zeros(10), 0, "sample rate 0 Hz"),
        (np.zeros(10), -16000, "sample rate -16000 Hz"),
        (np.zeros(10), 10**9, "sample rate 1000000000 Hz"),
    ],
)
def test_broken_arrays(array, rate, says):
    with pytest.raises(ValueError, match=says):
        as_waveform(array, rate, RATE)


FAKE_FFMPEG = f"""#!{sys.executable}
import struct, sys
source = sys.argv[sys.argv.index("-i") + 1]
assert source.startswith("file:/"), source
if "text" in source:
    sys.exit("file: Invalid data found when processing input")
samples = [0.5, -0.5] * 1000
header = struct.pack(">4s5I", b".snd", 32, 0xFFFFFFFF, 6, 16000, 2) + b"comment\\0"
sys.stdout.buffer.write(header + struct.pack(">2000f", *[0.5, -0.25] * 1000))
"""


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FAKE_FFMPEG)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", os.fspath(program.parent))


def test_other_formats_come_through_ffmpeg(tmp_path, fake_ffmpeg):
    (tmp_path / "video.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    np.testing.assert_array_equal(load_audio(tmp_path / "video.mp4", RATE), np.full(1000, 0.125))


def test_what_ffmpeg_cannot_decode(tmp_path, fake_ffmpeg):
    (tmp_path / "text.m4a").write_text("no sound")
    with pytest.raises(ValueError, match=r"text\.m4a: not audio .*Invalid data"):
        load_audio(tmp_path / "text.m4a", RATE)
