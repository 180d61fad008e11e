"""WKV-7 as PyTorch knows it: an operator of torch.library for what is traced, else a function.

Every kernel is a module with `unavailable(device, dtype, head_size)`, `empty_saved(...)`,
`forward(...)`, `backward(...)` as in `chunked.py`, and one line in KERNELS below.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from goose_mm.kernels import chunked, cuda, triton
from goose_mm.kernels.reference import by_definition, work_dtype

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences)
# D directions, K states saved for the backward pass

REVERSE = {"forward": (False,), "backward": (True,), "both": (False, True)}
# First choice first; "reference" stands for the definition itself.
KERNELS = {"cuda": cuda, "triton": triton, "chunked": chunked}
PLAIN = (Tensor, torch.nn.Parameter)
INPUTS = "Tensor r, Tensor log_w, Tensor k, Tensor v, Tensor kappa, Tensor a"
INPUTS += ", Tensor? state, Tensor? cu_seqlens"


def scan(
    inputs: tuple[Tensor, ...],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    direction: str,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """y `[*D, B, T, H, N]` and the last states `[*D, S, H, N, N]`, with gradients to all inputs.

    Two directions are stacked, one is not.
    """
    tensors = inputs if state is None else (*inputs, state)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    arguments = (*inputs, state, cu_seqlens, direction, kernel, save)
    if torch.compiler.is_compiling() or not all(type(x) in PLAIN for x in tensors):
        y, last, _ = wkv7_forward(*arguments)
        return unstacked(direction, y, last)
    # to call an operator written in Python takes longer than many a scan
    return Scan.apply(*arguments)


def unstacked(direction: str, y: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Without the axis of directions, unless there are two."""
    return (y, last) if direction == "both" else (y.squeeze(0), last.squeeze(0))


def host_offsets(cu_seqlens: Tensor | None, tokens: int) -> list[int] | None:
    """The offsets on the host, checked. On CUDA this waits for the device."""
    if cu_seqlens is None:
        return None
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {tokens}, got {offsets}")
    return offsets


