"""How long the command takes to start and to answer once; writes results/start.json.

    python benchmarks/start.py            # two minutes
    python benchmarks/start.py --quick    # one round, writes nothing

Every command runs in a process of its own, and all take turns, so that each sees the same load; the
least of each counts, which was disturbed least. An answer is held against what it cannot do
without: importing torch and reading the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path

from wkv7_cpu import commit, processor

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "start.json"
MODELS = ROOT / "goose_mm" / "pretrained"
GOOSE = ("-m", "goose_mm")
NEEDED = f"""
import torch
from safetensors.torch import load_file
load_file({str(MODELS / "goose-tiny-vision" / "model.safetensors")!r})
"""
COMMANDS: dict[str, tuple[str, ...]] = {
    "python": ("-c", ""),
    "--help": (*GOOSE, "--help"),
    "ask --help": (*GOOSE, "ask", "--help"),
    "eval --help": (*GOOSE, "eval", "--help"),
    "train text_tiny --help": (*GOOSE, "train", "text_tiny", "--help"),
    "torch and weights": ("-c", NEEDED),
    "ask": (*GOOSE, "ask", str(MODELS / "example" / "picture.png"), "How many objects are there?"),
}


def run(command: Sequence[str]) -> tuple[float, float]:
    """(seconds on the clock, seconds of work) of one process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"python {' '.join(command)} failed")
    return seconds, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round, nothing written")
    rounds = 1 if parser.parse_args().quick else 7
    report = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": f"{processor()}, {os.cpu_count()} CPU cores",
        "load": round(os.getloadavg()[0], 2),  # of other processes, when this began
        "python": sys.version.split()[0],
        **{name: metadata.version(name) for name in ("torch", "tyro", "safetensors")},
        "runs": rounds,
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):  # the first reads files that the others find in memory
        for name, command in COMMANDS.items():
            found = run(command)
            times[name] += [found] if turn else []
    for i, measure in enumerate(("seconds", "seconds_of_work")):
        each = {name: min(found[i] for found in some) for name, some in times.items()}
        report[measure] = {name: round(value, 2) for name, value in each.items()}
        ratio = each["ask"] / each["torch and weights"]
        report[measure] |= {"ask / torch and weights": round(ratio, 2)}
        print(f"{measure}: {json.dumps(report[measure])}", file=sys.stderr)
    if rounds > 1:
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
