"""Recordings on the command line: progress while a long one is read, remarks on stderr."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from goose_mm.audio.formats import Part, opened

PATIENCE = 1.0  # seconds before a bar appears


@contextmanager
def watched(path: str) -> Iterator[Part]:
    """The file at a path, or stdin for "-"; if it takes long, a terminal shows how far it is."""
    name = "stdin" if path == "-" else path
    with opened(sys.stdin.buffer if path == "-" else path, name) as file:
        size = file.seek(0, os.SEEK_END)
        with tqdm(
            total=size, desc=os.path.basename(name), unit="B", unit_scale=True,
            delay=PATIENCE, smoothing=0.0, miniters=1, leave=False, disable=None, file=sys.stderr,
        ) as bar:  # fmt: skip
            yield Watched(file, size, name, bar)


@contextmanager
def remarks() -> Iterator[None]:
    """What the library remarks on a recording goes to stderr, above a bar if there is one."""
    logger, handler = logging.getLogger("goose_mm"), Remarks()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class Watched(Part):
    """A whole file that moves a bar to where it is read."""

    def __init__(self, file: Any, size: int, name: str, bar: tqdm) -> None:
        super().__init__(file, 0, size)
        self.name, self.bar = name, bar

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self.bar.update(self.at - self.bar.n)  # back as well, as decoders do at first
        return count


class Remarks(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        complain(record.getMessage())


def complain(text: str) -> None:
    tqdm.write(f"goose-mm: {' '.join(text.split())}", file=sys.stderr)
