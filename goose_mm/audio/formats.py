"""From the bytes of a recording to blocks of samples: libsndfile first, FFmpeg where that ends.

libsndfile is exact in formats that store samples, and in Vorbis and Opus. FFmpeg (through PyAV)
decodes MPEG audio, whose headers libsndfile trusts though many are wrong, and all that libsndfile
does not know or cannot finish. A chained Ogg is decoded file by file, as RFC 3533 defines it.

Damage has one policy: what can be decoded is used, and a warning of this module's logger says
what was wrong. Only a recording of which nothing can be decoded is an error.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import groupby, pairwise
from typing import Any

import numpy as np

BLOCK = 1 << 16  # samples per channel that are held at a time
SPOOL = 1 << 26  # bytes of a pipe that are kept in memory, not on disk
SCAN = 1 << 20  # bytes that are searched at a time
UNKNOWN_SIZE = 0x7F000000  # writers that cannot go back put this or more into the header
HEADER_SLACK = 64  # bytes by which careless writers miscount
# libsndfile tells of headers that announce more than there is, or less, in its log.
SIZES = re.compile(r"(?:data|ssnd|body|form|riff|size) *: (\d+) \(should be (\d+)\)", re.IGNORECASE)
# A playlist must not open further files or addresses; the size in a WAV header may be 0.
OPTIONS = {"protocol_whitelist": "none", "ignore_length": "1"}
XING = re.compile(rb"(?:Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](.{4})", re.DOTALL)  # MPEG frames
PAGE = re.compile(rb"OggS\0(.)", re.DOTALL)
FIRST, LAST = 2, 4  # flags of an Ogg page

File = Any  # binary, seekable
Frames = Iterator[tuple[int, np.ndarray]]  # sample rate and [samples, channels] float32

log = logging.getLogger(__name__)


class Undecodable(Exception):
    """A decoder cannot begin or cannot go on; the message says why."""


@contextmanager
def opened(source: Any, name: str) -> Iterator[File]:
    """A path, bytes, or an open file as a seekable binary file.

    An open file is read from its beginning and left open; a pipe is stored first. `name` is what
    errors call it: FileNotFoundError or ValueError for no file, a folder, text or nothing.
    """
    with ExitStack() as stack:
        match source:
            case str() | os.PathLike():
                file = stack.enter_context(_open(source, name))
            case bytes() | bytearray() | memoryview():
                file = io.BytesIO(source)
            case io.StringIO():
                raise ValueError(f"{name} is text: give the bytes of a recording")
            case io.TextIOWrapper():
                file = source.buffer
            case _:
                file = source
        if not (hasattr(file, "seekable") and file.seekable()):
            stored = stack.enter_context(tempfile.SpooledTemporaryFile(SPOOL))
            shutil.copyfileobj(file, stored)
            file = stored
        if not file.seek(0, os.SEEK_END):
            raise ValueError(f"{name} is empty (0 bytes)")
        file.seek(0)
        yield file


def name_of(source: Any) -> str:
    """What messages call a recording: its path if it has one."""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "the recording"


def decoded(file: File, name: str) -> Frames:
    """Blocks of at most `BLOCK` samples, each of one rate. ValueError if nothing can be decoded."""
    seconds, flaws = 0.0, []
    for part in _parts(file, flaws):
        for rate, block in _blocks(_part(part, flaws)):
            seconds += len(block) / rate
            yield rate, block
    if flaws and not seconds:
        raise ValueError(
            f"{name}: cannot decode ({flaws[0]}); if a player plays it, convert it: "
            "ffmpeg -i FILE new.wav"
        )
    if flaws:
        log.warning("%s: damaged (%s); %.2f s of sound are used", name, "; ".join(flaws), seconds)


def unit(samples: np.ndarray) -> np.ndarray:
    """Samples of any type as float32 with full scale 1.0."""
    if samples.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return samples.astype(np.float32)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    return samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)


def _open(path: str | os.PathLike, name: str) -> File:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{name} is a folder: give an audio file") from None
    except (OSError, ValueError) as error:  # such as: no permission, a name with a null byte
        raise ValueError(f"{name}: {getattr(error, 'strerror', error)}") from None


def _blocks(frames: Frames) -> Frames:
    """Frames of any length, joined to blocks while rate and channels stay the same."""
    for (rate, _), run in groupby(frames, key=lambda frame: (frame[0], frame[1].shape[1])):
        held, count = [], 0
        for _, samples in run:
            held.append(samples)
            count += len(samples)
            while count >= BLOCK:
                whole = np.concatenate(held)
                yield rate, whole[:BLOCK]
                held, count = [whole[BLOCK:]], count - BLOCK
        if count:
            yield rate, np.concatenate(held)


def _part(file: File, flaws: list[str]) -> Frames:
    """One decoder after the other; the next goes on where the last had to stop."""
    head = file.read(3)
    mpeg = head == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] >= 0xE0)
    seconds, reason = 0.0, ""  # of the first decoder that knew the format
    for decode in (_ffmpeg,) if mpeg else (_libsndfile, _ffmpeg):
        file.seek(0)
        known = seconds
        try:
            for rate, samples in decode(file, flaws):
                fresh = samples[round(known * rate) :]
                known = max(0.0, known - len(samples) / rate)
                if len(fresh):
                    seconds += len(fresh) / rate
                    yield rate, fresh
            return
        except Undecodable as error:
            reason = reason or str(error)
            if seconds:
                flaws.append(str(error))
    if not seconds:
        flaws.append(reason)


def _libsndfile(file: File, flaws: list[str]) -> Frames:
    import soundfile

    try:
        sound = soundfile.SoundFile(file)
    except soundfile.LibsndfileError:
        raise Undecodable from None
    with sound:
        if sound.format == "VOC" or "MPEG" in sound.subtype:
            raise Undecodable  # VOC: it takes the headers of further blocks for samples
        if sound.frames == np.iinfo(np.int64).max:
            raise Undecodable  # a FLAC of unknown length, which soundfile cannot read in blocks
        if not sound.frames:
            raise Undecodable("it holds no samples")
        count = 0
        try:
            while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
                count += len(block)
                yield sound.samplerate, block
        except soundfile.LibsndfileError as error:
            raise Undecodable(error.error_string.strip().rstrip(".")) from None
        for declared, found in SIZES.findall(sound.extra_info):
            if int(found) + HEADER_SLACK < int(declared) < UNKNOWN_SIZE:
                flaws.append(f"cut off: {found} of {declared} bytes are there")
                return
        if count < sound.frames:
            flaws.append(f"{count} of {sound.frames} samples are there")


def _ffmpeg(file: File, flaws: list[str]) -> Frames:
    import av

    packets = skipped = 0
    seconds = announced = 0.0
    try:
        with av.open(file, "r", container_options=OPTIONS, metadata_errors="replace") as container:
            stream = container.streams.best("audio")
            if stream is None or stream.codec_context is None:
                raise Undecodable("there is no sound in it")
            decoder: Any = stream.codec_context
            if decoder.name == "speex":  # FFmpeg's own decoder gives twice the samples
                decoder = av.CodecContext.create("libspeex", "r")
                decoder.extradata = stream.codec_context.extradata
            if container.duration and not stream.duration and len(container.streams) == 1:
                announced = container.duration / av.time_base  # by a header, not an estimate
            for packet in container.demux(stream):
                packets += 1
                try:
                    frames = decoder.decode(packet)
                except av.FFmpegError:
                    skipped += 1
                    continue
                for frame in frames:
                    raw, channels = frame.to_ndarray(), frame.layout.nb_channels
                    samples = raw.T if frame.format.is_planar else raw.reshape(-1, channels)
                    seconds += len(samples) / frame.sample_rate
                    yield frame.sample_rate, unit(samples)
    except av.FFmpegError as error:
        raise Undecodable(error.strerror) from None
    except ValueError as error:  # numpy has no such samples
        raise Undecodable(str(error)) from None
    if skipped:
        flaws.append(f"{skipped} of {packets} packets cannot be decoded")
    if seconds < 0.99 * announced - 0.1:
        flaws.append(f"cut off: {seconds:.2f} of {announced:.2f} s are there")
    file.seek(0)
    if (header := XING.search(file.read(SCAN))) and packets < int.from_bytes(header[1]):
        flaws.append(f"cut off: {packets} of {int.from_bytes(header[1])} packets are there")


def _parts(file: File, flaws: list[str]) -> Iterator[File]:
    """The files that follow each other in a chained Ogg; any other file is one part."""
    links, follows = [0], 0
    size = file.seek(0, os.SEEK_END)
    pages = list(_pages(file))
    for start, flags in pages:
        if flags & FIRST and start != follows:
            links.append(start)
        if flags & FIRST:  # right behind it a further stream of the same link may begin
            follows = _behind(file, start)
    if pages and (not pages[-1][1] & LAST or _behind(file, pages[-1][0]) > size):
        flaws.append("cut off: the last page is missing")
    for start, end in pairwise([*links, size]):
        yield Part(file, start, end)


def _behind(file: File, start: int) -> int:
    """The end of an Ogg page."""
    file.seek(start + 26)
    lacing = file.read(int.from_bytes(file.read(1)))
    return start + 27 + len(lacing) + sum(lacing)


def _pages(file: File) -> Iterator[tuple[int, int]]:
    """Where the pages of an Ogg begin, and their flags; nothing for any other file."""
    file.seek(0)
    if file.read(4) != b"OggS":
        return
    file.seek(0)
    at, seen = 0, b""
    while chunk := file.read(SCAN):
        seen = seen[-5:] + chunk  # one byte less than the pattern
        at += len(chunk)
        for page in PAGE.finditer(seen):
            yield at - len(seen) + page.start(), page[1][0]


class Part(io.RawIOBase):
    """The bytes `start` to `end` of a file, as a file."""

    def __init__(self, file: File, start: int, end: int) -> None:
        self.file, self.start, self.size, self.at = file, start, end - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        goal = offset + (0, self.at, self.size)[whence]
        self.at = goal if goal >= 0 else self.at  # libsndfile tries it with a size of 2^63 - 1
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)
