"""What PyTorch does to functions holds for the operator: torch.func, torch.export, shapes alone."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from test_wkv7 import DIRECTIONS, assert_close, make, noise
from torch.func import grad, jacrev, vjp, vmap

from goose_mm.kernels import available_kernels, wkv7

SAMPLES = 3
EVERY = tuple(range(7))  # six inputs and the state
LAYOUTS = [("forward", False), ("backward", True), ("both", True)]

unchecked = inspect.unwrap(wkv7)  # without the shape annotations that pytest switches on


def samples(direction, packed, T, H=2, N=4):
    """Inputs and states of several calls, stacked, and what all calls share."""
    B, S = (1, 3) if packed else (2, 2)
    D = (2,) if direction == "both" else ()
    columns = zip(*(make(B, T, H, N, seed=seed) for seed in range(SAMPLES)), strict=True)
    offsets = torch.tensor([0, 2, 2, T], dtype=torch.int32) if packed else None
    stacked = [*map(torch.stack, columns), noise(SAMPLES, *D, S, H, N, N)]
    return stacked, {"direction": direction, "cu_seqlens": offsets}


def loss_of(shared, kernel="auto"):
    def loss(*tensors):
        y, last = wkv7(*tensors, **shared, kernel=kernel)
        return y.sin().sum() + last.cos().sum()

    return loss


def close(got, want):
    assert_close(dict(enumerate(got)), dict(enumerate(want)))


def one_by_one(loss, stacked, dims):
    """Gradients of the loss of every sample by plain autograd, stacked; None: shared by all."""
    rows = []
    for i in range(SAMPLES):
        pairs = zip(stacked, dims, strict=True)
        leaves = [(x if dim is None else x[i]).detach().requires_grad_() for x, dim in pairs]
        rows.append(torch.autograd.grad(loss(*leaves), leaves))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("direction", "packed"), LAYOUTS)
def test_gradients_of_samples_are_those_of_a_loop(direction, packed):
    stacked, shared = samples(direction, packed, T=130)
    loss = loss_of(shared)
    want = one_by_one(loss, stacked, [0] * 7)
    close(vmap(grad(loss, EVERY))(*stacked), want)
    close(grad(lambda *x: vmap(loss)(*x).sum(), EVERY)(*stacked), want)
    leaves = [x.requires_grad_() for x in stacked]
    close(torch.autograd.grad(vmap(loss)(*leaves).sum(), leaves), want)
    twice = [torch.stack([x, x.flip(0)]) for x in stacked]
    close(vmap(vmap(grad(loss, EVERY)))(*twice), [torch.stack([x, x.flip(0)]) for x in want])

    some = (0, None, 0, None, 0, 0, None)
    given = [x[0] if dim is None else x for x, dim in zip(stacked, some, strict=True)]
    want = one_by_one(loss, given, some)
    given[0] = given[0].movedim(0, 2)  # samples need not come first
    close(vmap(grad(loss, EVERY), in_dims=(2, *some[1:]))(*given), want)


@pytest.mark.parametrize(("direction", "packed"), LAYOUTS)
def test_jacobians_and_gradients_of_gradients(direction, packed):
    stacked, shared = samples(direction, packed, T=3, H=1, N=2)
    first, found = [x[0] for x in stacked], []
    for kernel in ("auto", "reference"):

        def outputs(*tensors, kernel=kernel):
            return wkv7(*tensors, **shared, kernel=kernel)

        def squares(*tensors, kernel=kernel):
            return sum(g.square().sum() for g in grad(loss_of(shared, kernel), EVERY)(*tensors))

        with torch.no_grad():
            y, pull = vjp(outputs, *first)
            pulled = pull(y)
        jacobians = [x for output in jacrev(outputs, EVERY)(*first) for x in output]
        second = vmap(grad(squares, EVERY))(*stacked)
        found.append([*pulled, *jacobians, *second])
    close(*found)


def test_samples_may_be_packed_differently():
    stacked, _ = samples("forward", True, T=20)
    offsets = torch.tensor([[0, 3, 7, 20], [0, 0, 20, 20], [0, 1, 2, 20]], dtype=torch.int32)
    got = vmap(lambda bounds, *x: wkv7(*x, cu_seqlens=bounds))(offsets, *stacked)
    want = [wkv7(*x, cu_seqlens=bounds) for bounds, *x in zip(offsets, *stacked, strict=True)]
    close(got, [torch.stack(column) for column in zip(*want, strict=True)])


TRACED = """
import torch
from torch.export import Dim, export
from goose_mm.config import BackboneConfig, TextConfig, TextModel
from goose_mm.kernels import wkv7
from goose_mm.text import RWKV7LM

def layer(r, log_w, k, v, kappa, a, state, packed, way):
    y, state = wkv7(r.tanh(), log_w, k, v, kappa, a, state, cu_seqlens=packed, direction=way)
    return y.sin(), 2 * state

def run(f, T, *args):
    torch.manual_seed(0)
    inputs = [torch.rand(1, T, 3, 8) * s for s in (1, -0.6, 1, 1, 0.3, 1)]
    inputs = [x.requires_grad_() for x in inputs]
    y, state = f(*inputs, *args)
    return y, state, *torch.autograd.grad(y.sum() + state.sum(), inputs)

packed = torch.tensor([0, 3, 3, 20], dtype=torch.int32)
for dynamic in (None, True):
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T, *rest in [(20, None, "forward"), (33, None, "forward"), (20, packed, "both")]:
        args = (T, None, *rest)
        assert all(map(torch.equal, run(layer, *args), run(compiled, *args))), (dynamic, args)

class Logits(torch.nn.Module):
    def __init__(self, lm):
        super().__init__()
        self.lm = lm

    def forward(self, ids):
        return self.lm(ids)[0]

torch.manual_seed(0)
backbone = BackboneConfig(dim=32, num_layers=1, head_size=16)
lm = RWKV7LM(TextModel(backbone=backbone, text=TextConfig(vocab_size=50)))
for parameter in lm.parameters():
    parameter.data.add_(0.2 * torch.randn_like(parameter))
model = Logits(lm)

def train(model, ids):
    y = model(ids)
    y.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return y, *grads

example = torch.zeros(2, 200, dtype=torch.long)
exported = export(model, (example,), dynamic_shapes={"ids": {1: Dim("T", max=5000)}})
for length in (2, 129, 300):
    ids = torch.randint(0, 50, (2, length))
    for got, want in zip(train(exported.module(), ids), train(model, ids), strict=True):
        assert torch.allclose(got, want, atol=1e-4), length
"""


def test_compiles_without_graph_breaks_and_exports_with_any_length():
    # In a process of its own: the shape checks of this test session cannot be traced.
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kernel", ["auto", *available_kernels()])
def test_the_meta_device_gives_shapes(kernel, direction):
    stacked, shared = samples(direction, True, T=20)
    inputs = [x[0].to("meta").requires_grad_() for x in stacked]
    bounds = shared["cu_seqlens"].to("meta")
    with torch.autocast("cpu", torch.bfloat16):
        y, last = wkv7(*inputs, cu_seqlens=bounds, direction=direction, kernel=kernel)
    D = (2,) if direction == "both" else ()
    assert y.shape == (*D, 1, 20, 2, 4) and last.shape == (*D, 3, 2, 4, 4)
    grads = torch.autograd.grad(y.sum() + last.sum(), inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs]
    with pytest.raises(ValueError, match="unknown kernel 'abacus'"):
        unchecked(*inputs, cu_seqlens=bounds, direction=direction, kernel="abacus")
