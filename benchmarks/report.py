"""Writes the tables of README.md, docs/ and the model cards from benchmarks/results.

    python benchmarks/report.py

A table stands between `<!-- results -->` and `<!-- /results -->`; nothing in it is typed by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURED = sorted(RESULTS.glob("wkv7_gpu/*.json"))  # on a GPU each
CARDS = ROOT / "goose_mm" / "pretrained"
EXAMS = {
    "seen": "new scenes, seen styles",
    "new_pictures": "drawings kept out of training",
    "new_style": "a drawing style kept out of training",
    "garments": "garment photos, validation split",
}
FLOORS = ("memory floor", "arithmetic floor")
FAMILIES = (
    "what", "count_all", "count_name", "exist", "category", "count_category", "relation",
    "compare", "where", "background", "garment",
)  # fmt: skip


def summary(results: dict[str, Any]) -> str:
    """One row per shipped model and test, with its baseline, command and date."""
    rows = []
    if text := results.get("text"):
        names = " and ".join(name.replace("_", " ") for name in text["books"])
        rows.append(("goose-tiny-text", f"bits per byte, unseen books ({names})",
                     f"{text['bits_per_byte']:.2f}", "", text))  # fmt: skip
    if audio := results.get("audio"):
        rows.append(("goose-tiny-audio", "ESC-10 accuracy, leave one fold out over folds 1-4",
                     f"{audio['accuracy']:.3f} ± {audio['deviation']:.3f}",
                     "log-mel SVM 0.84 (5 folds)", audio))  # fmt: skip
    for key, model in (("vision", "goose-tiny-vision"), ("vision_unseen_style", "its style run")):
        part = results.get(key, {})
        for exam, scores in part.get("exams", {}).items():
            if (key == "vision") == (exam == "new_style"):
                continue
            total = scores["overall"]
            what = f"exact match, {EXAMS[exam]}" + (
                f" ({part['style']})" if "style" in part else ""
            )
            rows.append((model, what, f"{total['accuracy']:.2f}",
                         f"question only {total['blind']:.2f}", part))  # fmt: skip
    lines = ["| model | test | score | baseline | command, machine, date |", "|-|-|-|-|-|"]
    for model, test, score, baseline, part in rows:
        source = f"`{part['command']}`, {part['hardware']}, {part['date']}"
        lines.append(f"| {model} | {test} | {score} | {baseline} | {source} |")
    return "\n".join(lines)


def families(results: dict[str, Any]) -> str:
    """Accuracy and question-only baseline of the vision model by question family."""
    columns = [("vision", exam) for exam in ("seen", "new_pictures", "garments")]
    columns += [("vision_unseen_style", exam) for exam in ("seen", "new_style")]
    columns = [(k, e) for k, e in columns if e in results.get(k, {}).get("exams", {})]
    titles = [EXAMS[e] + (", style run" if k != "vision" else "") for k, e in columns]
    lines = ["| family | " + " | ".join(titles) + " |", "|-" * (len(columns) + 1) + "|"]
    for family in ("overall", *FAMILIES):
        cells = [results[k]["exams"][e].get(family) for k, e in columns]
        shown = [f"{c['accuracy']:.2f} ({c['blind']:.2f})" if c else "" for c in cells]
        lines.append(f"| {family} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n\nExact match; in brackets the best answer without looking."


def kernels(file: Path) -> str:
    """Milliseconds of every kernel that took part, by shape, and what it was held against."""
    results = json.loads(file.read_text())
    names = [name for name in results["errors"] if name not in results["absent"]]
    lines = [
        "| shape | | " + " | ".join([*names, *FLOORS]) + " |",
        "|-" * (len(names) + len(FLOORS) + 2) + "|",
    ]
    for shape, row in results["shapes"].items():
        for key, what in (("forward", "forward"), ("training", "forward + backward")):
            cells = [times(row[name], key) if name in row else "" for name in names]
            cells += [f"{row[floor][key]:.2f}" for floor in FLOORS]
            lines.append(f"| {shape} | {what} | {' | '.join(cells)} |")
        cells = [f"{row[name]['extra_gib']:.2f}" if name in row else "" for name in names]
        lines.append(f"| {shape} | extra GiB | {' | '.join(cells)} | | |")
    worst = [f"{max(results['errors'][name].values()):.1e}" for name in names]
    lines.append(f"| B2 T256 H3 | worst error | {' | '.join(worst)} | | |")
    about = (
        "Median milliseconds, in brackets replayed as a CUDA graph, on "
        f"{results['hardware']}, {results['dtype']}, torch "
        f"{results['versions']['torch']}, {results['date']}, commit {results['commit']}; "
        "errors relative to float64, of y, the state and all gradients; floors: what must be moved "
        "at the measured bandwidth of a copy, and what chunks of 16 multiply at the measured rate "
        "of a large product."
    )
    absent = "".join(f" {name} did not run: {why}." for name, why in results["absent"].items())
    figure = f"![forward + backward](kernels_{file.stem}.svg)"
    return "\n".join(lines) + f"\n\n{about}{absent}\n\n{figure}"


def times(row: dict[str, Any], key: str) -> str:
    """From Python, and in brackets what a CUDA graph takes."""
    replayed = row.get(f"{key} replayed")
    return f"{row[key]['median']:.2f}" + (f" ({replayed['median']:.2f})" if replayed else "")


def draw_kernels(file: Path) -> None:
    """Forward and backward of every kernel, by shape."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    results = json.loads(file.read_text())
    names = [name for name in results["errors"] if name not in results["absent"]]
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / (len(names) + 1)
    for i, name in enumerate([*names, FLOORS[0]]):
        rows = [row.get(name, {}).get("training", 0) for row in results["shapes"].values()]
        heights = [row["median"] if isinstance(row, dict) else row for row in rows]
        axes.bar([x + i * width for x in range(len(rows))], heights, width, label=name)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(results["shapes"]))], results["shapes"])
    axes.set_ylabel("ms, forward + backward")
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    with rc_context({"svg.hashsalt": "goose_mm"}):
        to = ROOT / "docs" / f"kernels_{file.stem}.svg"
        figure.savefig(to, format="svg", metadata={"Date": None})


