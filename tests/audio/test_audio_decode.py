"""Decoding: what is read, what it becomes, and one clear line for everything else."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import soxr
import torch

from goose_mm.audio import as_waveform, load_audio, peak_level, read_blocks, read_clip
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


@pytest.mark.parametrize("peak", [3.5, 16.0])
def test_float_above_full_scale_is_kept(tmp_path, peak):
    soundfile.write(tmp_path / "a.wav", np.full(500, peak, np.float32), RATE, subtype="FLOAT")
    assert load_audio(tmp_path / "a.wav", RATE).max() == peak


@pytest.mark.parametrize(
    ("peak", "cure"), [(17, 32768), (32768, 32768), (5e6, 8388608), (2e9, 2147483648)]
)
def test_integers_stored_as_floats_are_refused_with_the_cure(tmp_path, peak, cure):
    sound = np.sin(np.arange(4000, dtype=np.float32)) * peak
    sound[1] = peak
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    for source in (tmp_path / "a.wav", sound):
        with pytest.raises(ValueError, match=f"beyond 16 times full scale.* divide .* by {cure}$"):
            list(read_clip(source, RATE, RATE))


# opposite phase


@pytest.mark.parametrize("gain", [-1.0, -0.9, -0.7, -1.3])
def test_of_channels_that_cancel_the_louder_is_used(tmp_path, caplog, gain):
    left = noise(3 * BLOCK)
    stereo = np.stack([left, gain * left], 1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, subtype="FLOAT")
    want = stereo[:, int(gain < -1)]
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", RATE), want)
    np.testing.assert_array_equal(as_waveform(stereo, RATE, RATE), want)
    assert ["opposite phase" in said for said in caplog.messages] == [True, True]


@pytest.mark.parametrize(
    "stereo",
    [
        np.stack([noise(9000), noise(9000, seed=1)], 1),
        np.stack([noise(9000), noise(9000)], 1),
        np.stack([noise(9000), 0 * noise(9000)], 1),
        np.stack([noise(9000), -0.3 * noise(9000)], 1),
        np.stack([0 * noise(9000)] * 5 + [noise(9000)], 1),
        np.zeros((9000, 2), np.float32),
    ],
)
def test_other_channels_are_averaged(stereo, caplog):
    np.testing.assert_allclose(as_waveform(stereo, RATE, RATE), stereo.mean(1), atol=1e-7)
    assert not caplog.messages


def test_once_chosen_it_is_always_the_same_channel(caplog):
    left, right = noise(2 * BLOCK), -noise(2 * BLOCK)
    left[:BLOCK] *= 0.95
    right[BLOCK:] *= 0.95
    np.testing.assert_array_equal(as_waveform(np.stack([left, right], 1), RATE, RATE), right)
    assert len(caplog.messages) == 1 and "channel 2 of 2" in caplog.messages[0]


# what people hold a sound in


class Decoder:
    """As datasets' AudioDecoder."""

    def get_all_samples(self):
        return SimpleNamespace(data=torch.from_numpy(noise(2, 900)), sample_rate=RATE)


def test_every_form_of_a_clip(tmp_path):
    sound = noise(900)
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    data = (tmp_path / "a.wav").read_bytes()
    for clip in (
        sound,
        sound.tolist(),
        str(tmp_path / "a.wav"),
        tmp_path / "a.wav",
        data,
        io.BytesIO(data),
        {"array": sound, "sampling_rate": RATE, "path": "a.wav"},
        {"bytes": data, "path": "a.wav"},
        {"bytes": None, "path": str(tmp_path / "a.wav")},
    ):
        np.testing.assert_array_equal(np.concatenate([*read_clip(clip, RATE, RATE)]), sound)
    both = np.concatenate([*read_clip(Decoder(), 44100, RATE)])
    np.testing.assert_array_equal(both, noise(2, 900).mean(0))


@pytest.mark.parametrize(
    ("clip", "says"),
    [
        ({"raw": [0.0]}, "the keys raw: give 'array' and 'sampling_rate'"),
        ({"array": [np.nan], "sampling_rate": RATE, "path": "x.ogg"}, "^x.ogg: 1 of 1 samples"),
        ({"bytes": b"no sound", "path": "x.ogg"}, "^x.ogg: cannot decode"),
        (b"", "the recording is empty"),
    ],
)
def test_broken_clips(clip, says):
    with pytest.raises(ValueError, match=says):
        list(read_clip(clip, RATE, RATE))


@pytest.mark.parametrize(("peak", "level"), [(1.0, 0.0), (-0.1, -20.0), (0.0, -np.inf)])
def test_peak_level(peak, level):
    assert peak_level(np.array([0.0, peak], np.float32)) == pytest.approx(level)


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
        ("text.wav", "cannot decode.*convert it: ffmpeg"),
        ("folder.wav", "is a folder"),
        ("cut.flac", "cannot decode"),
        ("slow.wav", "10 Hz is outside"),
    ],
)
def test_broken_files(tmp_path, name, says):
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
