"""Runs a task: predictions are written as they come, and what is written stays.

The folder of a run holds `settings.json`, what the run is and which official files it has read;
`predictions-I-of-N.jsonl`, one file for each process; `cost.json`; and, once every item has a
prediction, the report. A run that was killed goes on with the same command: a prediction tells what
it was made from, which must be the same still. Several processes share a run by `shard`; the last
writes the report.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from goose_mm.checkpoint import digest
from goose_mm.eval import predictions
from goose_mm.eval.predictions import Line
from goose_mm.eval.report import replace, write_report
from goose_mm.eval.tasks.task import Item, Task, grouped

BATCH = {"vision": 1, "audio": 16, "text": 16}  # groups that are predicted at once
CALLED = {"vision": "pictures", "audio": "clips", "text": "documents"}
NAMED = 10  # of those that something is wrong with

Group = Sequence[Item]


class Seen(NamedTuple):
    """What was read of a group's picture, sound or document."""

    read: str  # its digest
    media: Any = None  # what a model is given of it
    error: str = ""  # why it could not be decoded


def run(
    task: Task,
    model: Any,
    name: str,
    out: Path,
    shard: tuple[int, int] = (0, 1),
    quiet: bool = False,
    skip_bad: bool = False,
) -> dict[str, Any] | None:
    """Predict what is missing, and report once nothing is; None while other shards are at work.

    `name` is what the model is called in the report. What cannot be decoded does not stop the
    rest; `skip_bad` leaves it out of the report. Before anything is predicted, raises
    FileNotFoundError if pictures are missing, ValueError if `out` holds another run or what it has
    read is not the same any more, or if another process works on the same shard; in the end,
    ValueError if something could not be decoded.
    """
    assert len({item.id for item in task.items}) == len(task.items), "ids are unique"
    task.ready(model)
    out.mkdir(parents=True, exist_ok=True)
    settle(out, {"model": name, "weights": digest(model.state_dict())[:16], **describe(task)})
    groups, size = grouped(task.items), BATCH[task.kind]
    # whoever predicts a batch predicts it whole: other batches would round otherwise
    batches = [groups[start : start + size] for start in range(0, len(groups), size)]
    mine = batches[shard[0] :: shard[1]]
    with predictions.exclusively(out / f"predictions-{shard[0]}-of-{shard[1]}.jsonl") as stream:
        found = predictions.read(out, task)
        done = {key for key, line in found.items() if skip_bad or "prediction" in line}

        def left(batch: Sequence[Group]) -> list[Item]:
            return [item for group in batch for item in group if item.id not in done]

        finished = [group for batch in mine if not left(batch) for group in batch]
        done -= changed(task, finished, found, quiet)
        todo = [batch for batch in mine if left(batch)]
        total = sum(len(left(batch)) for batch in todo)
        bar = tqdm(total=total, unit="item", file=sys.stderr, disable=quiet or None)
        for batch in todo:
            begin = time.perf_counter()
            seen = [see(task, model, group) for group in batch]
            refuse_changed(task, batch, [one.read for one in seen], found)
            told = predict(task, model, batch, seen)
            seconds = (time.perf_counter() - begin) / len(left(batch))
            lines = [told[item.id] | {"seconds": round(seconds, 4)} for item in left(batch)]
            predictions.write(stream, lines)
            bar.update(len(lines))
        bar.close()
    return finish(task, out, skip_bad)


def see(task: Task, model: Any, group: Group) -> Seen:
    """Read and decode what a group is about."""
    read = ""
    try:
        source = task.source(group)
        read = task.digest(source)
        return Seen(read, task.decode(source, model))
    except ValueError as error:
        return Seen(read, error=str(error))


def predict(
    task: Task, model: Any, batch: Sequence[Group], seen: Sequence[Seen]
) -> dict[str, dict[str, Any]]:
    """By item of a batch its line, but for the time it took."""
    pairs = [pair for pair in zip(batch, seen, strict=True) if not pair[1].error]
    groups, media = [group for group, _ in pairs], [one.media for _, one in pairs]
    answers = iter(task.predict(model, groups, media) if groups else ())
    lines = {}
    for group, one in zip(batch, seen, strict=True):
        told = repeat(one.error, len(group)) if one.error else next(answers)
        kind = "error" if one.error else "prediction"
        for item, value in zip(group, told, strict=True):
            lines[item.id] = {"id": item.id, kind: value, "read": one.read}
    return lines


