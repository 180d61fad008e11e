"""WKV-7 in Triton, for CUDA devices: buffers, grids, launches.

The programs are in `triton_scan.py`, which is imported on first use. Besides inputs, outputs and
gradients, a training step holds a state per chunk in float32, and twice that during the backward
pass: N * N / CHUNK numbers per token and head each time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences), D directions
# K saved states, between chunks of CHUNK tokens

CHUNK = 16
VALUES = 32  # rows of the state in a program that walks over a sequence
WARPS = 4  # of such a program
HEAD_SIZE = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST_LOG_W = -5.0  # a product of two exp(40) still fits float32


def unavailable(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why this kernel cannot run there; empty if it can."""
    if head_size != HEAD_SIZE:  # may be symbolic, under torch.compile(dynamic=True)
        return f"it takes heads of size {HEAD_SIZE}, not {head_size}"
    return lacking(device, dtype)


def lacking(device: torch.device, dtype: torch.dtype) -> str:
    """What the device or the installation lacks; empty if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; it exists for Linux)"
    if dtype not in DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, the tensors are on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} has no tf32 products (compute capability 8.0)"
    return ""


# As torch.compiler.assume_constant_result does, which imports the whole compiler to say so:
# torch.compile asks once while it traces, rather than trace the question.
vars(lacking)["_dynamo_marked_constant"] = True


def empty_saved(r: Float[Tensor, "B T H N"], directions: int, save: bool) -> Tensor:
    """Room for the states a backward pass needs: [D, K, B, H, N, N] in float32, K = 0 if none."""
    B, T, H, N = r.shape
    slots = (T - 1) // CHUNK if save else 0
    return r.new_empty(directions, slots, B, H, N, N, dtype=torch.float32)


def forward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
    save: bool,
) -> tuple[Float[Tensor, "D B T H N"], Float[Tensor, "D S H N N"], Float[Tensor, "D K B H N N"]]:
    """y, the last states, and the states between chunks (K = 0 unless `save`).

    As `chunked.forward`, but `cu_seqlens` stays on the device: neither checked nor waited for.
    Raises ValueError for a decay this kernel cannot take (on CUDA, a device-side assertion).
    """
    from goose_mm.kernels import triton_scan

    inputs = [x.contiguous() for x in inputs]
    r = inputs[0]
    B, T, H, N = r.shape
    D, S = len(reverse), B if cu_seqlens is None else len(cu_seqlens) - 1
    y = r.new_empty(D, B, T, H, N)
    last = start(state, (D, S, H, N, N), r)
    saved = empty_saved(r, D, save)
    fixed = constants(r, reverse)
    with torch.cuda.device_of(r):
        inverse, _, fits = inverses(inputs, cu_seqlens, reverse)
        check_decay(fits)
        launch(
            triton_scan.scan, (S * H, D, N // VALUES),
            *inputs, inverse, cu_seqlens, y, last, saved,
            T, H, B, inverse.shape[1], M=VALUES, SAVE=save, num_warps=WARPS, **fixed,
        )  # fmt: skip
    return y, last, saved


def backward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
    saved: Float[Tensor, "D K B H N N"],
    dy: Float[Tensor, "D B T H N"] | None,
    dlast: Float[Tensor, "D S H N N"] | None,
) -> tuple[list[Float[Tensor, "B T H N"]], Float[Tensor, "D S H N N"]]:
    """Gradients of the six inputs, each in its dtype, and of the initial states."""
    from goose_mm.kernels import triton_scan

    inputs = [x.contiguous() for x in inputs]
    r = inputs[0]
    B, T, H, N = r.shape
    D, S = len(reverse), B if cu_seqlens is None else len(cu_seqlens) - 1
    dy = r.new_zeros(D, B, T, H, N) if dy is None else dy.contiguous()
    first = start(dlast, (D, S, H, N, N), r)
    state = None if state is None else state.float().contiguous()
    grads = [r.new_empty(D, *x.shape, dtype=torch.float32 if D > 1 else x.dtype) for x in inputs]
    reads = [r, inputs[1], *inputs[4:]]
    fixed = constants(r, reverse)
    with torch.cuda.device_of(r):
        inverse, owner, _ = inverses(inputs, cu_seqlens, reverse)
        slots = inverse.shape[1]
        dsaved = r.new_empty(D, slots, B, H, N, N, dtype=torch.float32)
        launch(
            triton_scan.scan_back, (S * H, D, N // VALUES),
            *reads, inverse, cu_seqlens, dy, first, dsaved,
            T, H, B, slots, M=VALUES, num_warps=WARPS, **fixed,
        )  # fmt: skip
        launch(
            triton_scan.gradients, (slots * B * H, D),
            *inputs, inverse, cu_seqlens, owner, state, saved, dsaved, dy, *grads,
            T, H, B, slots, S, num_warps=8, **fixed,
        )  # fmt: skip
    if D > 1:
        return [(g[0] + g[1]).to(x.dtype) for g, x in zip(grads, inputs, strict=True)], first
    return [g[0] for g in grads], first


def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Where a type checker cannot follow: Triton puts the grid between a program and its call."""
    program[grid](*arguments, **options)


def constants(r: Float[Tensor, "B T H N"], reverse: Sequence[bool]) -> dict[str, int | bool]:
    """What a program is compiled for."""
    exact = r.dtype == torch.float32
    return {"N": HEAD_SIZE, "Q": CHUNK, "REVERSE": int(reverse[0]), "EXACT": exact}


def start(given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "D S H N N"]:
    """A copy in float32 that a scan may overwrite, or zeros."""
    if given is None:
        return like.new_zeros(shape, dtype=torch.float32)
    return given.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def inverses(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
) -> tuple[Float[Tensor, "D slots B H Q Q"], Int[Tensor, " slots"] | None, Int[Tensor, ""]]:
    """The inverse matrix of each chunk; its sequence; 0 if a decay is below LOWEST_LOG_W.

    Chunk c of a packed sequence s lies in slot `cu_seqlens[s] // CHUNK + c + s`, which no other
    chunk shares; some slots stay empty.
    """
    from goose_mm.kernels import triton_scan

    _, log_w, _, _, kappa, a = inputs
    B, T, H, N = log_w.shape
    slots, owner = -(-T // CHUNK), None
    if cu_seqlens is not None:
        sequences = len(cu_seqlens) - 1
        slots += sequences - 1
        starts = cu_seqlens[:-1] // CHUNK + torch.arange(sequences, device=log_w.device)
        owner = torch.searchsorted(starts, torch.arange(slots, device=log_w.device), right=True) - 1
    inverse = log_w.new_empty(len(reverse), slots, B, H, CHUNK, CHUNK, dtype=torch.float32)
    fits = torch.ones((), dtype=torch.int32, device=log_w.device)
    launch(
        triton_scan.invert, (slots * B * H, len(reverse)),
        log_w, kappa, a, cu_seqlens, owner, inverse, fits, T, H, B, slots,
        LOWEST=LOWEST_LOG_W, N=N, Q=CHUNK, REVERSE=int(reverse[0]), num_warps=1,
    )  # fmt: skip
    return inverse, owner, fits


def check_decay(fits: Int[Tensor, ""]) -> None:
    """An error, where silence would mean NaN; on CUDA one that waits for nothing."""
    message = f"wkv7: log_w below {LOWEST_LOG_W}, the lowest that kernel 'triton' takes"
    if fits.is_cuda:
        torch._assert_async(fits, message)
    elif not fits:
        raise ValueError(f"{message} (RWKV-7 itself stays above -0.607); use kernel='reference'")
