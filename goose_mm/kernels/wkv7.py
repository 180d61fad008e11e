"""The WKV-7 operator: contract, shape checks, choice of the kernel."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goose_mm.kernels.autograd import (
    KERNELS,
    REVERSE,
    host_offsets,
    scan,
    traced,
    transformed,
    unstacked,
    without_autocast,
)
from goose_mm.kernels.reference import by_definition

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences)

Direction = Literal["forward", "backward", "both"]
NAMES = ("r", "log_w", "k", "v", "kappa", "a")
RWKV7_LOWEST = -math.exp(-0.5)  # log_w = RWKV7_LOWEST * sigmoid(d)


def wkv7(
    r: Float[Tensor, "B T H N"],
    log_w: Float[Tensor, "B T H N"],
    k: Float[Tensor, "B T H N"],
    v: Float[Tensor, "B T H N"],
    kappa: Float[Tensor, "B T H N"],
    a: Float[Tensor, "B T H N"],
    state: Float[Tensor, "*D S H N N"] | None = None,
    *,
    cu_seqlens: Int[Tensor, " n"] | None = None,
    direction: Direction = "forward",
    kernel: str = "auto",
) -> tuple[Float[Tensor, "*D B T H N"], Float[Tensor, "*D S H N N"]]:
    """The RWKV-7 recurrence: for each token, in each head,

        S <- S diag(exp(log_w)) - (S kappa)(kappa * a)^T + v k^T        y = S r

    `S` is `[value, key]`; `S kappa` reads it before the decay, `y` after the update.

    Args:
        r, k, v: receptance, key, value, `[B, T, H, N]`, T >= 1, any floating dtype.
        log_w: log of the decay, <= 0. RWKV-7 has `-exp(-0.5) * sigmoid(d)`, so above -0.6066; the
            kernel "cuda" takes -0.7 or more, "triton" too for 16-bit tensors and -5 for float32,
            "chunked" -2.75, "reference" anything: by name, all fail loudly below.
        kappa: removal key of unit norm. a: in-context learning rate in [0, 1], or up to 2.
        state: the state to start from, `[S, H, N, N]` with S = B; None means zeros. Never modified.
        cu_seqlens: offsets `[S + 1]` (int32 or int64, first 0, last T) of S sequences packed
            along T, with B = 1. Each starts from its own state; empty ones are allowed.
        direction: "backward" runs from the last token (of each sequence) to the first. "both" runs
            each way and stacks, forward first: y `[2, B, T, H, N]`, states `[2, S, H, N, N]`.
        kernel: a name in `available_kernels()`, or "auto" for the best that works here and takes
            the lowest log_w. On CUDA, to know that is to wait for the device: a caller who knows
            it already gives the name that `choose` answers, as the models here do.

    Returns:
        y in the dtype of `r`, and the last state in float32 (float64 if `r` is). Both carry
        gradients to all inputs, each in its input's dtype, the same bits from run to run.

    Raises:
        ValueError: shapes or offsets that do not fit, an unknown or unusable kernel.

    The kernel "cuda" takes all inputs in the dtype of `r`, and operands of products in 11 bits;
    "chunked" works in float32 throughout, and reads `cu_seqlens` on the host, which waits for a
    CUDA device.
    """
    if state is not None and direction != "both":
        state = state[None]
    inputs = (r, log_w, k, v, kappa, a)
    check(inputs, state, cu_seqlens, direction)
    lowest = lowest_of(log_w) if kernel == "auto" else RWKV7_LOWEST
    kernel = choose(kernel, r.device, r.dtype, r.shape[-1], lowest)
    if kernel == "reference":
        with without_autocast(r.device):
            offsets = host_offsets(cu_seqlens, r.shape[1])
            y, last = by_definition(inputs, state, offsets, REVERSE[direction])
        return unstacked(direction, y, last)
    return scan(inputs, state, cu_seqlens, direction, kernel)


def available_kernels() -> dict[str, str]:
    """Every kernel by name, with the reason why it cannot be used here: empty if it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = {
        name: module.unavailable(device, torch.float32, 64) for name, module in KERNELS.items()
    }
    return {**names, "reference": ""}


def choose(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    lowest: float = RWKV7_LOWEST,
) -> str:
    """The kernel to use: "auto" takes the first that works, for tensors without a log_w below
    `lowest`; a named one that does not work raises."""
    if kernel not in ("auto", *KERNELS, "reference"):
        raise ValueError(f"unknown kernel {kernel!r}; known: {['auto', *KERNELS, 'reference']}")
    if device.type == "meta":
        return "chunked"  # nothing is computed, and shapes are the same for all
    if kernel == "auto":
        # cuda's products take 11 bits: enough for 16-bit tensors, but float32 asks for more
        names = (n for n in KERNELS if n != "cuda" or dtype != torch.float32)
        able = (n for n in names if not KERNELS[n].unavailable(device, dtype, head_size))
        return next((n for n in able if lowest >= KERNELS[n].lowest_log_w(dtype)), "reference")
    if kernel in KERNELS and (reason := KERNELS[kernel].unavailable(device, dtype, head_size)):
        raise ValueError(f"kernel {kernel!r} cannot be used here: {reason}")
    return kernel


def lowest_of(log_w: Tensor) -> float:
    """The lowest log_w; where values cannot be looked at, that of RWKV-7."""
    captured = log_w.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or traced([log_w]) or transformed():
        return RWKV7_LOWEST
    return log_w.detach().amin().item()


def check(
    inputs: tuple[Tensor, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    direction: str,
) -> None:
    """ValueError for what does not fit together; `state` has its leading axis of directions."""
    if direction not in REVERSE:
        raise ValueError(f"direction={direction!r} is none of {list(REVERSE)}")
    r = inputs[0]
    if r.ndim != 4 or r.numel() == 0:
        raise ValueError(f"r has shape {list(r.shape)}; wanted [B, T, H, N], none of them 0")
    for name, x in zip(NAMES, inputs, strict=True):
        if x.shape != r.shape or x.device != r.device or not x.is_floating_point():
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}, r is {r.dtype} "
                f"{list(r.shape)} on {r.device}: give floating tensors of one shape and device"
            )
    B, _, H, N = r.shape
    if cu_seqlens is not None:
        if B != 1:
            raise ValueError(f"cu_seqlens packs sequences along T, with B = 1; r has B = {B}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; wanted integers, "
                "one more than there are sequences"
            )
    if state is not None:
        sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        wanted = [len(REVERSE[direction]), sequences, H, N, N]
        if list(state.shape) != wanted or state.device != r.device:
            given, wanted = (s[1:] if wanted[0] == 1 else s for s in (list(state.shape), wanted))
            raise ValueError(
                f"state is {given} on {state.device}; direction={direction!r} and these inputs "
                f"want {wanted} on {r.device}"
            )
