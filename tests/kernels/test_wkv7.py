"""Every kernel against the definition in float64, and the laws of the operator."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from goose_mm.kernels import available_kernels, choose, wkv7
from goose_mm.kernels.chunked import LOWEST_LOG_W
from goose_mm.kernels.reference import reference

KERNELS = ["chunked", "reference"]  # those that take every device, dtype and head size
FAST = KERNELS[:1]
DIRECTIONS = ["forward", "backward", "both"]
NAMES = ["r", "log_w", "k", "v", "kappa", "a"]
# What float32 arithmetic inside a kernel may add to the rounding of inputs and results.
FLOOR = {torch.float64: 1e-12} | dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), 4e-6)

unchecked = inspect.unwrap(wkv7)  # without the shape annotations that pytest switches on


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(B, T, H, N, seed=0, dtype=torch.float64):
    """Inputs of the operator that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    r, d, k, v, kappa, a = torch.randn(6, B, T, H, N, generator=generator, dtype=torch.float64)
    log_w = -(torch.tensor(-0.5).exp() * torch.sigmoid(2 * d - 1))
    inputs = [r, log_w, k, v, F.normalize(kappa, dim=-1), torch.sigmoid(a)]
    return [x.to(torch.bfloat16).half().to(dtype) for x in inputs]


