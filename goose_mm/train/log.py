"""What a run shows: a line per step in metrics.jsonl, and progress with rate and ETA on stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tqdm import tqdm


class Log:
    """Metrics of one run. A resumed run drops lines past the step it resumes from."""

    def __init__(self, path: Path, first_step: int, steps: int, quiet: bool = False) -> None:
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= first_step]
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
        self.file = path.open("a", buffering=1, encoding="utf-8")  # a line at a time, to be watched
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", file=sys.stderr, disable=quiet,
            mininterval=1.0, dynamic_ncols=True,
        )  # fmt: skip

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One optimiser step done."""
        self.file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        self.file.write(json.dumps({"step": step, "evaluation": scores}) + "\n")
        text = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
        self.bar.write(f"step {step}: {text}", file=sys.stderr)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        self.file.close()


def _lines(path: Path) -> list[str]:
    """Records end at a line feed alone; a text in them may hold other separators."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [line for line in text.split("\n") if line]
