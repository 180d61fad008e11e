"""The token loop against the chunked kernel on CPU; writes results/wkv7_cpu.json.

    python benchmarks/wkv7_cpu.py            # B1 T2048 H12 N64 float32, a few minutes
    python benchmarks/wkv7_cpu.py --quick    # B1 T256 H4, seconds, writes nothing

No speed without correctness: results and gradients must first agree with the loop in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from goose_mm.kernels import wkv7

RESULTS = Path(__file__).parent / "results" / "wkv7_cpu.json"
KERNELS = ("reference", "chunked")
TOLERANCE = 1e-5  # of the norm, float32


def make(B: int, T: int, H: int, N: int = 64) -> list[Tensor]:
    torch.manual_seed(0)
    r, d, k, v, kappa, a = torch.randn(6, B, T, H, N)
    log_w = -(torch.tensor(-0.5).exp() * torch.sigmoid(d))
    return [r, log_w, k, v, torch.nn.functional.normalize(kappa, dim=-1), torch.sigmoid(a)]


def forward(inputs: list[Tensor], kernel: str) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return wkv7(*inputs, kernel=kernel)


def training(inputs: list[Tensor], kernel: str) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    y, _ = wkv7(*inputs, kernel=kernel)
    return y, *torch.autograd.grad(y, inputs, torch.ones_like(y))


RUNS = {"forward": forward, "training": training}


def worst_error(inputs: list[Tensor]) -> float:
    """Of the chunked kernel's y and gradients, against the loop in float64."""
    want = training([x.double() for x in inputs], "reference")
    got = training(inputs, "chunked")
    errors = [(g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)]
    return max(error.item() for error in errors)


def race(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds of each, run in turns so that all see the same load.

    As many rounds as fit in `seconds`, three at least, after one to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while len(times["chunked"]) < 4 or time.perf_counter() - begin < seconds:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    summary = {"median": statistics.median, "least": min, "most": max, "runs": len}
    return {
        name: {key: round(f(each[1:]), 2) for key, f in summary.items()}
        for name, each in times.items()
    }


def peak_mib(run: Callable[[], object]) -> float:
    """The most that was allocated at once during one run, its results included."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True, acc_events=True) as profile:
        result = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return round(peak / 2**20, 1)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """Of this checkout, marked if it has changes; empty without git."""
    try:
        describe = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(describe, capture_output=True, text=True, cwd=RESULTS.parent)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small shape, nothing written")
    quick = parser.parse_args().quick
    shape = (1, 256, 4) if quick else (1, 2048, 12)
    inputs = make(*shape)

    error = worst_error(make(1, 300, 4))
    if not error <= TOLERANCE:
        sys.exit(f"chunked is off by {error:.1e} of the norm (allowed {TOLERANCE:.0e}): not timed")
    print(f"error {error:.1e} of the norm", file=sys.stderr)

    report = {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": f"{processor()}, {os.cpu_count()} CPU cores",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # of other processes, when this began
        "torch": torch.__version__,
        "shape": dict(zip("BTHN", (*shape, 64), strict=True)) | {"dtype": "float32"},
        "worst_error": float(f"{error:.1e}"),  # of y and gradients, against float64
    }
    for what, run in RUNS.items():
        runs = {kernel: partial(run, inputs, kernel) for kernel in KERNELS}
        rows = {k: {"ms": ms} for k, ms in race(runs, 1 if quick else 20).items()}
        rows["chunked"]["peak_mib"] = peak_mib(runs["chunked"])  # of the loop: too many events
        slow, fast = (rows[kernel]["ms"]["least"] for kernel in KERNELS)
        report[what] = rows | {"speedup": round(slow / fast, 1)}  # least: least disturbed
        print(f"{what}: {json.dumps(report[what])}", file=sys.stderr)
    if not quick:
        new = RESULTS.with_suffix(".new")
        new.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(new, RESULTS)


if __name__ == "__main__":
    main()