def noise(*shape, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16().double()


def results(op, inputs, state=None, dy=None, dlast=None):
    """Outputs and gradients of `op(*inputs, state)` by name; no `dy` or `dlast`: not used."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    state = None if state is None else state.detach().requires_grad_()
    y, last = op(*inputs, state)
    outputs = [(out, d) for out, d in ((y, dy), (last, dlast)) if d is not None]
    tensors = dict(zip(NAMES, inputs, strict=True)) | ({} if state is None else {"state": state})
    grads = torch.autograd.grad(
        [out for out, _ in outputs],
        list(tensors.values()),
        [d.to(out.dtype) for out, d in outputs],
        allow_unused=True,
    )
    found = {"y": y.detach(), "last": last.detach()}
    found |= {f"d{n}": g for n, g in zip(tensors, grads, strict=True) if g is not None}
    return found


def oracle(direction):
    """The definition, with directions spelled out."""

    def flipped(*tensors):
        *inputs, state = tensors
        y, last = reference(*(x.flip(1) for x in inputs), state=state)
        return y.flip(1), last

    def both(*tensors):
        *inputs, state = tensors
        first, second = (None, None) if state is None else state
        ways = [reference(*inputs, state=first), flipped(*inputs, second)]
        return tuple(torch.stack(x) for x in zip(*ways, strict=True))

    return {"forward": reference, "backward": flipped, "both": both}[direction]


def error(got, want):
    """Relative to the norm of what is wanted, or of ones where that is nearly zero."""
    return ((got.double() - want).norm() / want.norm().clamp_min(want.numel() ** 0.5)).item()


def assert_close(got, want, tolerance=1e-11):
    assert got.keys() == want.keys()
    for name in want:
        assert error(got[name], want[name].double()) <= tolerance, name


@cache
def conformance_case(T, with_state, direction):
    B, H, N = 2, 3, 16
    D = (2,) if direction == "both" else ()
    inputs = make(B, T, H, N, seed=T)
    state = noise(*D, B, H, N, N) if with_state else None
    dy, dlast = noise(*D, B, T, H, N, seed=2), noise(*D, B, H, N, N, seed=3)
    return inputs, state, dy, dlast, results(oracle(direction), inputs, state, dy, dlast)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("kernel", FAST)
def test_kernel_equals_reference(kernel, dtype, T, with_state, direction):
    inputs, state, dy, dlast, exact = conformance_case(T, with_state, direction)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    got = results(
        lambda *x: wkv7(*x, direction=direction, kernel=kernel),
        [x.to(dtype) for x in inputs],
        None if state is None else state.to(work),
        dy,
        dlast,
    )
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        assert got[name].dtype == (work if name in ("last", "dstate") else dtype), name
        rough = want.to(got[name].dtype)  # no kernel can do better than to round the exact result
        assert error(got[name], want) <= 2 * error(rough, want) + FLOOR[dtype], name


def hard_cases(T=200, N=64):
    r, log_w, k, v, kappa, a = make(1, T, 2, N, seed=7)
    slow = log_w * 0 - 0.6065 * torch.sigmoid(torch.tensor(-8.0))
    one, like = kappa[:, :1], torch.ones_like(kappa)
    near = F.normalize(one + 0.2 * kappa, dim=-1)
    r_, k_, v_, kappa_ = (F.layer_norm(x + 10 * x[:, :1], (N,)) for x in (r, k, v, kappa))
    return {
        "repeated key, a 0.9": [r, slow, 3 * one * like, v, one * like, 0.9 * like],
        "repeated key, a 0.99": [r, slow, 3 * one * like, v, one * like, 0.99 * like],
        "nearly parallel keys": [r, slow, 3 * near, v, near, 0.95 * like],
        "fastest decay, k x8": [r, -0.61 * like, 8 * k, v, kappa, a],
        "correlated tokens": [r_, 50 * slow, k_, v_, F.normalize(kappa_, dim=-1), a],
        "a up to 2, no decay": [r, 0 * like, k, v, kappa, 2 * a],
        "a 2, nearly parallel keys, no decay": [r, 0 * like, k, v, near, 2 * like],
        "decay near the limit": [r, 0.8 * LOWEST_LOG_W * like, k, v, kappa, a],
    }


@pytest.mark.parametrize("name", hard_cases())
@pytest.mark.parametrize("kernel", FAST)
def test_hard_cases_are_as_exact_as_the_loop(kernel, name):
    inputs = [x.float() for x in hard_cases()[name]]
    dy, dlast = noise(*inputs[0].shape), noise(1, 2, 64, 64)
    exact = results(reference, [x.double() for x in inputs], None, dy, dlast)
    rough = results(reference, inputs, None, dy, dlast)
    got = results(lambda *x: wkv7(*x, kernel=kernel), inputs, None, dy, dlast)
    for key, want in exact.items():
        assert error(got[key], want) <= 2 * error(rough[key], want) + FLOOR[torch.float32], key


@pytest.mark.parametrize("kernel", KERNELS)
def test_golden_step(kernel):
    """One step by hand, with no symmetry: a transposed state or a decay after the read shows."""
    state = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64)
    r, w, k, v, kappa, a = (
        torch.tensor(x, dtype=torch.float64).view(1, 1, 1, 2)
        for x in ([2, 1], [0.5, 1], [10, 20], [1, -1], [1, 0], [0.5, 0.25])
    )
    # [[1, 2], [3, 4]] decays to [[.5, 2], [1.5, 4]]; (1, 3) is found under kappa, half of it goes
    y, last = wkv7(r, w.log(), k, v, kappa, a, state, kernel=kernel)
    assert last[0, 0].tolist() == [[10, 22], [-10, -16]]
    assert y.flatten().tolist() == [42, -36]


@pytest.mark.parametrize("cut", [1, 16, 100, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_split_equals_whole(kernel, cut):
    inputs, state = make(3, 150, 5, 8), noise(3, 5, 8, 8)
    dy, dlast = noise(3, 150, 5, 8, seed=2), noise(3, 5, 8, 8, seed=3)

    def split(*tensors):
        *inputs, state = tensors
        first, state = wkv7(*(x[:, :cut] for x in inputs), state, kernel=kernel)
        second, state = wkv7(*(x[:, cut:] for x in inputs), state, kernel=kernel)
        return torch.cat([first, second], 1), state

    whole = results(lambda *x: wkv7(*x, kernel=kernel), inputs, state, dy, dlast)
    assert_close(results(split, inputs, state, dy, dlast), whole)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_equals_separate(kernel, with_state, direction):
    offsets = [0, 0, 1, 18, 18, 150, 290, 290]
    B, T, H, N, S = 1, offsets[-1], 3, 8, len(offsets) - 1
    D = (2,) if direction == "both" else ()
    inputs, state = make(B, T, H, N), noise(*D, S, H, N, N) if with_state else None
    dy, dlast = noise(*D, B, T, H, N, seed=2), noise(*D, S, H, N, N, seed=3)

    def separate(*tensors):
        *inputs, state = tensors
        ys, states = [], []
        for i in range(S):
            own = None if state is None else state[..., i : i + 1, :, :, :]
            piece = [x[:, offsets[i] : offsets[i + 1]] for x in inputs]
            if offsets[i] < offsets[i + 1]:
                y, own = wkv7(*piece, own, direction=direction, kernel="reference")
                ys.append(y)
            states.append(inputs[0].new_zeros(*D, 1, H, N, N) if own is None else own)
        return torch.cat(ys, -3), torch.cat(states, -4)

    def packed(*x):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32)
        return wkv7(*x, cu_seqlens=cu_seqlens, direction=direction, kernel=kernel)

    want = results(separate, inputs, state, dy, dlast)
    assert_close(results(packed, inputs, state, dy, dlast), want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_directions(kernel):
    inputs, state = make(3, 150, 5, 8), noise(2, 3, 5, 8, 8)
    forward = wkv7(*inputs, state[0], kernel=kernel)
    backward = wkv7(*inputs, state[1], direction="backward", kernel=kernel)
    y, last = wkv7(*(x.flip(1) for x in inputs), state[1], kernel=kernel)
    both = wkv7(*inputs, state, direction="both", kernel=kernel)
    assert_close(dict(enumerate(backward)), {0: y.flip(1), 1: last})
    for i in range(2):
        assert torch.equal(both[i], torch.stack([forward[i], backward[i]]))


@pytest.mark.parametrize("kernel", FAST)
def test_long_sequence(kernel):
    inputs = make(1, 4097, 1, 16)
    y, last = reference(*inputs)
    got = wkv7(*(x.float() for x in inputs), kernel=kernel)
    assert error(got[0], y) < 4e-6 and error(got[1], last) < 4e-6


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_through_one_output_or_to_one_input(kernel):
    inputs, state = make(2, 140, 3, 8), noise(2, 3, 8, 8)
    dy, dlast = noise(2, 140, 3, 8, seed=2), noise(2, 3, 8, 8, seed=3)
    for given in ({"dy": dy}, {"dlast": dlast}):
        want = results(reference, inputs, state, **given)
        got = results(lambda *x: wkv7(*x, kernel=kernel), inputs, state, **given)
        if "dlast" in given:  # it does not depend on r
            assert "dr" not in want and not got.pop("dr", torch.zeros(1)).any()
        assert_close(got, want)
    state.requires_grad_()
    (only,) = torch.autograd.grad(wkv7(*inputs, state, kernel=kernel)[0], state, dy)
    want = results(reference, inputs, state, dy)["dstate"]
    assert error(only, want) < 1e-11


@pytest.mark.parametrize("kernel", KERNELS)
def test_strides_aliases_and_the_callers_state(kernel):
    inputs, state, dy = make(2, 40, 3, 8), noise(2, 3, 8, 8), noise(2, 40, 3, 8)
    want = results(reference, inputs, state, dy)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    before = state.clone()
    got = results(lambda *x: wkv7(*x, kernel=kernel), strided, state.mT.contiguous().mT, dy)
    assert_close(got, want)
    assert torch.equal(state, before)

    x = inputs[3].requires_grad_()
    for create_graph in (False, True):  # one tensor in two places gets the sum
        y, _ = wkv7(inputs[0], inputs[1], x, x, *inputs[4:], kernel=kernel)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
        y, _ = reference(inputs[0], inputs[1], x, x, *inputs[4:])
        assert error(dx, torch.autograd.grad(y, x, dy)[0]) < 1e-11


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kernel", FAST)
def test_gradients_are_the_same_bits_every_time(kernel, direction):
    inputs = make(3, 200, 5, 16, dtype=torch.bfloat16)
    dy = noise(*((2,) if direction == "both" else ()), 3, 200, 5, 16)
    runs = [
        results(lambda *x: wkv7(*x, direction=direction, kernel=kernel), inputs, None, dy)
        for _ in range(2)
    ]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("kernel", KERNELS)
def test_first_and_second_derivatives(kernel):
    packed = torch.tensor([0, 2, 2, 5])
    for extra in ({}, {"direction": "both", "cu_seqlens": packed}):
        D, S = ((2,), 3) if extra else ((), 1)
        tensors = [x.requires_grad_() for x in (*make(1, 5, 2, 3), noise(*D, S, 2, 3, 3))]

        def op(*x, extra=extra):
            return wkv7(*x, kernel=kernel, **extra)

        assert torch.autograd.gradcheck(op, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(op, tensors, fast_mode=True)


@pytest.mark.parametrize("kernel", FAST)
def test_retain_graph_and_create_graph_agree(kernel):
    inputs = [x.requires_grad_() for x in make(2, 40, 3, 8)]
    y, last = wkv7(*inputs, kernel=kernel)
    loss = y.sin().sum() + last.square().sum()
    plain = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, retain_graph=True)
    graph = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(plain, again, strict=True))
    assert all(g.requires_grad and error(g, p) < 1e-11 for p, g in zip(plain, graph, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_and_mixed_dtypes(kernel):
    mixed = [torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16, *[torch.float32] * 2]
    inputs = [x.to(dtype) for x, dtype in zip(make(2, 40, 3, 16), mixed, strict=True)]
    dy = noise(2, 40, 3, 16)
    exact = results(reference, [x.double() for x in inputs], None, dy)

    def op(*x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return wkv7(*x, kernel=kernel)

    got = results(op, inputs, None, dy)
    for name, want in exact.items():
        assert error(got[name], want) <= 2 * error(want.to(got[name].dtype), want) + 4e-6, name
    assert got["y"].dtype == torch.bfloat16 and got["last"].dtype == torch.float32
    assert [got[f"d{name}"].dtype for name in NAMES] == mixed


@pytest.mark.parametrize("kernel", FAST)
def test_operators_are_registered_correctly(kernel):
    ops = torch.ops.goose_mm
    inputs = [x.requires_grad_() for x in make(1, 150, 3, 4)]
    state, packed = noise(2, 3, 3, 4, 4), torch.tensor([0, 7, 7, 150])
    forward = (*inputs, state.requires_grad_(), packed, "both", kernel, True)
    torch.library.opcheck(ops.wkv7_forward, forward)
    with torch.no_grad():
        y, last, saved = ops.wkv7_forward(*forward)
        backward = (*inputs, state, packed, saved, y, last, "both", kernel)
        torch.library.opcheck(
            ops.wkv7_backward, [*(x.detach() for x in backward[:9]), *backward[9:]]
        )


def peak_bytes(function):
    """The most that was allocated at once while `function` ran, its result included."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        result = function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", FAST)