def evaluations(reports: list[dict[str, Any]]) -> str:
    """One row per report of `goose-mm eval`, then its breakdowns."""
    lines = ["| task | model | measure | score | 95 % interval | baselines |", "|-|-|-|-|-|-|"]
    details = []
    for report in reports:
        settings = report["settings"]
        span = "{:.4g} to {:.4g}".format(*report["interval"]) if report["interval"] else ""
        beside = "; ".join(f"{name} {value:.4g}" for name, value in report["baselines"].items())
        lines.append(
            f"| {settings['task']} | {settings['model']} | {report['measure']} "
            f"| {report['score']:.4g} | {span} | {beside} |"
        )
        told = (
            f"{name} {'not measured' if value is None else f'{value:.4g}'}"
            for name, value in report["scores"].items()
        )
        details.append(f"- {settings['task']}, scores: {', '.join(told)}.")
        for kind, types in report["types"].items():
            parts = ", ".join(f"{name} {value:.4g} ({n})" for name, (value, n) in types.items())
            details.append(f"- {settings['task']}, {kind}: {parts}.")
        chosen = {k: str(v).replace("\n", "\\n") for k, v in settings.items()}
        told = (f"{k} `{v}`" for k, v in chosen.items() if k not in ("task", "model"))
        cost = f"{report['cost']['seconds']} s, {report['cost']['peak_gib']} GiB"
        details.append(
            f"- {settings['task']}, settings: {', '.join(told)}; {cost}, {report['hardware']}."
        )
    return "\n".join([*lines, "", *details])


def filled(text: str, table: str) -> str:
    """`text` with `table` between its markers."""
    pattern = r"(<!-- results -->\n).*?(<!-- /results -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """What every page with a table should say."""
    results = json.loads((RESULTS / "tiny_models.json").read_text())
    tables = {ROOT / "README.md": summary(results)}
    for kind, parts in {"text": ("text",), "audio": ("audio",)}.items():
        tables[CARDS / f"goose-tiny-{kind}" / "README.md"] = summary(
            {key: results[key] for key in parts if key in results}
        )
    tables[CARDS / "goose-tiny-vision" / "README.md"] = families(results)
    reports = [json.loads(f.read_text()) for f in sorted(RESULTS.glob("evaluations/*.json"))]
    tables[ROOT / "docs" / "evaluation.md"] = evaluations(reports)
    tables[ROOT / "docs" / "kernels.md"] = "\n\n".join(map(kernels, MEASURED))
    return {page: filled(page.read_text(), table) for page, table in tables.items()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
    for file in MEASURED:
        draw_kernels(file)
