"""A benchmark's files as people have them, every row of the type it should have.

Files are read whole and digested, so that a run knows whether one has changed. What editors and
spreadsheets add is borne: byte order marks, blank lines, CRLF, other separators, blanks around
cells. What is missing or of another type is named by file, row and field.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

Name = Annotated[str, msgspec.Meta(min_length=1)]  # a text that is not empty
SEPARATORS = ",;\t"
SAMPLE = 100  # rows that tell a table's separator
PIECE = 1 << 20  # bytes of a file that are held at once
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Files:
    """The official files of a folder; `digests` tells by name what was read so far.

    All methods raise ValueError in one line that names the file, and the row and field.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}

    def text(self, name: str) -> str:
        data = (self.folder / name).read_bytes()
        self.digests[name] = digest_of(data)
        return decoded(data, self.folder / name)

    def json(self, name: str, kind: Any) -> Any:
        """One JSON value of a type."""
        file = self.folder / name
        return typed(parsed(self.text(name), str(file)), kind, str(file))

    def listed(self, name: str, key: str, kind: Any, field: str = "") -> list[Any]:
        """The list of rows that a JSON object holds under a key; no two have the same `field`."""
        rows = self.keyed(name, list[kind], [key])[key]
        place = f"{self.folder / name}, {key}"
        unique((f"{place}[{i}]", row[field] if field else row) for i, row in enumerate(rows))
        return rows

    def keyed(self, name: str, kind: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
        """The values of a JSON object, all or those that are named, each of a type."""
        file, found = self.folder / name, self.json(name, dict[str, Any])
        covered(keys or (), found, file)
        names = found if keys is None else keys
        return {key: typed(found[key], kind, f"{file}, {key}") for key in names}

    def rows(self, name: str, kind: Any) -> list[tuple[str, Any]]:
        """(place, row) of JSON lines or of a JSON list, each row of a type."""
        found = records(self.text(name), self.folder / name)
        return [(place, typed(row, kind, place)) for place, row in found]

    def cells(
        self, name: str, fits: Callable[[list[str]], bool], expected: str, *, cut: bool = True
    ) -> list[tuple[str, list[str]]]:
        """(place, cells) of a table without a head, whose every row `fits`; told as `expected`.

        With `cut`, lines that begin with # are comments, and blanks around cells do not count.
        """
        file, text = self.folder / name, self.text(name)
        if cut:
            text = re.sub(r"(?m)^#.*", "", text)
        found = _separated(text, file, lambda rows: sum(map(fits, rows)), cut)
        for place, row in found:
            if not fits(row):
                raise ValueError(f"{place}: expected {expected}, got {_short(row)}")
        return found

    def table(self, name: str, kind: Any) -> list[tuple[str, Any]]:
        """(place, row) of a table whose head names the columns; a row is of the type `kind`."""
        columns, file = kind.__required_keys__, self.folder / name
        found = _separated(self.text(name), file, lambda rows: columns <= set(rows[0]), cut=True)
        head = found[0][1] if found else []
        if lacking := ", ".join(sorted(columns - set(head))):
            raise ValueError(f"{file} lacks the columns {lacking}; it begins {_short(head)}")
        named = ((place, dict(zip(head, row, strict=False))) for place, row in found[1:])
        return [(place, typed(row, kind, place, strict=False)) for place, row in named]


def digest_of(*parts: bytes | Path | np.ndarray) -> str:
    """16 digits of the sha256 of bytes, samples or what files hold, one after the other."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                for piece in iter(partial(file.read, PIECE), b""):
                    found.update(piece)
        else:
            found.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return found.hexdigest()[:16]


def decoded(data: bytes, file: Path) -> str:
    """Text without its byte order mark: UTF-8, or UTF-16 that says so."""
    try:
        return data.decode("utf-16" if data.startswith(UTF16) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: this is not UTF-8 text; save it as UTF-8") from None


def parsed(text: str, place: str) -> Any:
    """One JSON value; no object may have a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        begin = f"it begins with {text[:40]!r}" if text.strip() else "it is empty"
        raise ValueError(f"{place} cannot be read as JSON: {error}; {begin}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"one object has {twice!r} twice")
    return found


def unique(keys: Iterable[tuple[str, Any]]) -> None:
    """ValueError if two places have the same key."""
    seen = set()
    for place, key in keys:
        if key in seen:
            raise ValueError(f"{place}: {key!r} stands in a row before, too; remove one of them")
        seen.add(key)


def covered(keys: Iterable[Any], known: Collection[Any], file: Path) -> None:
    """ValueError if a file does not tell of all keys."""
    if lacking := [key for key in keys if key not in known]:
        more = f" and {len(lacking) - 1} more" if lacking[1:] else ""
        there = _short(list(islice(known, SAMPLE)))
        raise ValueError(f"{file} lacks {lacking[0]!r}{more}; it has {there}")


def typed(value: Any, kind: Any, place: str, *, strict: bool = True) -> Any:
    """`value` as a type, without the fields that it does not name."""
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as error:
        said, _, field = str(error).partition(" - at `$")
        raise ValueError(f"{place}{field.rstrip('`').replace('.', ', ', 1)}: {said}") from None


def numbered(text: str, file: Path) -> list[tuple[str, str]]:
    """(place, line) of the lines that are not blank."""
    # they end at \n alone: a string in JSON may hold every other line separator of Unicode
    lines = enumerate(text.split("\n"), start=1)
    return [(f"{file}, line {i}", line) for i, line in lines if line.strip()]


def records(text: str, file: Path) -> list[tuple[str, Any]]:
    """(place, value) of every row: of JSON lines, of a list, or of the one value of a file."""
    lines = numbered(text, file)
    if len(lines) > 1 and _is_json(lines[0][1]):
        return [(place, parsed(line, place)) for place, line in lines]
    whole = parsed(text, str(file))
    rows = whole if isinstance(whole, list) else [whole]
    return [(f"{file}, row {i}", row) for i, row in enumerate(rows, start=1)]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _separated(
    text: str, file: Path, score: Callable[[list[list[str]]], int], cut: bool
) -> list[tuple[str, list[str]]]:
    """(place, cells) of the rows that are not blank, by the separator that scores best."""

    def begin(separator: str) -> int:
        rows = [row for _, row in islice(_rows(text, file, separator, cut), SAMPLE)]
        return score(rows) if rows else 0

    return list(_rows(text, file, max(SEPARATORS, key=begin), cut))


def _rows(text: str, file: Path, separator: str, cut: bool) -> Iterator[tuple[str, list[str]]]:
    """Blank cells at the end of a row are a spreadsheet's, and dropped."""
    lines = io.StringIO(text, newline="")
    rows = csv.reader(lines, delimiter=separator, skipinitialspace=cut)
    try:
        for row in rows:
            while row and not row[-1].strip():
                row.pop()
            place, cells = f"{file}, line {rows.line_num}", row
            if cut:
                if any("\n" in cell for cell in row):
                    raise ValueError(f"{place}: a quote is opened and not closed in its line")
                cells = [cell.strip() for cell in row]
            if cells:
                yield place, cells
    except csv.Error as error:
        raise ValueError(f"{file}, line {rows.line_num}: {error}") from None


def _short(row: list[Any]) -> str:
    text = str(row)
    return text if len(text) < 100 else f"{text[:100]} ..."
