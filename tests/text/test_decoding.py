"""Laws of reading and writing tokens: in pieces as whole, in slots as alone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from goose_mm.backbone import State
from goose_mm.config import BackboneConfig, TextConfig, TextModel
from goose_mm.text import RWKV7LM, Sampling, decoding
from goose_mm.text.decoding import decode, prefill, stepping


def tokens_of(model, prompts, count=8, **settings):
    """[B, count] greedy tokens."""
    logits, state = prefill(model, prompts)
    sampling = Sampling(max_new_tokens=count, temperature=0.0, **settings)
    return torch.stack(list(decode(model, logits, state, sampling)), dim=1)


def prompts_of(*lengths, vocab=60):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


def larger(dtype=torch.bfloat16, layers=3, dim=128, device="cpu"):
    """A model whose parameters all matter, as large as the kernels want."""
    torch.manual_seed(2)
    config = BackboneConfig(dim=dim, num_layers=layers)
    model = RWKV7LM(TextModel(backbone=config, text=TextConfig(vocab_size=60)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(device, dtype).eval()


class Doubled(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@pytest.fixture
def model():
    return larger(torch.float64, layers=2, dim=64)


def test_prompts_in_pieces_are_prompts_as_a_whole(model, monkeypatch):
    vocab = model.config.text.vocab_size
    prompts = prompts_of(1, 16, 17, 50, 33, vocab=vocab)
    logits, state = prefill(model, prompts)
    monkeypatch.setattr(decoding, "PIECE", 16 * len(prompts))
    again, after = prefill(model, prompts)
    assert torch.allclose(again, logits, atol=1e-12)
    assert all(torch.allclose(x, y, atol=1e-12) for x, y in zip(after, state, strict=True))


def test_steps_are_the_model_one_token_on(model):
    """Also through modules that somebody has hooked or wrapped, which are not passed by."""
    prompts = prompts_of(3, 9, vocab=model.config.text.vocab_size)
    hooked, seen = copy.deepcopy(model), []
    hooked.backbone.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(tokens_of(model, prompts), tokens_of(hooked, prompts))
    assert len(seen) == 8  # one prefill, seven steps
    wrapped, att = copy.deepcopy(model), model.backbone.blocks[0].att
    doubled = Doubled(copy.deepcopy(att.key))
    wrapped.backbone.blocks[0].att.key = doubled
    found = tokens_of(wrapped, prompts)
    with torch.no_grad():
        model.backbone.blocks[0].att.key.weight.mul_(2)
    assert torch.equal(found, tokens_of(model, prompts))


def test_the_state_that_is_given_stays(model):
    logits, state = prefill(model, prompts_of(5))
    kept = state.clone()
    list(decode(model, logits, state, Sampling(max_new_tokens=4)))
    assert all(torch.equal(x, y) for x, y in zip(state, kept, strict=True))


def test_what_is_laid_out_anew_is_the_same_model(model):
    """Its parameters hold what they held; a step reads what is loaded or learnt afterwards."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    prompts = prompts_of(4, vocab=model.config.text.vocab_size)
    first = tokens_of(model, prompts)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    other = larger(torch.float64, layers=2, dim=64)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.load_state_dict(other.state_dict())
    changed = tokens_of(model, prompts)
    assert torch.equal(changed, tokens_of(other, prompts)) and not torch.equal(changed, first)
    logits, _ = model(torch.tensor(prompts))
    logits.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.5 * parameter.grad
    again = copy.deepcopy(model)
    assert torch.equal(tokens_of(model, prompts), tokens_of(again, prompts))


# --- rows in slots ------------------------------------------------------------------------------


@pytest.fixture
def slots(monkeypatch):
    """Rows live in slots, and a step is plain PyTorch on them."""
    taken = []

    class Step:
        def __init__(self, weights, width):
            self.weights = weights

        def __call__(self, tokens, slots, *memory):
            real = slots >= 0
            rows = slots[real].long()
            state = [t[:, rows] for t in memory]
            logits = decoding.definition.step(tokens[real], self.weights, *state)
            for t, new in zip(memory, state, strict=True):
                t[:, rows] = new
            return torch.nn.functional.pad(logits, (0, 0, 0, len(slots) - len(rows)))

    def capture(self, width):
        tokens = torch.zeros(width, dtype=torch.long)
        slots = torch.full((width,), -1, dtype=torch.int32)
        logits = torch.empty(width, len(self.weights.head), dtype=self.dtype)
        step = Step(self.weights, width)

        class Graph:
            def replay(_):
                logits.copy_(step(tokens, slots, *self.memory))

        taken.append(width)
        return decoding.Graph(tokens, slots, logits, Graph(), step)

    monkeypatch.setattr(decoding.cuda, "unavailable", lambda device, weights: "")
    monkeypatch.setattr(decoding.Decoder, "capture", capture)
    return taken