def kernel_offsets(kernel: str, cu_seqlens: Tensor | None, tokens: int) -> Any:
    """The offsets as a kernel wants them; on the device they are neither checked nor waited for."""
    return host_offsets(cu_seqlens, tokens) if kernel == "chunked" else cu_seqlens


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def run_forward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    direction: str,
    kernel: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y `[D, B, T, H, N]`, last states `[D, S, H, N, N]`, and what is saved for `run_backward`."""
    inputs, offsets = (r, log_w, k, v, kappa, a), kernel_offsets(kernel, cu_seqlens, r.shape[1])
    with without_autocast(r.device):
        return KERNELS[kernel].forward(inputs, state, offsets, REVERSE[direction], save)


def run_backward(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    kappa: Tensor,
    a: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: Tensor,
    dy: Tensor | None,
    dlast: Tensor | None,
    direction: str,
    kernel: str,
    spend: bool = False,
) -> list[Tensor]:
    """Gradients of the six inputs and of the initial states.

    `spend`: `saved` is not needed any more, and they may take its place.
    """
    inputs, offsets = (r, log_w, k, v, kappa, a), kernel_offsets(kernel, cu_seqlens, r.shape[1])
    with without_autocast(r.device):
        grads, first = KERNELS[kernel].backward(
            inputs, state, offsets, REVERSE[direction], saved, dy, dlast, spend
        )
    return [*grads, first]


wkv7_forward = torch.library.custom_op(
    "goose_mm::wkv7_forward",
    run_forward,
    mutates_args=(),
    schema=f"({INPUTS}, str direction, str kernel, bool save) -> (Tensor, Tensor, Tensor)",
)
wkv7_backward = torch.library.custom_op(
    "goose_mm::wkv7_backward",
    run_backward,
    mutates_args=(),
    schema=f"({INPUTS}, Tensor saved, Tensor? dy, Tensor? dlast, str direction, str kernel)"
    " -> Tensor[]",
)


@wkv7_forward.register_fake
def _(r, log_w, k, v, kappa, a, state, cu_seqlens, direction, kernel, save):
    B, T, H, N = r.shape
    D, S = len(REVERSE[direction]), B if cu_seqlens is None else len(cu_seqlens) - 1
    return (
        r.new_empty(D, B, T, H, N),
        r.new_empty(D, S, H, N, N, dtype=work_dtype(r.dtype)),
        KERNELS[kernel].empty_saved(r, D, S, save),
    )


@wkv7_backward.register_fake
def _(r, log_w, k, v, kappa, a, state, cu_seqlens, saved, dy, dlast, direction, kernel):
    B, _, H, N = r.shape
    D, S = len(REVERSE[direction]), B if cu_seqlens is None else len(cu_seqlens) - 1
    first = r.new_empty(D, S, H, N, N, dtype=work_dtype(r.dtype))
    return [*(x.new_empty(x.shape) for x in (r, log_w, k, v, kappa, a)), first]


def save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.direction, ctx.kernel, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def backward(ctx, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None):
    return gradients(ctx, dy, dlast, torch.ops.goose_mm.wkv7_backward)


wkv7_forward.register_autograd(backward, setup_context=save_for_backward)


class Scan(torch.autograd.Function):
    """The same without the operator."""

    @staticmethod
    def forward(ctx, *arguments):
        y, last, saved = run_forward(*arguments)
        save_for_backward(ctx, arguments, (y, last, saved))
        ctx.spent = False
        return unstacked(ctx.direction, y, last)

    @staticmethod
    def backward(ctx, *given):
        dy, dlast = given
        if ctx.direction != "both":
            dy, dlast = (None if x is None else x.unsqueeze(0) for x in given)
        return gradients(ctx, dy, dlast, partial(Scan.spend, ctx))

    @staticmethod
    def spend(ctx, *arguments: Any) -> list[Tensor]:
        """`run_backward`, whose gradients may lie where what was saved does."""
        forward: Callable[..., Any] = run_forward
        backward: Callable[..., list[Tensor]] = run_backward
        *tensors, saved, dy, dlast, direction, kernel = arguments
        if ctx.spent:  # retain_graph=True: they do
            _, _, saved = forward(*tensors, direction, kernel, True)
        ctx.spent = True
        return backward(*tensors, saved, dy, dlast, direction, kernel, spend=True)


def gradients(
    ctx, dy: Tensor | None, dlast: Tensor | None, run: Callable[..., list[Tensor]]
) -> tuple[Any, ...]:
    """For each argument of `wkv7_forward`."""
    *inputs, state, cu_seqlens, saved = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
        grads = backward_by_definition(inputs, state, cu_seqlens, ctx.direction, dy, dlast)
    else:
        *found, first = run(*inputs, state, cu_seqlens, saved, dy, dlast, ctx.direction, ctx.kernel)
        grads = [*found, None if state is None else first.to(state.dtype)]
    return (*grads, None, None, None, None)


def backward_by_definition(
    inputs: list[Tensor],
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    direction: str,
    dy: Tensor | None,
    dlast: Tensor | None,
) -> list[Tensor | None]:
    """The same gradients from the loop over time: differentiable, but memory grows with T N^2."""
    inputs = [x.view_as(x) for x in inputs]  # apart, should one tensor be given twice
    state = None if state is None else state.view_as(state)
    wanted = [x for x in (*inputs, state) if x is not None and x.requires_grad]
    with without_autocast(inputs[0].device):
        offsets = host_offsets(cu_seqlens, inputs[0].shape[1])
        outputs = by_definition(inputs, state, offsets, REVERSE[direction])
        pairs = [(y, d) for y, d in zip(outputs, (dy, dlast), strict=True) if d is not None]
        ys, dys = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in (*inputs, state)]
