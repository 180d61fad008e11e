"""WKV-7 in Triton, for CUDA devices: buffers, grids, launches.

The programs are in `scan.py` and `gradients.py`, imported on first use. Besides
inputs, outputs and gradients, a training step holds a state per chunk of 16 tokens: as much as 4
tensors of the inputs' size. While a forward pass runs it takes room for 5 such tensors more, a
backward pass for 9.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goose_mm.kernels.reference import Size, saved_states

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences), D directions
# K saved states, between chunks of CHUNK tokens

CHUNK = 16
HEAD_SIZE = 64
# The type of operands and saved states, and the lowest log_w for which they fit: exp(8 * 0.7), but
# in float32 the product of two exp(8 * 5).
WORK = {
    torch.float32: (torch.float32, -5.0),
    torch.bfloat16: (torch.float16, -0.7),
    torch.float16: (torch.float16, -0.7),
}
# How each program is launched, by the type of operands. A scan's grid divides the values (rows of
# the state) into blocks of M; the next STAGES - 1 chunks are on their way while one is worked on.
# M is 64 or there is one warp: then results of products stay in registers as the next operands.
# `maxnreg` lets one more program run on a multiprocessor, which is worth the few registers spilled.
HALF, SINGLE = torch.float16, torch.float32
PREPARE = {HALF: {"num_warps": 1, "maxnreg": 168}, SINGLE: {"num_warps": 1}}
SCAN = {
    HALF: {"M": 16, "STAGES": 3, "num_warps": 1},
    SINGLE: {"M": 16, "STAGES": 2, "num_warps": 2},
}
SCAN_BACK = {
    HALF: {"M": 32, "STAGES": 3, "num_warps": 1},
    SINGLE: {"M": 16, "STAGES": 2, "num_warps": 2},
}
GRADIENTS = {HALF: {"num_warps": 4, "maxnreg": 168}, SINGLE: {"num_warps": 8}}


def unavailable(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why this kernel cannot run there; empty if it can."""
    if head_size != HEAD_SIZE:  # may be symbolic, under torch.compile(dynamic=True)
        return f"it takes heads of size {HEAD_SIZE}, not {head_size}"
    return lacking(device, dtype)


def lacking(device: torch.device, dtype: torch.dtype) -> str:
    """What the device or the installation lacks; empty if nothing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; it exists for Linux)"
    if dtype not in WORK:
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


def lowest_log_w(dtype: torch.dtype) -> float:
    return WORK[dtype][1]


def empty_saved(r: Float[Tensor, "B T H N"], directions: int, states: Size, save: bool) -> Tensor:
    """Room for the states a backward pass needs: [D, K, B, H, N, N], K = 0 if none."""
    B, T, H, N = r.shape
    K = saved_states(T, CHUNK, save)
    return r.new_empty(directions, K, B, H, N, N, dtype=WORK[r.dtype][0])


def forward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
    save: bool,
) -> tuple[Float[Tensor, "D B T H N"], Float[Tensor, "D S H N N"], Float[Tensor, "D K B H N N"]]:
    """y, the last states, and the states before each chunk but the first (K = 0 unless `save`).

    As `chunked.forward`, but `cu_seqlens` stays on the device: neither checked nor waited for.
    Raises ValueError for a decay this kernel cannot take (on CUDA, a device-side assertion).
    """
    from goose_mm.kernels.triton import scan

    inputs = [x.contiguous() for x in inputs]
    r, v = inputs[0], inputs[3]
    B, T, H, N = r.shape
    D, S = len(reverse), B if cu_seqlens is None else len(cu_seqlens) - 1
    y = r.new_empty(D, B, T, H, N)
    last = start(state, (D, S, H, N, N), r)
    saved = empty_saved(r, D, S, save)
    options = SCAN[saved.dtype]
    with torch.cuda.device_of(r):
        made = prepared(inputs, cu_seqlens, reverse, back=False)
        check_decay(made.fits, r.dtype)
        launch(
            scan.scan, (S * H * (N // options["M"]), D),
            v, made.chunks, made.decays, cu_seqlens, y, last, saved,
            T, H, B, made.slots, SAVE=save, **options, **constants(reverse),
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
    spend: bool = False,
) -> tuple[list[Float[Tensor, "B T H N"]], Float[Tensor, "D S H N N"]]:
    """Gradients of the six inputs, each in its dtype, and of the initial states.

    `spend`: whether they may take the place of `saved`, which is left as it is here.
    """
    from goose_mm.kernels.triton import gradients, scan

    inputs = [x.contiguous() for x in inputs]
    r = inputs[0]
    B, T, H, N = r.shape
    D, S = len(reverse), B if cu_seqlens is None else len(cu_seqlens) - 1
    dy = r.new_zeros(D, B, T, H, N) if dy is None else dy.contiguous()
    first = start(dlast, (D, S, H, N, N), r)
    state = None if state is None else state.float().contiguous()
    grads = [r.new_empty(D, *x.shape, dtype=torch.float32 if D > 1 else x.dtype) for x in inputs]
    options = SCAN_BACK[saved.dtype]
    with torch.cuda.device_of(r):
        made = prepared(inputs, cu_seqlens, reverse, back=True)
        dsaved = saved.new_empty(D, made.slots, B, H, N, N)
        scales = made.decays.new_empty(D, made.slots, B, H, N)
        launch(
            scan.scan_back, (S * H * (N // options["M"]), D),
            dy, made.chunks, made.decays, cu_seqlens, first, dsaved, scales,
            T, H, B, made.slots, **options, **constants(reverse),
        )  # fmt: skip
        launch(
            gradients.gradients, (made.slots * H, B, D),
            *inputs, made.chunks, made.decays, cu_seqlens, made.owner,
            state, saved, dsaved, scales, dy, *grads,
            T, H, B, made.slots, S, **GRADIENTS[saved.dtype], **constants(reverse),
        )  # fmt: skip
    if D > 1:
        return [(g[0] + g[1]).to(x.dtype) for g, x in zip(grads, inputs, strict=True)], first
    return [g[0] for g in grads], first


def launch(program: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Where a type checker cannot follow: Triton puts the grid between a program and its call."""
    program[grid](*arguments, **options)


