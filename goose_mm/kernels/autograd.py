"""WKV-7 as PyTorch knows it: an operator of torch.library for what is traced, else a function.

Every kernel is a module with `unavailable(device, dtype, head_size)`, `lowest_log_w(dtype)`,
`empty_saved(...)`, `forward(...)`, `backward(...)` as in `chunked/scan.py`, and one line in KERNELS
below. torch.func goes through the functions; how vmap joins samples is in `samples.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from goose_mm.kernels import chunked, cuda, triton
from goose_mm.kernels.reference import by_definition, work_dtype
from goose_mm.kernels.samples import BATCH, join, joined, part

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
    tensors = (*inputs, state, cu_seqlens)
    arguments = (*tensors, direction, kernel, will_need_gradients(tensors))
    if traced(tensors):
        y, last, _ = wkv7_forward(*arguments)
        return unstacked(direction, y, last)
    # to call an operator written in Python takes longer than many a scan
    y, last, _ = Scan.apply(*arguments)
    return y, last


def traced(tensors: Sequence[Tensor | None]) -> bool:
    """Whether tensors may have no values: under torch.compile or export, on the meta device."""
    return torch.compiler.is_compiling() or any(
        x.is_meta or type(x) not in PLAIN for x in tensors if x is not None
    )


def transformed() -> bool:
    """Whether a transform of torch.func is at work, for which tensors stand for others."""
    return torch._C._are_functorch_transforms_active()


def will_need_gradients(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
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
    D, S = len(REVERSE[direction]), B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        r.new_empty(D, B, T, H, N),
        r.new_empty(D, S, H, N, N, dtype=work_dtype(r.dtype)),
        KERNELS[kernel].empty_saved(r, D, S, save),
    )


@wkv7_backward.register_fake
def _(r, log_w, k, v, kappa, a, state, cu_seqlens, saved, dy, dlast, direction, kernel):
    B, _, H, N = r.shape
    D, S = len(REVERSE[direction]), B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = r.new_empty(D, S, H, N, N, dtype=work_dtype(r.dtype))
    return [*(x.new_empty(x.shape) for x in (r, log_w, k, v, kappa, a)), first]


def save_for_backward(ctx, inputs, output) -> None:
    *tensors, ctx.direction, ctx.kernel, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def backward(ctx, dy: Tensor | None, dlast: Tensor | None, _: Tensor | None):
    return gradients(ctx, dy, dlast, torch.ops.goose_mm.wkv7_backward)


wkv7_forward.register_autograd(backward, setup_context=save_for_backward)


def gradients(
    ctx, dy: Tensor | None, dlast: Tensor | None, run: Callable[..., Sequence[Tensor]]
) -> tuple[Any, ...]:
    """For each argument of `wkv7_forward`; `run` takes the arguments of `wkv7_backward`."""
    if torch.is_grad_enabled() or transformed():  # create_graph=True, torch.func
        run = ScanBack.apply
    *tensors, saved = ctx.saved_tensors
    *found, first = run(*tensors, saved, dy, dlast, ctx.direction, ctx.kernel)
    state = tensors[6]
    return (*found, None if state is None else first.to(state.dtype), None, None, None, None)


class Scan(torch.autograd.Function):
    """`wkv7_forward` without the operator, its results `unstacked`."""

    @staticmethod
    def forward(*arguments):
        y, last, saved = run_forward(*arguments)
        *_, direction, _, _ = arguments
        return *unstacked(direction, y, last), saved

    @staticmethod
    def setup_context(ctx, inputs, output):
        save_for_backward(ctx, inputs, output)
        ctx.spent = False

    @staticmethod
    def backward(ctx, *given):
        dy, dlast, _ = given
        if ctx.direction != "both":
            dy, dlast = (None if x is None else x.unsqueeze(0) for x in (dy, dlast))
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

    @staticmethod
    def vmap(info, in_dims, *arguments):
        *tensors, direction, kernel, save = arguments
        tensors, axis = joined(info.batch_size, in_dims, tensors)
        save = save or will_need_gradients(tensors)
        y, last, saved = Scan.apply(*tensors, direction, kernel, save)
        # what is saved belongs to all samples together, however the kernel orders it
        parts = part(y, info.batch_size, axis), part(last, info.batch_size, BATCH)
        return (*parts, saved), (0, 0, None)


class ScanBack(torch.autograd.Function):
    """`wkv7_backward`, differentiable, for torch.func too."""

    @staticmethod
    def forward(*arguments):
        *tensors, saved, dy, dlast, direction, kernel = arguments
        if saved is None:
            _, _, saved = torch.ops.goose_mm.wkv7_forward(*tensors, direction, kernel, True)
        found = torch.ops.goose_mm.wkv7_backward(*tensors, saved, dy, dlast, direction, kernel)
        return tuple(found)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, _, dy, dlast, ctx.direction, _ = inputs
        ctx.save_for_backward(*tensors, dy, dlast)

    @staticmethod
    def backward(ctx, *given):
        """From the loop over time, any number of times; memory grows with T N^2."""
        *inputs, state, cu_seqlens, dy, dlast = ctx.saved_tensors
        *given, first = given
        offsets, reverse = host_offsets(cu_seqlens, inputs[0].shape[1]), REVERSE[ctx.direction]

        def outputs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return by_definition(tensors[:6], tensors[6], offsets, reverse)

        def back(*tensors: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(outputs, *tensors[:7])[1](tensors[7:])

        start = torch.zeros_like(first) if state is None else state
        end = torch.zeros_like(first) if dlast is None else dlast
        out = inputs[0].new_zeros(len(reverse), *inputs[0].shape) if dy is None else dy
        with without_autocast(inputs[0].device):
            pull = torch.func.vjp(back, *inputs, start, out, end)[1]
            *found, dstate, ddy, ddlast = pull((*given, first.to(start.dtype)))
        dstate, ddy, ddlast = (
            None if x is None else d
            for x, d in zip((state, dy, dlast), (dstate, ddy, ddlast), strict=True)
        )
        return (*found, dstate, None, None, ddy, ddlast, None, None)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        *tensors, saved, dy, dlast, direction, kernel = arguments
        *dims, _, dy_dim, dlast_dim, _, _ = in_dims
        if all(dim is None for dim in dims):
            saved = None  # it is of one sample; only the gradients given are many
        size = info.batch_size
        tensors, axis = joined(size, dims, tensors)
        dy, dlast = join(dy, dy_dim, size, axis), join(dlast, dlast_dim, size, BATCH)
        *found, first = ScanBack.apply(*tensors, saved, dy, dlast, direction, kernel)
        parts = (*(part(x, size, axis) for x in found), part(first, size, BATCH))
        return parts, (0,) * len(parts)
