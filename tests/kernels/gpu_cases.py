"""The GPU kernels against the definition: run by `test_wkv7_gpu.py`, or on a GPU by hand.

Needs a CUDA device, or TRITON_INTERPRET=1 before Python starts: then Triton's is run alone.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_wkv7 import error, hard_cases, make, noise, oracle, results

from goose_mm.kernels import chunked, triton, wkv7
from goose_mm.kernels.cuda import launch as cuda

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ["triton", "cuda"] if DEVICE.type == "cuda" else ["triton"]
LIMIT = {
    "triton": {torch.float32: 2e-5, torch.bfloat16: 2e-3, torch.float16: 2.5e-3},
    "cuda": {torch.float32: 7e-4, torch.bfloat16: 7e-4, torch.float16: 7e-4},
}


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="module")
def interpreter():
    """Triton 3.6's interpreter turns scalars into ints in a way that numpy 2.4 no longer takes."""
    if DEVICE.type == "cuda":
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield


def rounding(dtype):
    """What storing a result costs: the interpreter cuts bfloat16 off where a GPU rounds."""
    return {torch.float32: 0, torch.bfloat16: 4e-3 if DEVICE.type == "cpu" else 2e-3}.get(
        dtype, 3e-4
    )


def check(kernel, inputs, exact, *rest, dtype, limit=0.0, **extra):
    work = [None if x is None else x.to(DEVICE) for x in rest]
    inputs = [x.to(DEVICE, dtype) for x in inputs]
    got = results(lambda *x: wkv7(*x, kernel=kernel, **extra), inputs, *work)
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        stored = 0 if name in ("last", "dstate") else rounding(dtype)
        assert error(got[name].cpu(), want) <= (limit or LIMIT[kernel][dtype]) + stored, name


@pytest.mark.parametrize(
    ("dtype", "B", "T", "H", "with_state", "direction"),
    [
        (torch.float32, 2, 33, 1, True, "both"),
        (torch.bfloat16, 1, 17, 3, False, "both"),
        (torch.float16, 2, 16, 2, True, "forward"),
        (torch.bfloat16, 1, 35, 1, True, "backward"),
        (torch.float32, 1, 1, 1, False, "backward"),
    ],
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_reference(kernel, dtype, B, T, H, with_state, direction):
    N = 64
    D = (2,) if direction == "both" else ()
    inputs, state = make(B, T, H, N), noise(*D, B, H, N, N).float() if with_state else None
    dy, dlast = noise(*D, B, T, H, N, seed=2), noise(*D, B, H, N, N, seed=3)
    exact = results(oracle(direction), inputs, None if state is None else state.double(), dy, dlast)
    check(kernel, inputs, exact, state, dy, dlast, dtype=dtype, direction=direction)


@pytest.mark.parametrize(("direction", "with_state"), [("both", True), ("backward", False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_sequences(kernel, dtype, direction, with_state):
    offsets = torch.tensor([0, 0, 1, 18, 18, 35, 35], dtype=torch.int32)
    T, H, N, S = 35, 1, 64, len(offsets) - 1
    D = (2,) if direction == "both" else ()
    inputs, state = make(1, T, H, N), noise(*D, S, H, N, N).float() if with_state else None
    dy, dlast = noise(*D, 1, T, H, N, seed=2), noise(*D, S, H, N, N, seed=3)

    def chunked(*x):
        return wkv7(*x, cu_seqlens=offsets, direction=direction, kernel="chunked")

    exact = results(chunked, inputs, None if state is None else state.double(), dy, dlast)
    extra = {"cu_seqlens": offsets.to(DEVICE), "direction": direction}
    check(kernel, inputs, exact, state, dy, dlast, dtype=dtype, **extra)


@pytest.mark.parametrize(
    "name", ["repeated key, a 0.9", "nearly parallel keys", "fastest decay, k x8"]
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_hard_cases(kernel, name):
    inputs = [x[:, :64, :1] for x in hard_cases()[name]]
    dy, dlast = noise(1, 64, 1, 64), noise(1, 1, 64, 64)
    exact = results(oracle("forward"), inputs, None, dy, dlast)
    limit = 3e-3 if kernel == "cuda" else 0  # its operands are rounded, and nearly cancel
    check(kernel, inputs, exact, None, dy, dlast, dtype=torch.float32, limit=limit)


def test_the_smallest_gradients_survive():
    inputs, dy = make(1, 40, 1, 64, dtype=torch.bfloat16), noise(1, 1, 40, 1, 64) * 1e-9
    forward = [x.to(DEVICE) for x in inputs]
    _, _, saved = triton.forward(forward, None, None, (False,), True)
    grads, _ = triton.backward(
        forward, None, None, (False,), saved, dy.to(DEVICE, torch.bfloat16), None
    )
    double = [x.double() for x in inputs]
    _, _, saved = chunked.forward(double, None, None, (False,), True)
    dy = dy.bfloat16().double()
    exact, _ = chunked.backward(double, None, None, (False,), saved, dy, None)
    for got, want in zip(grads, exact, strict=True):
        assert (got.cpu().double() - want).norm() <= 6e-3 * want.norm()


def test_auto_takes_a_kernel_that_holds_the_lowest_decay():
    inputs = [x.to(DEVICE) for x in make(1, 20, 1, 64, dtype=torch.bfloat16)]
    inputs[1][0, 7] = -0.71
    assert all(map(torch.equal, wkv7(*inputs), wkv7(*inputs, kernel="chunked")))


@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="on CUDA a device-side assertion ends the process"
)
def test_decay_below_the_limit_is_an_error_not_nan():
    inputs = make(1, 20, 1, 64, dtype=torch.float32)
    inputs[1] = inputs[1] * 0 - 5.1
    with pytest.raises(ValueError, match=r"below -5.*kernel='reference'"):
        wkv7(*inputs, kernel="triton")


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA device")
def test_kernels_for_few_and_for_many_tokens_agree(monkeypatch):
    H = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    inputs = [x.to(DEVICE, torch.bfloat16) for x in make(2, 133, H, 64)]
    dy, dlast = noise(*inputs[0].shape).to(DEVICE), noise(2, H, 64, 64).to(DEVICE)
    few = results(partial(wkv7, kernel="cuda"), inputs, None, dy, dlast)
    monkeypatch.setattr(cuda, "SMALL", 0)
    many = results(partial(wkv7, kernel="cuda"), inputs, None, dy, dlast)
    for name, want in few.items():
        assert error(many[name], want) <= 4e-3, name


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA device")
def test_training_holds_little_but_its_results():
    inputs = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in make(2, 1000, 8, 64)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    resting = torch.cuda.memory_allocated()
    y, _ = wkv7(*inputs, kernel="cuda")
    y.backward(y.detach())
    needed = (1 + len(inputs)) * inputs[0].nbytes
    assert torch.cuda.max_memory_allocated() - resting <= 1.2 * needed


@pytest.mark.skipif("cuda" not in KERNELS, reason="no CUDA device")
def test_a_kernel_that_another_thread_has_loaded():
    """The thread of the backward pass may never have used the device before."""
    inputs = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in make(1, 20, 1, 64)]
    for name in ("forward", "backward"):
        for chunks in (cuda.EVERY, cuda.segment(inputs[0].device, torch.bfloat16, 64)):
            cuda.loaded(name, inputs[0].device, torch.bfloat16, 64, torch.bfloat16, chunks)
    wkv7(*inputs, kernel="cuda")[0].sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