def test_memory_grows_with_inputs_and_outputs_only(kernel, dtype):
    """Peak memory over resting memory per token: at most the results, and 20 % of everything."""

    def extra(T):
        inputs = [x.requires_grad_() for x in make(1, T, 2, 64, dtype=dtype)]
        dy = torch.ones_like(inputs[0])
        unit = inputs[0].nbytes
        with torch.no_grad():
            inference = peak_bytes(lambda: wkv7(*inputs, kernel=kernel))
        forward = peak_bytes(lambda: wkv7(*inputs, kernel=kernel))
        training = peak_bytes(
            lambda: torch.autograd.grad(wkv7(*inputs, kernel=kernel)[0], inputs, dy)
        )
        return [x * T / unit for x in (inference, forward, training)]

    short, long = extra(512), extra(1536)
    inference, forward, training = ((b - a) / 1024 for a, b in zip(short, long, strict=True))
    assert inference <= 1 + 0.01  # y and nothing else
    assert forward <= 1 + 0.2 * 7
    assert training <= 1 + 6 + 0.2 * 14  # y and the six gradients


def test_errors_name_the_cure():
    inputs = make(2, 4, 3, 8)
    longer = [*inputs[:3], torch.zeros(2, 5, 3, 8), *inputs[4:]]
    one = [x[:1] for x in inputs]
    state = torch.zeros(3, 3, 8, 8)
    for message, arguments, options in [
        (r"v is torch.float32 \[2, 5, 3, 8\].*r is torch.float64 \[2, 4, 3, 8\]", longer, {}),
        (r"r has shape \[2, 0, 3, 8\]", [x[:, :0] for x in inputs], {}),
        (r"state is \[3, 3, 8, 8\].*want \[2, 3, 8, 8\]", [*inputs, state], {}),
        (r"want \[2, 1, 3, 8, 8\]", [*one, state], {"direction": "both"}),
        (r"with B = 1; r has B = 2", inputs, {"cu_seqlens": torch.tensor([0, 4])}),
        (r"rise from 0 to T = 4, got \[0, 5\]", one, {"cu_seqlens": torch.tensor([0, 5])}),
        (r"rise from 0 to T = 4", one, {"cu_seqlens": torch.tensor([0, 3, 2, 4])}),
        (r"cu_seqlens is torch.float32", one, {"cu_seqlens": torch.tensor([0.0, 4.0])}),
        (r"direction='up' is none of", inputs, {"direction": "up"}),
        (r"unknown kernel 'abacus'; known: \['auto', .*'chunked'", inputs, {"kernel": "abacus"}),
    ]:
        with pytest.raises(ValueError, match=message):
            unchecked(*arguments, **options)


