"""The WKV-7 operator: contract, shape checks, choice of the kernel, registration with PyTorch.

Every kernel is a module with `unavailable(device, dtype, head_size)`, `empty_saved(...)`,
`forward(...)`, `backward(...)` as in `chunked.py`, and one line in KERNELS below.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goose_mm.kernels import chunked, cuda, triton
from goose_mm.kernels.reference import by_definition, work_dtype

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences)

Direction = Literal["forward", "backward", "both"]
REVERSE = {"forward": (False,), "backward": (True,), "both": (False, True)}
# First choice first; "reference" stands for the definition itself.
KERNELS = {"cuda": cuda, "triton": triton, "chunked": chunked}
NAMES = ("r", "log_w", "k", "v", "kappa", "a")


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
            kernel "cuda" takes -0.7 or more, "chunked" -2.75, "triton" -5: all fail loudly below.
        kappa: removal key of unit norm. a: in-context learning rate in [0, 1], or up to 2.
        state: the state to start from, `[S, H, N, N]` with S = B; None means zeros. Never modified.
        cu_seqlens: offsets `[S + 1]` (int32 or int64, first 0, last T) of S sequences packed
            along T, with B = 1. Each starts from its own state; empty ones are allowed.
        direction: "backward" runs from the last token (of each sequence) to the first. "both" runs
            each way and stacks, forward first: y `[2, B, T, H, N]`, states `[2, S, H, N, N]`.
        kernel: a name in `available_kernels()`, or "auto" for the best that works here.

    Returns:
        y in the dtype of `r`, and the last state in float32 (float64 if `r` is). Both carry
        gradients to all inputs, each in its input's dtype, the same bits from run to run.

    Raises:
        ValueError: shapes or offsets that do not fit, an unknown or unusable kernel.

    The kernel "cuda" takes all inputs in the dtype of `r`, and operands of products in 11 bits;
    "chunked" works in float32 throughout, and reads `cu_seqlens` on the host, which waits for a
    CUDA device.
    """
    kernel = choose(kernel, r.device, r.dtype, r.shape[-1])
    stacked = direction == "both"
    if state is not None and not stacked:
        state = state[None]
    inputs = (r, log_w, k, v, kappa, a)
    check(inputs, state, cu_seqlens, direction)
    if kernel == "reference":
        with torch.autocast(r.device.type, enabled=False):
            offsets = host_offsets(cu_seqlens, r.shape[1])
            y, last = by_definition(inputs, state, offsets, REVERSE[direction])
    else:
        tensors = inputs if state is None else (*inputs, state)
        save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        y, last, _ = wkv7_forward(*inputs, state, cu_seqlens, direction, kernel, save)
    return (y, last) if stacked else (y.squeeze(0), last.squeeze(0))


def available_kernels() -> dict[str, str]:
    """Every kernel by name, with the reason why it cannot be used here: empty if it can."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = {
        name: module.unavailable(device, torch.float32, 64) for name, module in KERNELS.items()
    }
    return {**names, "reference": ""}


def choose(kernel: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The kernel to use: "auto" takes the first that works, a named one that does not raises."""
    if kernel == "auto":
        # cuda's products take 11 bits: enough for 16-bit tensors, but float32 asks for more
        names = (n for n in KERNELS if n != "cuda" or dtype != torch.float32)
        return next(n for n in names if not KERNELS[n].unavailable(device, dtype, head_size))
    if kernel != "reference" and kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; known: {['auto', *KERNELS, 'reference']}")
    if kernel in KERNELS and (reason := KERNELS[kernel].unavailable(device, dtype, head_size)):
        raise ValueError(f"kernel {kernel!r} cannot be used here: {reason}")
    return kernel


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
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}; wanted integers, "
                "one more than there are sequences"
            )
    if state is not None:
        sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
        wanted = [len(REVERSE[direction]), sequences, H, N, N]
        if list(state.shape) != wanted or state.device != r.device:
            given, wanted = (s[1:] if wanted[0] == 1 else s for s in (list(state.shape), wanted))
            raise ValueError(
                f"state is {given} on {state.device}; direction={direction!r} and these inputs "
                f"want {wanted} on {r.device}"
            )


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


INPUTS = ", ".join(f"Tensor {name}" for name in NAMES) + ", Tensor? state, Tensor? cu_seqlens"


@torch.library.custom_op(
    "goose_mm::wkv7_forward",
    mutates_args=(),
    schema=f"({INPUTS}, str direction, str kernel, bool save) -> (Tensor, Tensor, Tensor)",
)
def wkv7_forward(
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
    """y `[D, B, T, H, N]`, last states `[D, S, H, N, N]`, saved states `[D, K, B, H, N, N]`."""
    offsets = kernel_offsets(kernel, cu_seqlens, r.shape[1])
    with torch.autocast(r.device.type, enabled=False):
        inputs = (r, log_w, k, v, kappa, a)
        return KERNELS[kernel].forward(inputs, state, offsets, REVERSE[direction], save)


@wkv7_forward.register_fake
def _(r, log_w, k, v, kappa, a, state, cu_seqlens, direction, kernel, save):
    B, T, H, N = r.shape
    D, S = len(REVERSE[direction]), B if cu_seqlens is None else len(cu_seqlens) - 1
    return (
        r.new_empty(D, B, T, H, N),
        r.new_empty(D, S, H, N, N, dtype=work_dtype(r.dtype)),
        KERNELS[kernel].empty_saved(r, D, save),
    )


@torch.library.custom_op(
    "goose_mm::wkv7_backward",
    mutates_args=(),
    schema=f"({INPUTS}, Tensor saved, Tensor? dy, Tensor? dlast, str direction, str kernel)"
    " -> Tensor[]",
)
def wkv7_backward(
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
) -> list[Tensor]:
    """Gradients of the six inputs and of the initial states."""
    offsets = kernel_offsets(kernel, cu_seqlens, r.shape[1])
    with torch.autocast(r.device.type, enabled=False):
        grads, first = KERNELS[kernel].backward(
            (r, log_w, k, v, kappa, a), state, offsets, REVERSE[direction], saved, dy, dlast
        )
    return [*grads, first]


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
    *inputs, state, cu_seqlens, saved = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: these gradients will be differentiated
        grads = backward_by_definition(inputs, state, cu_seqlens, ctx.direction, dy, dlast)
    else:
        *grads, first = torch.ops.goose_mm.wkv7_backward(
            *inputs, state, cu_seqlens, saved, dy, dlast, ctx.direction, ctx.kernel
        )
        grads.append(None if state is None else first.to(state.dtype))
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
    with torch.autocast(inputs[0].device.type, enabled=False):
        offsets = host_offsets(cu_seqlens, inputs[0].shape[1])
        outputs = by_definition(inputs, state, offsets, REVERSE[direction])
        pairs = [(y, d) for y, d in zip(outputs, (dy, dlast), strict=True) if d is not None]
        ys, dys = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(ys, wanted, dys, create_graph=True))
    return [next(found) if x is not None and x.requires_grad else None for x in (*inputs, state)]


wkv7_forward.register_autograd(backward, setup_context=save_for_backward)