def test_rows_in_slots_are_rows_alone(model, slots, monkeypatch):
    prompts = prompts_of(3, 8, 5, vocab=model.config.text.vocab_size)
    found = tokens_of(model, prompts)
    assert slots == [4]  # the next power of two
    monkeypatch.setattr(decoding.cuda, "unavailable", lambda device, weights: "none here")
    assert torch.equal(found, tokens_of(copy.deepcopy(model), prompts))


def test_writers_take_turns(model, slots):
    """Two that go on alternately, a third that makes the memory grow meanwhile, one given up."""
    vocab = model.config.text.vocab_size
    (a, b, c), sampling = (
        prompts_of(3, 8, 5, vocab=vocab),
        Sampling(max_new_tokens=9, temperature=0.0),
    )

    def writer(prompt):
        return decode(model, *prefill(model, [prompt]), sampling)

    alone = {key: [int(t) for t in writer(p)] for key, p in (("a", a), ("b", b))}
    first, second, third = writer(a), writer(b), writer(c)
    found = {"a": [], "b": []}
    for number, (x, y) in enumerate(zip(first, second, strict=True)):
        found["a"].append(int(x)), found["b"].append(int(y))
        if number == 3:
            next(third), third.close()
    assert found == alone
    decoder = decoding.DECODERS[model]
    assert sorted(decoder.free) == list(range(decoder.memory.wkv.shape[1]))  # none is lost
    held = decoder.memory.wkv.shape[1]
    for _ in range(50):
        next(writer(a))
    assert decoder.memory.wkv.shape[1] == held


# --- on a GPU -----------------------------------------------------------------------------------

gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 31, 64, 100, 300])
def test_graphs_are_no_worse_than_modules(dtype, rows):
    model = larger(dtype, device="cuda")
    exact = copy.deepcopy(model).double()
    tokens = torch.randint(60, (rows, 6), device="cuda")
    with torch.no_grad():
        _, state = model(tokens[:, :3])
        _, right = exact(tokens[:, :3])
        rough = state
        with stepping(model, state) as step:
            for t in tokens[:, 3:].unbind(1):
                got = step(t).double()
                want, right = (x if i else x[:, -1] for i, x in enumerate(exact(t[:, None], right)))
                bad, rough = (x if i else x[:, -1] for i, x in enumerate(model(t[:, None], rough)))
    assert (got - want).norm() <= 1.1 * (bad - want).norm()


@gpu
@pytest.mark.parametrize("width", [1, 4, 16, 64])
def test_a_row_does_not_depend_on_its_mates(width, monkeypatch):
    """Bit for bit, at one width, wherever in the batch it is."""
    model = larger(device="cuda")
    monkeypatch.setattr(decoding, "padded_width", lambda rows: width)
    tokens = torch.randint(60, (width, 5), device="cuda")
    _, state = model(tokens[:, :2])

    def logits(rows):
        with stepping(model, state.select(rows)) as step:
            return torch.stack([step(t[rows]).clone() for t in tokens[:, 2:].unbind(1)])

    together = logits(list(range(width)))
    for row in {0, width // 2, width - 1}:
        assert torch.equal(logits([row])[:, 0], together[:, row])


@gpu
def test_ten_thousand_writers_take_the_memory_of_one():
    model = larger(device="cuda")
    prompts = prompts_of(4, 7)

    def some(count):
        for _ in range(count):
            logits, state = prefill(model, prompts)
            writing = decode(model, logits, state, Sampling(max_new_tokens=4, temperature=0.0))
            list(itertools.islice(writing, 2))
            writing.close()

    some(20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    some(2000)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before


@gpu
def test_graph_state_is_what_the_model_would_hold():
    model = larger(torch.float16, device="cuda")
    tokens = torch.randint(60, (5, 4), device="cuda")
    empty = State.zeros(model.config.backbone.resolved(), 5, "cuda", torch.float16)
    with torch.no_grad():
        _, right = model(tokens)
        with stepping(model, empty) as step:
            for t in tokens.unbind(1):
                step(t)
            decoder = decoding.DECODERS[model]
            used = [i for i in range(decoder.memory.wkv.shape[1]) if i not in decoder.free]
            held = decoder.memory.select(used)
    assert all(
        torch.allclose(x.float(), y.float(), atol=2e-2) for x, y in zip(held, right, strict=True)
    )