def constants(reverse: Sequence[bool]) -> dict[str, int]:
    """What every program is compiled for."""
    return {"N": HEAD_SIZE, "Q": CHUNK, "REVERSE": int(reverse[0])}


def start(given: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "D S H N N"]:
    """A copy in float32 that a scan may overwrite, or zeros."""
    if given is None:
        return like.new_zeros(shape, dtype=torch.float32)
    return given.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


class Prepared(NamedTuple):
    """What is made of all chunks before any state is known."""

    chunks: Float[Tensor, "D slots B H numbers"]  # operands of products: see chunk.py
    decays: Float[Tensor, "D slots B H N"]  # of the state over half of the chunk
    owner: Int[Tensor, " slots"] | None  # the packed sequence that a slot belongs to
    fits: Int[Tensor, ""]  # 0 if a decay is too low

    @property
    def slots(self) -> int:
        return self.decays.shape[1]


def prepared(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
    back: bool,
) -> Prepared:
    """All chunks, for the way forward or `back`.

    Chunk c of a packed sequence s lies in slot `cu_seqlens[s] // CHUNK + c + s`, which no other
    chunk shares; some slots stay empty.
    """
    from goose_mm.kernels.triton import chunk, scan

    r, log_w, k, _, kappa, a = inputs
    B, T, H, N = r.shape
    slots, owner = -(-T // CHUNK), None
    if cu_seqlens is not None:
        sequences = len(cu_seqlens) - 1
        slots += sequences - 1
        starts = cu_seqlens[:-1] // CHUNK + torch.arange(sequences, device=r.device)
        owner = torch.searchsorted(starts, torch.arange(slots, device=r.device), right=True) - 1
    work, lowest = WORK[r.dtype]
    numbers = chunk.TILES.value * CHUNK * N + chunk.SQUARES.value * CHUNK * CHUNK
    chunks = r.new_empty(len(reverse), slots, B, H, numbers, dtype=work)
    decays = r.new_empty(len(reverse), slots, B, H, N, dtype=torch.float32)
    fits = torch.ones((), dtype=torch.int32, device=r.device)
    launch(
        scan.prepare, (slots * H, B, len(reverse)),
        r, log_w, k, kappa, a, cu_seqlens, owner, chunks, decays, fits,
        T, H, B, slots, LOWEST=lowest, BACK=back, **PREPARE[work], **constants(reverse),
    )  # fmt: skip
    return Prepared(chunks, decays, owner, fits)


def check_decay(fits: Int[Tensor, ""], dtype: torch.dtype) -> None:
    """An error, where silence would mean NaN; on CUDA one that waits for nothing."""
    lowest = WORK[dtype][1]
    message = f"wkv7: log_w below {lowest}, the lowest that kernel 'triton' takes for {dtype}"
    if fits.is_cuda:
        torch._assert_async(fits, message)
    elif not fits:
        raise ValueError(f"{message} (RWKV-7 itself stays above -0.607); use kernel='reference'")
