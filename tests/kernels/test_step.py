"""A step of decoding: its definition is the model at one token, its kernels are its definition."""

from __future__ import annotations

import pytest
import torch
from emulator import compiled, compiler, emulated_step  # noqa: F401

from goose_mm.backbone import State
from goose_mm.backbone.layout import lay_out
from goose_mm.config import BackboneConfig, TextConfig, TextModel
from goose_mm.kernels import step as definition
from goose_mm.kernels.cuda import step as cuda
from goose_mm.text import RWKV7LM


def lm(dtype=torch.float64, layers=3, dim=192, vocab=77, **sizes):
    """A model whose parameters all matter, and a state."""
    torch.manual_seed(1)
    backbone = BackboneConfig(
        dim=dim, num_layers=layers, decay_rank=64, a_rank=32, v_rank=32, gate_rank=96, **sizes
    )
    model = RWKV7LM(TextModel(backbone=backbone, text=TextConfig(vocab_size=vocab))).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.head.weight.mul_(0.3)
    return model.to(dtype)


def memory(model, rows):
    state = State.zeros(model.config.backbone.resolved(), rows, dtype=torch.float64)
    return State(*(t + 0.5 * torch.randn_like(t) for t in state))


def error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("K", "apart"), [(768, False), (3072, True), (8192, True)])
def test_shared_memory_is_what_is_asked_for(K, apart, compiler):  # noqa: F811
    chunks = cuda.chunks_of_few(K, cuda.parts_of_few(K, apart))
    flags = ("-DIO=bf16", f"-DCOLUMNS={cuda.FEW}", f"-DCHUNKS={chunks}")
    assert compiled("step_linear", flags).shared_size() == cuda.shared_of_few(K, apart)


def test_says_what_it_cannot_take(monkeypatch):
    monkeypatch.setattr(cuda, "granted", lambda device: 232_448)
    device, model = torch.device("cuda"), lm(torch.bfloat16)
    weights = lay_out(model.emb, model.backbone, model.head)
    assert "shared memory" not in cuda.unavailable(device, weights)
    assert "heads of 64, not 32" in cuda.unavailable(device, weights._replace(head_size=32))
    assert "NVIDIA GPU" in cuda.unavailable(torch.device("cpu"), weights)
    monkeypatch.setattr(cuda, "granted", lambda device: 90_000)
    assert "there are 90000" in cuda.unavailable(device, weights)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_definition_is_the_model_at_one_token(layers):
    model = lm(layers=layers)
    state, tokens = memory(model, 5), torch.randint(77, (5,))
    with torch.no_grad():
        logits, after = model(tokens[:, None], state)
    weights, moving = lay_out(model.emb, model.backbone, model.head), state.clone()
    got = definition.step(tokens, weights, *moving)
    assert error(got, logits[:, 0]) < 1e-12
    for mine, exact in zip(moving, after, strict=True):
        assert error(mine, exact) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "rows", "sizes"),
    [
        (torch.bfloat16, 3, {"layers": 2, "dim": 192}),
        (torch.float16, 11, {"layers": 2, "dim": 128}),
        (torch.bfloat16, 69, {"layers": 1, "dim": 64}),
    ],
)
def test_kernels_are_the_definition(dtype, rows, sizes, emulated_step):  # noqa: F811
    """No worse than the model itself in that dtype; rows of padding leave everything alone."""
    rough, exact = lm(dtype, **sizes), lm(dtype, **sizes).double()
    state, tokens = memory(rough, rows), torch.randint(77, (rows,))
    kept = State(*(t.to(dtype) for t in state[:2]), state.wkv.float())
    with torch.no_grad():
        logits, after = exact(tokens[:, None], State(*(t.double() for t in kept)))
        rough_logits, rough_after = rough(tokens[:, None], kept)
    weights = lay_out(rough.emb, rough.backbone, rough.head)
    run = cuda.Step(weights, rows + 1)
    slots = torch.randperm(rows + 2)[:rows].int()
    moving = State(*(torch.full((t.shape[0], rows + 2, *t.shape[2:]), 7.0).to(t) for t in kept))
    for t, mine in zip(kept, moving, strict=True):
        mine[:, slots.long()] = t
    before = moving.clone()
    padded = torch.cat([slots, torch.tensor([-1], dtype=torch.int32)])
    got = run(torch.cat([tokens, torch.tensor([0])]), padded, *moving)[:rows]
    assert error(got, logits[:, 0]) <= error(rough_logits[:, 0], logits[:, 0])
    for t, old, good, bad in zip(moving, before, after, rough_after, strict=True):
        assert error(t[:, slots.long()], good) <= 1.05 * error(bad, good)
        idle = [i for i in range(rows + 2) if i not in slots.tolist()]
        assert torch.equal(t[:, idle], old[:, idle])
