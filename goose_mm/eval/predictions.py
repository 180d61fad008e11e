"""Predictions in files: our own, a line for each item as it is done, and those made elsewhere.

A line of ours holds `id`, `seconds`, `read`, the digest of the picture, sound or document that the
item is about, and `prediction`; or instead of that `error`, why what was read could not be decoded.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from goose_mm.eval.tasks.official import decoded, numbered, parsed, records, typed
from goose_mm.eval.tasks.task import Task


class _Told(TypedDict, total=False):
    prediction: Any
    error: str


class Line(_Told):
    id: str
    read: str
    seconds: float


@contextmanager
def exclusively(file: Path) -> Iterator[BinaryIO]:
    """A file of predictions to append to, without the half line that a killed process left."""
    with file.open("ab+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is writing {file}; give it another --shard"
            ) from None
        stream.seek(0)
        stream.truncate(stream.read().rfind(b"\n") + 1)
        yield stream


def write(stream: BinaryIO, lines: Sequence[Mapping[str, Any]]) -> None:
    """Lines of one batch, in one piece."""
    texts = (json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    stream.write("".join(texts).encode())
    stream.flush()


def lines_of(out: Path) -> Iterator[Line]:
    """The whole lines of all shards."""
    for file in sorted(out.glob("predictions-*.jsonl")):
        data = file.read_bytes()
        text = decoded(data[: data.rfind(b"\n") + 1], file)
        for place, line in numbered(text, file):
            yield typed(parsed(line, place), Line, place)


def read(out: Path, task: Task) -> dict[str, Line]:
    """What a folder knows of items: the first prediction, or else the last error."""
    known = {item.id for item in task.items}
    found: dict[str, Line] = {}
    for line in lines_of(out):
        if line["id"] not in known:
            raise ValueError(
                f"{out} has predictions for {line['id']!r}, which is no item of the task"
            )
        if "prediction" not in found.get(line["id"], ()):
            found[line["id"]] = line
    return found


def read_foreign(file: Path, task: Task) -> dict[str, Any]:
    """Predictions made elsewhere: our lines, or the official result format of the task.

    That is a list of objects with `question_id` or `questionId` and `answer` or `prediction`, or
    one object from id to prediction; a number is taken for the text that it would be. ValueError
    that names the row and field, or counts what is missing or unknown.
    """
    rows = records(decoded(file.read_bytes(), file), file)
    if len(rows) == 1 and isinstance(rows[0][1], dict) and not _is_row(rows[0][1]):
        pairs = rows[0][1].items()
        rows = [(f"{file}, {key}", {"id": key, "prediction": value}) for key, value in pairs]
    kind, found = task.answer_type(), {}
    for place, row in rows:
        row = typed(row, dict[str, Any], place)
        key = str(typed(_field(row, ID, place), str | int, f"{place}, id"))
        answer = _field(row, ANSWER, place)
        if kind is str:
            answer = _written(answer)
        answer = typed(answer, kind, f"{place}, prediction")
        if found.setdefault(key, answer) != answer:
            raise ValueError(f"{place}: {key!r} has another prediction in a row before")
    known = {item.id for item in task.items}
    if missing := known - found.keys():
        raise ValueError(f"{file} lacks {len(missing)} of {len(known)} items, as {min(missing)!r}")
    if unknown := found.keys() - known:
        raise ValueError(f"{file} predicts {len(unknown)} unknown items, as {min(unknown)!r}")
    return found


ID = ("id", "question_id", "questionId")
ANSWER = ("prediction", "answer", "text")


def _is_row(value: dict[str, Any]) -> bool:
    return any(name in value for name in ID) and any(name in value for name in ANSWER)


def _field(row: dict[str, Any], names: Sequence[str], place: str) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise ValueError(f"{place} has no {' or '.join(names)}")


def _written(value: Any) -> Any:
    """A number as people write it: 5, and not 5.0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return str(int(value) if float(value).is_integer() else value)
