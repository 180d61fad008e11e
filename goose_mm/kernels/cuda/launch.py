"""WKV-7 in CUDA C++ (`csrc/`), for NVIDIA GPUs: buffers, grids, launches.

Products take f16 operands and sum in float32; the state stays float32. Besides inputs, outputs and
gradients a training step holds states of 16 bits. The wide kernels hold one for every chunk of 16
tokens, and what else there is of it, where the gradients will lie: six times the bytes of r. They
run where that is no more than SMALL, or where there are no more blocks (of one sequence and head)
than multiprocessors. The others hold one for every few chunks, for heads of 64 and 16-bit inputs
every three, where a block may have 113 kB of shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from goose_mm.kernels.cuda import nvrtc
from goose_mm.kernels.reference import Size, saved_states

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences), D directions
# K saved states, between segments of some chunks

CHUNK = 16
LOWEST_LOG_W = -0.7  # so that factors of half a chunk fit float16: csrc/chunk.cuh
HEAD_SIZES = (64, 128)
TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
# (head size, bytes of a number) -> (shared memory that a block needs, chunks of a segment)
SEGMENTS = {
    (64, 2): ((114_464, 3), (87_584, 2)),
    (64, 4): ((157_472, 3), (116_256, 2), (91_904, 1)),
    (128, 2): ((215_360, 2), (150_528, 1)),
    (128, 4): ((175_936, 1),),
}
# The same for the wide kernels, which save a state for EVERY chunk: heads of 64, 16 bits.
WIDE, EVERY = 222_256, 0
SMALL = 2**30
NUMBERS = 5  # T, heads, rows, slots or room, reverse: what follows the pointers


def unavailable(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why this kernel cannot run there; empty if it can."""
    if head_size not in HEAD_SIZES:  # may be symbolic, under torch.compile(dynamic=True)
        return f"it takes heads of size {' or '.join(map(str, HEAD_SIZES))}, not {head_size}"
    return lacking(device, dtype, int(head_size))


