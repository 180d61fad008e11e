"""From a file or an array to a mono waveform at the model's sample rate. No torch in here.

libsndfile (through soundfile) reads WAV, FLAC, OGG, Opus, MP3, AIFF and more; everything else
(m4a, mp4, webm, ...) goes through an `ffmpeg` binary if there is one. Files are read, mixed to
mono (the mean of the channels) and resampled (soxr HQ) in blocks, so a file of any length needs
the memory of one block. Values above 1.0 are kept: they are legal in float recordings.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float

BLOCK = 1 << 16  # samples per channel that are held at a time
RATES = (1000, 768_000)  # Hz; outside of this a header is corrupt rather than exotic
LOUDEST = 1e9  # full scale is 1.0; beyond this the power spectrum would overflow
MAX_CHANNELS = 64

Blocks = Iterator[np.ndarray]  # [samples, channels] float32


def load_audio(path: str | os.PathLike, sample_rate: int) -> Float[np.ndarray, " samples"]:
    """The whole file as mono float32 at `sample_rate`; at least one sample.

    Raises FileNotFoundError, or ValueError for anything that is not usable sound: a folder, an
    empty or undecodable file, no samples, NaN or infinite samples, an impossible sample rate.
    """
    return np.concatenate(list(read_blocks(path, sample_rate)))


def read_blocks(path: str | os.PathLike, sample_rate: int) -> Iterator[Float[np.ndarray, " block"]]:
    """`load_audio` piece by piece, in constant memory; raises the same errors."""
    name = _checked(path)
    with _decoded(path) as (rate_in, blocks):
        _check_rate(rate_in, name)
        mono = (block.mean(axis=1, dtype=np.float32) for block in blocks)
        yield from _resampled(_finite(mono, name), rate_in, sample_rate, name)


def as_waveform(
    array: Any, sample_rate_in: int | float, sample_rate: int, name: str = "the array"
) -> Float[np.ndarray, " samples"]:
    """Samples in memory as mono float32 at `sample_rate`.

    `array` is a numpy array, tensor or list, [samples] or two-dimensional with the channels on
    the shorter axis; floating point with full scale 1.0, or int16, int32, uint8 at their own full
    scale. Raises ValueError as `load_audio` does, and for other shapes and types.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    try:
        x = np.asarray(array)
    except ValueError:
        raise ValueError(f"{name} is ragged: samples must form a 1-D or 2-D array") from None
    if x.ndim not in (1, 2):
        raise ValueError(f"{name} has shape {x.shape}: give [samples] or [channels, samples]")
    if x.size == 0:
        raise ValueError(f"{name} has no samples (shape {x.shape})")
    x = _as_float(x, name)
    if x.ndim == 2:
        channels = min(x.shape)
        if channels > MAX_CHANNELS:
            raise ValueError(f"{name} has shape {x.shape}: no axis looks like channels")
        x = x.mean(axis=0 if x.shape[0] == channels else 1, dtype=np.float32)
    _check_rate(sample_rate_in, name)
    return np.concatenate(
        list(_resampled(_finite(iter([x]), name), sample_rate_in, sample_rate, name))
    )


def _as_float(x: np.ndarray, name: str) -> np.ndarray:
    if x.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return x.astype(np.float32)
    if x.dtype == np.uint8:
        return (x.astype(np.float32) - 128) / 128
    if x.dtype in (np.int16, np.int32):
        return x.astype(np.float32) / -float(np.iinfo(x.dtype).min)
    raise ValueError(f"{name} has dtype {x.dtype}: give float (full scale 1.0), int16 or int32")


def _checked(path: str | os.PathLike) -> str:
    name = os.fspath(path)
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{name}: no such file")
    if file.is_dir():
        raise ValueError(f"{name} is a folder: give an audio file")
    if file.is_file() and file.stat().st_size == 0:
        raise ValueError(f"{name} is empty (0 bytes)")
    return name


def _check_rate(rate: int | float, name: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{name}: sample rate {rate} Hz is outside {RATES[0]}..{RATES[1]} Hz")


def _finite(blocks: Blocks, name: str) -> Blocks:
    """Passes blocks on; once a sample is bad it counts on to the end, then raises."""
    bad = total = 0
    for block in blocks:
        total += len(block)
        bad += int(np.count_nonzero(~(np.abs(block) <= LOUDEST)))
        if not bad:
            yield block
    if bad:
        raise ValueError(
            f"{name}: {bad} of {total} samples are NaN, infinite or beyond {LOUDEST:.0e} "
            "(full scale is 1.0); repair or re-export the recording"
        )


def _resampled(mono: Blocks, rate_in: int | float, rate: int, name: str) -> Blocks:
    import soxr

    stream = soxr.ResampleStream(rate_in, rate, 1, dtype="float32", quality="HQ")
    last, produced = None, 0
    for last in mono:
        out = last if rate_in == rate else stream.resample_chunk(last)
        produced += len(out)
        yield out
    if last is None:
        raise ValueError(f"{name} holds no samples")
    if rate_in != rate:
        out = stream.resample_chunk(last[:0], last=True)
        # A few samples at a high rate last less than one at a low rate: keep one of them.
        yield out if len(out) or produced else last[-1:]


@contextmanager
def _decoded(path: str | os.PathLike) -> Iterator[tuple[int, Blocks]]:
    """(sample rate, blocks of [samples, channels]) of a file, by libsndfile or ffmpeg."""
    import soundfile

    name = os.fspath(path)
    try:
        file = soundfile.SoundFile(Path(path))
    except soundfile.LibsndfileError as error:
        reason = error.error_string.strip().rstrip(".")
    else:
        with file:
            try:
                yield (
                    file.samplerate,
                    file.blocks(blocksize=BLOCK, dtype="float32", always_2d=True),
                )
            except soundfile.LibsndfileError as error:
                reason = error.error_string.strip().rstrip(".")
                raise ValueError(f"{name}: damaged audio: {reason}") from None
        return
    if shutil.which("ffmpeg") is None:
        raise ValueError(
            f"{name}: cannot decode ({reason}); WAV, FLAC, OGG, Opus, MP3, AIFF and CAF are read "
            "directly, other formats need the `ffmpeg` program on PATH"
        )
    with _ffmpeg(path) as decoded:
        yield decoded


@contextmanager
def _ffmpeg(path: str | os.PathLike) -> Iterator[tuple[int, Blocks]]:
    """ffmpeg writing Sun AU to a pipe: its fixed header tells rate and channels (big-endian)."""
    name = os.fspath(path)
    source = f"file:{Path(path).absolute()}"
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", source, "-vn"]
    command += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages) as process,
    ):
        assert process.stdout is not None
        try:
            header = process.stdout.read(24)
            if len(header) < 24:
                process.wait()
                messages.seek(0)
                lines = messages.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else "no audio"
                raise ValueError(f"{name}: not audio that ffmpeg can decode ({reason})")
            _, offset, _, _, rate, channels = np.frombuffer(header, ">u4").tolist()
            process.stdout.read(offset - 24)
            yield rate, _pcm_blocks(process.stdout, channels)
        finally:
            process.kill()


def _pcm_blocks(pipe: IO[bytes], channels: int) -> Blocks:
    frame = 4 * channels
    while data := pipe.read(BLOCK * frame):
        whole = len(data) // frame * frame
        yield np.frombuffer(data[:whole], ">f4").astype(np.float32).reshape(-1, channels)
