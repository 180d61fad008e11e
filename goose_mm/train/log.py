"""What a run shows: a line per step in metrics.jsonl, and progress with rate and ETA on stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from goose_mm.checkpoint import whole


class Log:
    """Metrics of one run. A resumed run drops lines past the step it resumes from.

    The file appears with its first line, and is open only while a line is written: a full disk is
    then noticed at that line, and no run that never began leaves a file.
    """

    def __init__(self, path: Path, first_step: int, steps: int, quiet: bool = False) -> None:
        self.path = path
        lines = (
            path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        )  # whole ones
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        if path.exists():
            with whole(path) as part:
                part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.bar = tqdm(
            total=steps, initial=first_step, unit="step", file=sys.stderr, disable=quiet,
            mininterval=1.0, dynamic_ncols=True,
        )  # fmt: skip

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """One optimiser step done."""
        self._write({"step": step, **metrics})
        self.bar.set_postfix({k: f"{v:.4g}" for k, v in metrics.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def evaluation(self, step: int, scores: dict[str, float]) -> None:
        self._write({"step": step, "evaluation": scores})
        text = "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
        self.say(f"step {step}: {text}")

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