def lacking(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """What the device or the installation lacks; empty if nothing."""
    if dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU, the tensors are on {device}"
    if granted(device) == 0:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if not segment(device, dtype, head_size):
        return f"{torch.cuda.get_device_name(device)} has too little shared memory for {head_size}"
    return nvrtc.missing()


# torch.compile asks once while it traces, rather than trace the question: see triton.py
vars(lacking)["_dynamo_marked_constant"] = True


@cache
def granted(device: torch.device) -> int:
    """Bytes of shared memory that a block may have; 0 on what is too old."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin if properties.major >= 8 else 0


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def segment(device: torch.device, dtype: torch.dtype, head_size: int) -> int:
    """Chunks between saved states, as many as shared memory allows; 0 if not even one."""
    most, choices = granted(device), SEGMENTS[head_size, dtype.itemsize]
    return next((chunks for wanted, chunks in choices if wanted <= most), 0)


def spacing(r: Float[Tensor, "B T H N"], directions: int, states: Size, save: bool) -> int:
    """Chunks between saved states; EVERY for the wide kernels."""
    _, _, H, N = r.shape
    if N == 64 and r.dtype.itemsize == 2 and granted(r.device) >= WIDE:
        few = directions * states * H <= multiprocessors(r.device)
        if few or (save and directions * room(r, states) * 2 <= SMALL):
            return EVERY
    return segment(r.device, r.dtype, N)


def room(r: Float[Tensor, "B T H N"], states: Size) -> Size:
    """What the wide kernels save of a direction, in numbers of 16 bits: as much as gradients take.

    First where the gradient of the states will lie, in float32, then where those of the inputs.
    """
    _, _, H, N = r.shape
    return 2 * states * H * N * N + 6 * r.numel()


@cache
def options(dtype: torch.dtype, head_size: int, out: torch.dtype, chunks: int) -> tuple[str, ...]:
    """What the sources leave open; `chunks` between saved states."""
    chosen = {"IO": TYPES[dtype], "OUT": TYPES[out], "N": head_size, "SEGMENT": chunks}
    return tuple(f"-D{key}={value}" for key, value in chosen.items())


def lowest_log_w(dtype: torch.dtype) -> float:
    return LOWEST_LOG_W


def empty_saved(r: Float[Tensor, "B T H N"], directions: int, states: Size, save: bool) -> Tensor:
    """For what a backward pass needs: states [D, K, B, H, N, N] in float16, K = 0 if none.

    Of the wide kernels [D, room], in the type of r.
    """
    B, T, H, N = r.shape
    chunks = spacing(r, directions, states, save)
    if save and chunks == EVERY:
        return r.new_empty(directions, room(r, states))
    K = saved_states(T, CHUNK * chunks, save)
    return r.new_empty(directions, K, B, H, N, N, dtype=torch.float16)


def forward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
    save: bool,
) -> tuple[Float[Tensor, "D B T H N"], Float[Tensor, "D S H N N"], Float[Tensor, "D *rest"]]:
    """y, the last states, and what a backward pass needs (see `empty_saved`).

    As `chunked.forward`, but `cu_seqlens` stays on the device: neither checked nor waited for. A
    decay below -0.7 stops the program with a device-side assertion.
    """
    r, *_ = inputs = of_one_type(inputs)
    B, T, H, N = r.shape
    D, S = len(reverse), B if cu_seqlens is None else len(cu_seqlens) - 1
    y = r.new_empty(D, B, T, H, N)
    last = r.new_empty(D, S, H, N, N, dtype=torch.float32)
    saved = empty_saved(r, D, S, save)
    launch(
        "forward", r, r.dtype, spacing(r, D, S, save), (S * H, D),
        *inputs, as_float(state), offsets(cu_seqlens), y, last, saved if saved.numel() else None,
        T, H, B, saved.shape[1], int(reverse[0]),
    )  # fmt: skip
    return y, last, saved


def backward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    cu_seqlens: Int[Tensor, " n"] | None,
    reverse: Sequence[bool],
    saved: Float[Tensor, "D *rest"],
    dy: Float[Tensor, "D B T H N"] | None,
    dlast: Float[Tensor, "D S H N N"] | None,
    spend: bool = False,
) -> tuple[list[Float[Tensor, "B T H N"]], Float[Tensor, "D S H N N"]]:
    """Gradients of the six inputs, each in its dtype, and of the initial states.

    `spend`: they may take the place of `saved`.
    """
    dtypes = [x.dtype for x in inputs]
    r, *_ = inputs = of_one_type(inputs)
    B, T, H, N = r.shape
    D, S = len(reverse), B if cu_seqlens is None else len(cu_seqlens) - 1
    dy = r.new_zeros(D, B, T, H, N) if dy is None else cast(dy, r.dtype).contiguous()
    chunks = spacing(r, D, S, True)
    out = r.dtype if D == 1 else torch.float32
    if spend and D == 1 and chunks == EVERY:
        first, rest = saved.split([2 * S * H * N * N, 6 * r.numel()], dim=1)
        first = first.view(torch.float32).view(D, S, H, N, N)
        grads = rest.view(6, *r.shape).unbind()
    else:
        first = r.new_empty(D, S, H, N, N, dtype=torch.float32)
        if D == 1:
            grads = [torch.empty_like(r) for _ in inputs]
        else:
            grads = [r.new_empty(D, *r.shape, dtype=out) for _ in inputs]
    launch(
        "backward", r, out, chunks, (S * H, D),
        *inputs, as_float(state), offsets(cu_seqlens), saved, dy, as_float(dlast), *grads, first,
        T, H, B, saved.shape[1], int(reverse[0]),
    )  # fmt: skip
    if D > 1:
        grads = [g.sum(0) for g in grads]
    return [cast(g, dtype) for g, dtype in zip(grads, dtypes, strict=True)], first


def of_one_type(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, and in the dtype of r."""
    dtype = inputs[0].dtype
    return [cast(x, dtype).contiguous() for x in inputs]


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """As `x.to(dtype)`, which takes longer to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def as_float(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().contiguous()


def offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()


def launch(
    name: str,
    r: Tensor,
    out: torch.dtype,
    chunks: int,
    grid: tuple[int, int],
    *arguments: Tensor | int | None,
) -> None:
    """Run `csrc/NAME.cu`, or the wide one, on the current stream of r's device.

    `chunks` lie between saved states. NUMBERS numbers come last.
    """
    function, threads, shared = loaded(name, r.device, r.dtype, r.shape[-1], out, chunks)
    values = [x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in arguments]
    with torch.cuda.device_of(r):
        device = r.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        nvrtc.launch(function, (*grid, 1), threads, shared, device, stream, values)


def source(name: str, chunks: int) -> str:
    return f"{name}_wide" if chunks == EVERY else name


@cache
def loaded(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    out: torch.dtype,
    chunks: int,
) -> tuple[Any, int, int]:
    """The kernel, its threads and its bytes of shared memory."""
    major, minor = torch.cuda.get_device_capability(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    flags = options(dtype, head_size, out, chunks)
    return nvrtc.kernel(source(name, chunks), f"sm_{major}{minor}", flags, index)
