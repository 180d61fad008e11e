"""Runs a task: predictions are written as they come, and what is written stays.

The folder of a run holds `settings.json`, what the run is; `predictions-I-of-N.jsonl`, one file for
each process; `cost.json`; and, once every item has a prediction, the report. A run that was killed
goes on with the same command. Several processes share a run by `shard`; the last writes the report.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from goose_mm.checkpoint import digest
from goose_mm.eval.report import replace, write_report
from goose_mm.eval.tasks.task import Item, Task, grouped

BATCH = {"vision": 1, "audio": 16, "text": 16}  # groups that are predicted at once


def run(
    task: Task,
    model: Any,
    name: str,
    out: Path,
    shard: tuple[int, int] = (0, 1),
    quiet: bool = False,
) -> dict[str, Any] | None:
    """Predict what is missing, and report once nothing is; None while other shards are at work.

    `name` is what the model is called in the report. Raises ValueError if `out` holds another run,
    or if another process works on the same shard.
    """
    out.mkdir(parents=True, exist_ok=True)
    settle(out, {"model": name, "weights": digest(model.state_dict())[:16], **describe(task)})
    groups, size = grouped(task.items), BATCH[task.kind]
    # whoever predicts a batch predicts it whole: other batches would round otherwise
    batches = [groups[start : start + size] for start in range(0, len(groups), size)]
    file = out / f"predictions-{shard[0]}-of-{shard[1]}.jsonl"
    with exclusively(file) as stream:
        done = read_predictions(out, task)

        def left(batch: list[list[Item]]) -> int:
            return sum(item.id not in done for group in batch for item in group)

        todo = [batch for batch in batches[shard[0] :: shard[1]] if left(batch)]
        total = sum(map(left, todo))
        bar = tqdm(total=total, unit="item", file=sys.stderr, disable=quiet or None)
        for batch in todo:
            begin = time.perf_counter()
            answers = task.predict(model, batch)
            seconds = (time.perf_counter() - begin) / left(batch)
            for group, predicted in zip(batch, answers, strict=True):
                pairs = [(i, p) for i, p in zip(group, predicted, strict=True) if i.id not in done]
                write(stream, pairs, seconds)
                bar.update(len(pairs))
        bar.close()
    return finish(task, out)


def finish(task: Task, out: Path) -> dict[str, Any] | None:
    """Score a folder once its predictions are complete; until then None, and a word on stderr."""
    predictions = read_predictions(out, task)
    if missing := len(task.items) - len(predictions):
        print(f"{missing} items still have no prediction in {out}", file=sys.stderr)
        return None
    settings = json.loads((out / "settings.json").read_text())
    replace(out / "cost.json", json.dumps(cost(out), indent=1) + "\n")
    return write_report(task, settings, predictions, out)


def describe(task: Task) -> dict[str, Any]:
    return {"task": task.name, "items": len(task.items), **task.settings}


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Write down what this run is, or ValueError if the folder holds another one."""
    path, settings = out / "settings.json", json.loads(json.dumps(settings))
    part = out / f"settings.{os.getpid()}.part"
    part.write_text(json.dumps(settings, indent=1) + "\n")
    try:
        os.link(part, path)  # fails if another process was first
    except FileExistsError:
        held = json.loads(path.read_text())
        other = [key for key in {**held, **settings} if held.get(key) != settings.get(key)]
        if other:
            told = ", ".join(f"{k}={held.get(k)!r}, now {settings.get(k)!r}" for k in other)
            raise ValueError(f"{out} holds another run ({told}); choose a new --out") from None
    finally:
        part.unlink()


@contextmanager
def exclusively(file: Path) -> Iterator[TextIO]:
    """A file of predictions to append to, without the half line that a killed process left."""
    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another process is writing {file}; give it another --shard"
            ) from None
        stream.seek(0)
        whole = sum(len(line.encode()) for line in stream if line.endswith("\n"))
        stream.truncate(whole)
        yield stream


def write(stream: TextIO, predicted: Sequence[tuple[Item, Any]], seconds: float) -> None:
    """Lines of one group, in one piece."""
    lines = (
        {"id": item.id, "prediction": prediction, "seconds": round(seconds, 4)}
        for item, prediction in predicted
    )
    stream.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    stream.flush()


def read_predictions(out: Path, task: Task) -> dict[str, Any]:
    """Predictions by item id, of all shards; the first counts, should an item have several."""
    known = {item.id for item in task.items}
    found: dict[str, Any] = {}
    for file in sorted(out.glob("predictions-*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                continue
            value = json.loads(line)
            if value["id"] not in known:
                raise ValueError(f"{file} predicts {value['id']!r}, which is no item of the task")
            found.setdefault(value["id"], value["prediction"])
    return found


def read_foreign(file: Path, task: Task) -> dict[str, Any]:
    """Predictions made elsewhere: our JSONL, or the official result format of the task.

    That is a list of objects with `question_id` or `questionId` and `answer` or `prediction`, or
    one object from id to prediction. ValueError that counts what is missing or unknown.
    """
    text = file.read_text(encoding="utf-8")
    try:
        rows = (
            [json.loads(line) for line in text.splitlines()] if "\n{" in text else json.loads(text)
        )
        if isinstance(rows, dict):
            rows = [{"id": key, "prediction": value} for key, value in rows.items()]
        found = {str(_field(row, ID)): _field(row, ANSWER) for row in rows}
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is no file of predictions: {error!r}") from None
    known = {item.id for item in task.items}
    if missing := known - found.keys():
        raise ValueError(f"{file} lacks {len(missing)} of {len(known)} items, as {min(missing)!r}")
    if unknown := found.keys() - known:
        raise ValueError(f"{file} predicts {len(unknown)} unknown items, as {min(unknown)!r}")
    return found


ID = ("id", "question_id", "questionId")
ANSWER = ("prediction", "answer", "text")


def _field(row: dict[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row:
            return row[name]
    raise KeyError(" or ".join(names))


def cost(out: Path) -> dict[str, Any]:
    """Seconds of all predictions together, and the most memory this process has used."""
    lines = (
        json.loads(line)
        for file in out.glob("predictions-*.jsonl")
        for line in file.read_text(encoding="utf-8").splitlines()
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": round(sum(line["seconds"] for line in lines), 1), "peak_gib": round(peak, 2)}
