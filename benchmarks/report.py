"""Writes the tables of README.md and of the model cards from benchmarks/results.

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
CARDS = ROOT / "goose_mm" / "pretrained"
EXAMS = {
    "seen": "new scenes, seen styles",
    "new_pictures": "drawings kept out of training",
    "new_style": "a drawing style kept out of training",
    "garments": "garment photos, validation split",
}
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
    return {page: filled(page.read_text(), table) for page, table in tables.items()}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