def test_decay_below_the_limit_is_an_error_not_nan():
    inputs = make(1, 40, 2, 8)
    inputs[1] = inputs[1] * 50
    with pytest.raises(ValueError, match=r"below -2.75.*kernel='reference'"):
        wkv7(*inputs, kernel="chunked")
    y, last = wkv7(*inputs, kernel="reference")
    assert y.isfinite().all() and last.isfinite().all()


def test_auto_falls_back_below_a_kernels_range():
    for lowest in (-3.0, -90.0, -float("inf")):
        inputs, dy, dlast = make(1, 40, 2, 8), noise(1, 40, 2, 8), noise(1, 2, 8, 8)
        inputs[1][0, 7:9] = lowest
        with pytest.raises(ValueError, match=r"below -2.75"):
            wkv7(*inputs, kernel="chunked")
        assert_close(
            results(wkv7, inputs, None, dy, dlast), results(reference, inputs, None, dy, dlast)
        )
    with pytest.raises(ValueError, match=r"below -2.75.*kernel='reference'"):
        torch.vmap(wkv7)(*(x[None] for x in inputs))  # no value can be looked at there


def test_choice_of_kernel():
    cpu = torch.device("cpu")
    assert available_kernels()["chunked"] == "" and available_kernels()["reference"] == ""
    assert choose("auto", cpu, torch.float32, 64) == "chunked"
    assert choose("reference", cpu, torch.float32, 64) == "reference"
    assert choose("auto", cpu, torch.float32, 64, LOWEST_LOG_W) == "chunked"
    for lowest in (LOWEST_LOG_W - 0.01, -float("inf"), float("nan")):
        assert choose("auto", cpu, torch.float32, 64, lowest) == "reference"
