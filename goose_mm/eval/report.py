"""The report of a run: report.json, report.md and figure.svg.

Scores, interval, breakdown, baselines, settings. The same predictions give the same files, byte for
byte; what the run cost stands apart, in cost.json.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from goose_mm import __version__
from goose_mm.eval.tasks.task import Scores, Task

RESAMPLES = 1000


def write_report(
    task: Task, settings: dict[str, Any], predictions: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Write the files into `out` and return what report.json holds."""
    scores = task.score(predictions)
    blind = out / "blind" / "report.json"
    baselines = dict(task.baselines())
    if blind.exists():
        baselines["question only: the same model, no picture"] = json.loads(blind.read_text())[
            "score"
        ]
    report = {
        "score": scores.values[scores.headline],
        "measure": scores.headline,
        "interval": interval(task, scores),
        "scores": {scores.headline: None} | scores.values,  # the headline stands first
        "types": scores.types,
        "baselines": baselines,
        # the same sounds score the same, whatever files held them and their labels
        "settings": {key: value for key, value in settings.items() if key != "files"},
        "software": {"goose_mm": __version__, "commit": commit()},
    }
    replace(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    replace(out / "report.md", markdown(report))
    if (upload := task.upload(predictions)) is not None:
        replace(out / "upload.json", json.dumps(upload))
    draw(report, out / "figure.svg")
    return report


def interval(task: Task, scores: Scores) -> list[float] | None:
    """The 95 % interval of the headline, by drawing groups of items again; None if it is no mean.

    Items of one picture are drawn together: they are right or wrong together more often than not.
    """
    if not scores.items:
        return None
    groups: dict[str, list[float]] = {}
    for item in task.items:
        if item.id in scores.items:
            groups.setdefault(item.group, []).append(scores.items[item.id])
    sums = np.array([sum(values) for values in groups.values()])
    sizes = np.array([len(values) for values in groups.values()])
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    whole = scores.values[scores.headline]
    scale = 1.0 if not sums.sum() or whole is None else whole / (sums.sum() / sizes.sum())
    return [round(float(x), 4) for x in np.quantile(means * scale, [0.025, 0.975])]


def markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    settings = report["settings"]
    low, high = report["interval"] or (None, None)
    lines = [
        f"# {settings['task']}: {settings['model']}",
        "",
        f"**{report['measure']}: {shown(report['score'])}**"
        + (f" (95 % interval {shown(low)} to {shown(high)})" if report["interval"] else ""),
        "",
        *table(["score", "value"], [[k, shown(v)] for k, v in report["scores"].items()]),
        *table(["baseline", "value"], [[k, shown(v)] for k, v in report["baselines"].items()]),
    ]
    for kind, types in report["types"].items():
        rows = [[name, shown(value), str(count)] for name, (value, count) in types.items()]
        lines += table([kind, "value", "items"], rows)
    lines += table(["setting", "value"], [[k, f"`{v}`"] for k, v in settings.items()])
    software = report["software"]
    lines.append(f"goose_mm {software['goose_mm']} {software['commit']}".rstrip())
    return "\n".join(lines) + "\n"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|-" * len(head) + "|")
    return [line.replace("\n", "\\n") for line in lines] + [""]


def shown(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4g}"


def draw(report: dict[str, Any], file: Path) -> None:
    """Bars of the first breakdown, or of the scores, with the headline's baselines as lines."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kind, types = next(iter(report["types"].items()), ("score", {}))
    bars = {name: value for name, (value, _) in types.items()} or {
        k: v for k, v in report["scores"].items() if v is not None and np.isfinite(v)
    }
    figure = Figure(figsize=(7, 1 + 0.28 * max(3, len(bars))), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(list(bars), list(bars.values()), color="#4878a8")
    axes.invert_yaxis()
    for (name, value), style in zip(report["baselines"].items(), ("--", ":", "-."), strict=False):
        axes.axvline(value, color="#a04040", linestyle=style, label=name)
    if report["baselines"]:
        axes.legend(fontsize="small")
    axes.set_title(f"{report['settings']['task']}, {report['settings']['model']}, by {kind}")
    axes.set_xlabel(report["measure"])
    part = file.with_suffix(f".{os.getpid()}.part")
    with rc_context({"svg.hashsalt": "goose_mm"}):  # else ids in the file are random
        figure.savefig(part, format="svg", metadata={"Date": None})
    os.replace(part, file)


def commit() -> str:
    """Of the checkout this package runs from; empty elsewhere."""
    try:
        folder = Path(__file__).parent
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def replace(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = file.with_suffix(f"{file.suffix}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
