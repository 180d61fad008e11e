"""WKV-7 in chunks, in plain PyTorch: matrix products instead of a loop over tokens.

The batch is cut into spans of a few chunks (`spans.py`), each small enough for the caches;
`chunks.py` holds the algebra of one. The backward pass recomputes a span from the state before it:
besides inputs, outputs and gradients only these states, N / SPAN of one input in float32, grow
with T.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from jaxtyping import Float
from torch import Tensor

from goose_mm.kernels.chunked.chunks import BackWork, Masks, Work, outputs, run, run_back
from goose_mm.kernels.chunked.spans import CHUNK, SPAN, plan
from goose_mm.kernels.reference import Size, reference, saved_states, work_dtype

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences), D directions
# K states between spans

LOWEST_LOG_W = -44 / CHUNK  # a product of two exp(44) still fits float32


def unavailable(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why this kernel cannot run there: never, it is the one that runs everywhere."""
    return ""


def lowest_log_w(dtype: torch.dtype) -> float:
    return LOWEST_LOG_W


def empty_saved(r: Float[Tensor, "B T H N"], directions: int, states: Size, save: bool) -> Tensor:
    """Room for the states a backward pass needs: [D, K, B, H, N, N], K = 0 if none."""
    B, T, H, N = r.shape
    K = saved_states(T, SPAN, save)
    return r.new_empty(directions, K, B, H, N, N, dtype=work_dtype(r.dtype))


def forward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    offsets: list[int] | None,
    reverse: Sequence[bool],
    save: bool,
) -> tuple[Float[Tensor, "D B T H N"], Float[Tensor, "D S H N N"], Float[Tensor, "D K B H N N"]]:
    """y, the last states, and the states between spans (K = 0 unless `save`).

    `inputs` are r, log_w, k, v, kappa, a; there is one direction per entry of `reverse`.
    Raises ValueError for a decay this kernel cannot take.
    """
    r = inputs[0]
    B, T, H, N = r.shape
    D, S = len(reverse), B if offsets is None else len(offsets) - 1
    work = work_dtype(r.dtype)
    check_decay(inputs[1])
    y = r.new_empty(D, B, T, H, N)
    last = r.new_zeros(D, S, H, N, N, dtype=work) if state is None else state.to(work, copy=True)
    saved = empty_saved(r, D, S, save)
    saved[:, -2:] = 0  # never used: the operator's results are the same every time
    masks, room = cache(partial(Masks.of, like=last)), cache(partial(Work.empty, like=last))
    for d, backwards in enumerate(reverse):
        for states, spans in plan(r, offsets, backwards):
            current = last[d, states]
            for span in spans:
                if save and span.slot >= 0:
                    saved[d, span.slot, span.rows] = current
                if span.tokens == 1:  # quicker as the recurrence itself
                    token = [span.part(x).to(work) for x in inputs]
                    span.part(y[d])[:], current = reference(*token, state=current)
                else:
                    tiles = [span.load(x, work) for x in inputs]
                    f = room(len(tiles[0]), current.shape[:2].numel(), span.chunk, N)
                    run(tiles, current, masks(span.chunk), f)
                    span.unload(outputs(f).view(tiles[0].shape), y[d])
                    current = f.states[-1].view_as(current)
            last[d, states] = current
    return y, last, saved


def backward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    offsets: list[int] | None,
    reverse: Sequence[bool],
    saved: Float[Tensor, "D K B H N N"],
    dy: Float[Tensor, "D B T H N"] | None,
    dlast: Float[Tensor, "D S H N N"] | None,
    spend: bool = False,
) -> tuple[list[Float[Tensor, "B T H N"]], Float[Tensor, "D S H N N"]]:
    """Gradients of the six inputs, each in its dtype, and of the initial states.

    `spend`: whether they may take the place of `saved`, which is left as it is here.
    """
    r = inputs[0]
    B, _, H, N = r.shape
    D, S = len(reverse), B if offsets is None else len(offsets) - 1
    work = work_dtype(r.dtype)
    grads = [x.new_empty(x.shape) for x in inputs]
    first = r.new_zeros(D, S, H, N, N, dtype=work) if dlast is None else dlast.to(work, copy=True)
    masks, room = cache(partial(Masks.of, like=first)), cache(partial(Work.empty, like=first))
    back_room = cache(partial(BackWork.empty, like=first))
    for d, backwards in enumerate(reverse):
        for states, spans in plan(r, offsets, backwards):
            dstate = first[d, states]
            for span in reversed(spans):
                if span.slot >= 0:
                    before = saved[d, span.slot, span.rows]
                elif state is not None:
                    before = state[d, states].to(work)
                else:
                    before = torch.zeros_like(dstate)
                tiles = [span.load(x, work) for x in inputs]
                dout = torch.zeros_like(tiles[0]) if dy is None else span.load(dy[d], work)
                size = len(tiles[0]), dstate.shape[:2].numel(), span.chunk, N
                f, b = room(*size), back_room(*size)
                parts, dfirst = run_back(tiles, before, dout, dstate, masks(span.chunk), f, b)
                dstate = dfirst.view_as(dstate)
                for grad, part in zip(grads, parts, strict=True):
                    span.unload(part, grad, add=d > 0)
            first[d, states] = dstate
    return grads, first


def check_decay(log_w: Tensor) -> None:
    """Below LOWEST_LOG_W exp(-g) might overflow: an error, where silence would mean NaN.

    On CUDA a device-side assertion, since to read the value would be to wait for the device.
    """
    lowest = log_w.amin()
    if log_w.is_cuda:
        torch._assert_async(~(lowest < LOWEST_LOG_W), "wkv7: log_w too low for kernel 'chunked'")
    elif lowest < LOWEST_LOG_W:
        raise ValueError(
            f"log_w = {lowest.item():.4g} is below {LOWEST_LOG_W:.4g}, the lowest that kernel "
            "'chunked' takes (RWKV-7 itself stays above -0.607); use kernel='reference'"
        )
