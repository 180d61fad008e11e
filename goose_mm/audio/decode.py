"""From a recording to a mono waveform at the model's sample rate. No torch in here.

Whatever the recording comes in, it is mixed to mono, checked and resampled (soxr HQ) in blocks, so
that one of any length needs the memory of one block. Mono is the mean of the channels. Where
these cancel each other, as in stereo with one channel inverted, it is the louder channel.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Float

from goose_mm.audio.formats import BLOCK, decoded, name_of, opened, unit

RATES = (1000, 768_000)  # Hz; outside of this a header is corrupt rather than exotic
LOUDEST = 16.0  # times full scale: 24 dB above it are legal in float recordings
INTEGERS = (2**15, 2**23, 2**31)  # full scales of integers that end up in float recordings
CANCELLED = 0.2  # power of the mix, relative to that of unrelated channels: correlation -0.8
MAX_CHANNELS = 64

Blocks = Iterator[np.ndarray]  # [samples] or [samples, channels] float32

log = logging.getLogger(__name__)


def load_audio(source: Any, sample_rate: int, name: str = "") -> Float[np.ndarray, " samples"]:
    """A whole recording as mono float32 at `sample_rate`; at least one sample.

    `source` is a path, the bytes of a file, or an open binary file, which is read from its
    beginning; messages call it `name`, by default its path. Of a damaged file what can be decoded
    is used, and a warning is logged. Raises FileNotFoundError, or ValueError for anything that is
    not usable sound: a folder, an empty or undecodable file, no samples, an impossible sample
    rate, samples that are NaN, infinite or far beyond full scale.
    """
    return np.concatenate(list(read_blocks(source, sample_rate, name)))


def read_blocks(
    source: Any, sample_rate: int, name: str = ""
) -> Iterator[Float[np.ndarray, " block"]]:
    """`load_audio` piece by piece, in constant memory; raises the same errors."""
    name = name or name_of(source)
    with opened(source, name) as file:
        found = decoded(file, name)
        empty = True
        for (rate, _), stretch in groupby(found, key=lambda piece: (piece[0], piece[1].shape[1])):
            _check_rate(rate, name)
            yield from _mono_at(sample_rate, (block for _, block in stretch), rate, name)
            empty = False
        if empty:
            raise ValueError(f"{name} holds no samples")


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
    if x.dtype.kind != "f" and x.dtype not in (np.uint8, np.int16, np.int32):
        raise ValueError(f"{name} has dtype {x.dtype}: give float (full scale 1.0), int16 or int32")
    x = x[:, None] if x.ndim == 1 else x if x.shape[0] > x.shape[1] else x.T
    if x.shape[1] > MAX_CHANNELS:
        raise ValueError(f"{name} has shape {np.shape(array)}: no axis looks like channels")
    _check_rate(sample_rate_in, name)
    blocks = (unit(x[start : start + BLOCK]) for start in range(0, len(x), BLOCK))
    return np.concatenate(list(_mono_at(sample_rate, blocks, sample_rate_in, name)))


def read_clip(
    clip: Any, sample_rate_in: int | float, sample_rate: int
) -> Iterator[Float[np.ndarray, " block"]]:
    """Sound in any form people have it in, as mono blocks at `sample_rate`.

    `clip` is what `load_audio` takes, samples as `as_waveform` takes them at `sample_rate_in`,
    or an example of Hugging Face datasets: {"array", "sampling_rate"}, {"bytes", "path"}, or an
    AudioDecoder.
    """
    if hasattr(clip, "get_all_samples"):
        samples = clip.get_all_samples()
        clip = {"array": samples.data, "sampling_rate": samples.sample_rate}
    match clip:
        case {"array": array, "sampling_rate": rate}:
            yield as_waveform(array, rate, sample_rate, clip_name(clip))
        case {"bytes": bytes(source)} | {"path": str(source)}:
            yield from read_blocks(source, sample_rate, clip_name(clip))
        case dict():
            raise ValueError(
                f"a clip with the keys {', '.join(map(str, clip))}: give 'array' and "
                "'sampling_rate', or 'bytes', or 'path'"
            )
        case str() | os.PathLike() | bytes() | bytearray() | memoryview():
            yield from read_blocks(clip, sample_rate)
        case _ if hasattr(clip, "read"):
            yield from read_blocks(clip, sample_rate)
        case _:
            yield as_waveform(clip, sample_rate_in, sample_rate)


def clip_name(clip: Any) -> str:
    """What messages call a clip of `read_clip`."""
    if isinstance(clip, dict):
        return str(clip.get("path") or "the recording")
    return name_of(clip)


def peak_level(waveform: Float[np.ndarray, " samples"]) -> float:
    """The loudest sample in dB relative to full scale; -inf for digital silence."""
    peak = float(np.abs(waveform).max(initial=0.0))
    return 20 * math.log10(peak) if peak else -math.inf


def _check_rate(rate: int | float, name: str) -> None:
    if not RATES[0] <= rate <= RATES[1]:
        raise ValueError(f"{name}: sample rate {rate} Hz is outside {RATES[0]}..{RATES[1]} Hz")


def _mono_at(rate: int, blocks: Blocks, rate_in: int | float, name: str) -> Blocks:
    return _resampled(_in_range(_mono(blocks, name), name), rate_in, rate)


def _mono(blocks: Blocks, name: str) -> Blocks:
    """The mean of the channels, or the channel that was louder when they first cancelled."""
    louder = None
    for block in blocks:
        mix = block.mean(axis=1, dtype=np.float32)
        channels = block.shape[1]
        with np.errstate(over="ignore", invalid="ignore"):  # _in_range will tell
            power = np.einsum("sc,sc->c", block, block)
            cancelled = np.vdot(mix, mix) < CANCELLED * power.sum() / channels**2
        if cancelled and louder is None:
            louder = int(power.argmax())
            log.warning(
                "%s: its channels cancel each other (opposite phase); channel %d of %d is used",
                name, louder + 1, channels,
            )  # fmt: skip
        yield block[:, louder] if cancelled else mix


def _in_range(blocks: Blocks, name: str) -> Blocks:
    """Passes blocks on; once a sample is bad it counts on to the end, then raises."""
    bad = total = 0
    peak = 0.0
    for block in blocks:
        total += len(block)
        size = np.abs(block)
        if not size.max(initial=0.0) <= LOUDEST:
            bad += int(np.count_nonzero(~(size <= LOUDEST)))
            peak = max(peak, float(size.max(initial=0.0, where=np.isfinite(size))))
        if not bad:
            yield block
    if bad:
        scale = next((full for full in INTEGERS if LOUDEST < peak <= full), None)
        raise ValueError(
            f"{name}: {bad} of {total} samples are NaN, infinite or beyond {LOUDEST:g} times full "
            f"scale, which is 1.0 (loudest: {peak:.6g}); "
            + (f"divide them by {scale}" if scale else "repair or re-export the recording")
        )


def _resampled(mono: Blocks, rate_in: int | float, rate: int) -> Blocks:
    import soxr

    stream = soxr.ResampleStream(rate_in, rate, 1, dtype="float32", quality="HQ")
    last, produced = np.zeros(0, np.float32), 0
    for last in mono:
        out = last if rate_in == rate else stream.resample_chunk(last)
        produced += len(out)
        yield out
    if rate_in != rate:
        out = stream.resample_chunk(last[:0], last=True)
        # A few samples at a high rate last less than one at a low rate: keep one of them.
        yield out if len(out) or produced else last[-1:]
