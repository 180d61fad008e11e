"""How far rounding carries the recurrence from its exact value, by kernel, dtype and length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from goose_mm.kernels import available_kernels, wkv7

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = ("y", "state", "dr", "dlog_w", "dk", "dv", "dkappa", "da")


def inputs(
    T: int, hard: bool, device: torch.device, H: int = 2, N: int = 64, seed: int = 0
) -> list[Tensor]:
    """The six inputs `[1, T, H, N]` in float64: random ones, or a repeated key that is removed
    almost wholly (a = 0.99) under slow decay, where reads nearly cancel."""
    generator = torch.Generator().manual_seed(seed)
    r, d, k, v, kappa, a = torch.randn(6, 1, T, H, N, generator=generator, dtype=torch.float64)
    if hard:
        kappa, a, d = kappa[:, :1].expand_as(kappa), torch.full_like(a, 4.6), d - 6
    log_w = -(torch.tensor(-0.5).exp() * d.sigmoid())
    kappa = torch.nn.functional.normalize(kappa, dim=-1)
    return [x.to(device) for x in (r, log_w, k, v, kappa, a.sigmoid())]


def errors(kernel: str, dtype: torch.dtype, given: Sequence[Tensor]) -> dict[str, float]:
    """Relative to the norm of the exact value for the same rounded inputs: y, state, gradients."""
    given = [x.to(dtype) for x in given]
    dy = given[3].flip(1)
    exact = run([x.double() for x in given], dy.double(), "chunked")
    found = run(given, dy, kernel)
    return {
        name: ((x.double() - want).norm() / want.norm()).item()
        for name, x, want in zip(NAMES, found, exact, strict=True)
    }


def run(given: Sequence[Tensor], dy: Tensor, kernel: str) -> list[Tensor]:
    given = [x.detach().requires_grad_() for x in given]
    y, state = wkv7(*given, kernel=kernel)
    return [y.detach(), state.detach(), *torch.autograd.grad(y, given, dy)]


def measure(lengths: Sequence[int], device: str = "cpu") -> list[dict[str, Any]]:
    """Errors of every kernel that runs there."""
    rows = []
    for kernel, missing in available_kernels().items():
        if missing:
            continue
        for hard in (False, True):
            for name, dtype in DTYPES.items():
                for T in lengths:
                    given = inputs(T, hard, torch.device(device))
                    case = {"kernel": kernel, "dtype": name, "hard": hard, "length": T}
                    rows.append(case | errors(kernel, dtype, given))
    return rows


def report(out: Path, lengths: Sequence[int], device: str = "cpu") -> None:
    """Write precision.json and precision.svg into `out`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = measure(lengths, device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "precision.json").write_text(json.dumps(rows, indent=1) + "\n")
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, hard in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        shown = [row for row in rows if row["hard"] == hard]
        for kernel, name in dict.fromkeys((row["kernel"], row["dtype"]) for row in shown):
            line = [row for row in shown if (row["kernel"], row["dtype"]) == (kernel, name)]
            worst = [max(row[n] for n in NAMES) for row in line]
            axes.loglog([row["length"] for row in line], worst, "o-", label=f"{kernel}, {name}")
        axes.set_title("repeated key, a 0.99, slow decay" if hard else "random inputs")
        axes.set_xlabel("length")
    axes.legend(fontsize="x-small")
    figure.axes[0].set_ylabel("worst relative error")
    with rc_context({"svg.hashsalt": "goose_mm"}):
        figure.savefig(out / "precision.svg", format="svg", metadata={"Date": None})