def changed(
    task: Task, groups: Sequence[Group], found: Mapping[str, Line], quiet: bool
) -> set[str]:
    """Reads again what was done. The items that could not be decoded, and are not the same now.

    ValueError if what was predicted is not the same. Reading takes some seconds a gigabyte, which
    is little beside the predictions; a file's time and size would prove nothing.
    """
    bar = tqdm(groups, "checking", unit="file", file=sys.stderr, disable=quiet or None, leave=False)
    reads = [read_again(task, group) for group in bar]
    refuse_changed(task, groups, reads, found)
    pairs = zip(groups, reads, strict=True)
    return {item.id for group, read in pairs for item in group if found[item.id]["read"] != read}


def read_again(task: Task, group: Group) -> str:
    try:
        return task.digest(task.source(group))
    except ValueError:  # as in `see`
        return ""


def refuse_changed(
    task: Task, groups: Sequence[Group], reads: Sequence[str], found: Mapping[str, Line]
) -> None:
    """ValueError if a prediction of these groups was made from something else."""
    old = [
        group[0].group
        for group, read in zip(groups, reads, strict=True)
        for line in [found[item.id] for item in group if item.id in found]
        if "prediction" in line and line["read"] != read
    ]
    if old:
        raise ValueError(
            f"{named(task, old)} changed after they were predicted; choose a new --out"
        )


def named(task: Task, groups: Sequence[str]) -> str:
    """How many of a task's groups, and which: "2 of 9 pictures (a.jpg, b.jpg)"."""
    some, every = dict.fromkeys(groups), {item.group for item in task.items}
    folder = f"{task.official.folder}{os.sep}"
    names = [group.removeprefix(folder) for group in some][:NAMED]
    more = ", ..." if len(some) > NAMED else ""
    return f"{len(some)} of {len(every)} {CALLED[task.kind]} ({', '.join(names)}{more})"


def finish(task: Task, out: Path, skip_bad: bool = False) -> dict[str, Any] | None:
    """Score a folder once its predictions are complete; until then None, and a word on stderr.

    ValueError if something could not be decoded, unless `skip_bad` leaves it out.
    """
    found = predictions.read(out, task)
    if missing := len(task.items) - len(found):
        print(f"{missing} items still have no prediction in {out}", file=sys.stderr)
        return None
    settings = json.loads((out / "settings.json").read_text(encoding="utf-8"))
    if bad := [item for item in task.items if "error" in found[item.id]]:
        told = named(task, [item.group for item in bad])
        first = found[bad[0].id]["error"]
        if not skip_bad:
            raise ValueError(
                f"{told} could not be decoded, the first because {first}; replace them and run "
                "again, or leave them out with --skip-bad"
            )
        task.items = [item for item in task.items if "prediction" in found[item.id]]
        if not task.items:
            raise ValueError(f"{told} could not be decoded, the first because {first}")
        settings["left out"] = f"{len(bad)} items: {told} could not be decoded"
    replace(out / "cost.json", json.dumps(cost(out), indent=1) + "\n")
    answers = {item.id: found[item.id]["prediction"] for item in task.items}
    return write_report(task, settings, answers, out)


def describe(task: Task) -> dict[str, Any]:
    """All that decides a score but the model: settings, and digests of the official files."""
    files = task.official.digests
    return {"task": task.name, "items": len(task.items), **task.settings, "files": files}


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Write down what this run is, or ValueError if the folder holds another one."""
    path, settings = out / "settings.json", json.loads(json.dumps(settings))
    part = out / f"settings.{os.getpid()}.part"
    part.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    try:
        os.link(part, path)  # fails if another process was first
    except FileExistsError:
        held = json.loads(path.read_text(encoding="utf-8"))
        if told := list(differences(held, settings)):
            more = f" and {len(told) - NAMED} more" if len(told) > NAMED else ""
            raise ValueError(
                f"{out} holds another run ({', '.join(told[:NAMED])}{more}); choose a new --out"
            ) from None
    finally:
        part.unlink()


def differences(held: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What two settings do not have in common; of files, which have changed."""
    for key in {**held, **now}:
        before, after = held.get(key), now.get(key)
        if key == "files":
            for name in {**(before or {}), **(after or {})}:
                old, new = ((files or {}).get(name) for files in (before, after))
                if old != new:
                    yield f"{name} has changed" if old and new else f"one has not read {name}"
        elif before != after:
            yield f"{key}={before!r}, now {after!r}"


def cost(out: Path) -> dict[str, Any]:
    """Seconds of all predictions together, and the most memory this process has used."""
    seconds = sum(line["seconds"] for line in predictions.lines_of(out))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": round(seconds, 1), "peak_gib": round(peak, 2)}
