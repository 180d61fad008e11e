"""Laws of the RWKV-7 stack: split = whole, decode = prefill, padded = packed = single."""

import math
import sys

import pytest
import torch
from torch.func import functional_call, grad, vmap

from goose_mm.backbone import RWKV7, State
from goose_mm.backbone.token_shift import ConvShift, Stream
from goose_mm.config import BackboneConfig, ConfigError

CONFIG = BackboneConfig(dim=128, num_layers=3, decay_rank=8, a_rank=8, v_rank=8, gate_rank=16)


def shaken(config: BackboneConfig, seed: int = 0) -> RWKV7:
    """A float64 stack whose every parameter matters (the official init has many zeros)."""
    torch.manual_seed(seed)
    backbone = RWKV7(config).double().eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def same(a, b, atol: float = 1e-9) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, atol=atol, rtol=atol)


@pytest.mark.parametrize("cut", [1, 7, 36])
def test_split_is_whole(cut):
    backbone, x = shaken(CONFIG), tokens(2, 37, 128)
    whole, state = backbone(x)
    first, middle = backbone(x[:, :cut])
    kept = middle.clone()
    second, end = backbone(x[:, cut:], middle)
    same([torch.cat([first, second], 1), *end], [whole, *state])
    same(middle, kept, atol=0)  # the caller's state is not touched


def test_decode_is_prefill():
    backbone, x = shaken(CONFIG), tokens(2, 19, 128)
    whole, end = backbone(x)
    state, outputs = None, []
    for t in range(x.shape[1]):
        y, state = backbone(x[:, t : t + 1], state)
        outputs.append(y)
    same([torch.cat(outputs, 1), *state], [whole, *end])


@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
@pytest.mark.parametrize("carried", [False, True])
def test_padded_batch_is_one_by_one(side, carried):
    backbone = shaken(CONFIG)
    lengths, width = [5, 1, 20, 12], 20
    state = backbone(tokens(4, 6, 128, seed=3))[1] if carried else None
    x, mask = tokens(4, width, 128), torch.zeros(4, width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        places = {
            "left": range(width - n, width),
            "right": range(n),
            "both": range((width - n) // 2, (width - n) // 2 + n),
            "inside": sorted(torch.randperm(width, generator=torch.manual_seed(row))[:n].tolist()),
        }
        mask[row, list(places[side])] = True
    x[~mask] = math.inf  # what stands in padding must not matter
    x = torch.where(mask[..., None], x, 1e3)
    batched, end = backbone(x, state, mask=mask)
    for row in range(4):
        before = state.select(row) if state else None
        alone, alone_end = backbone(x[row, mask[row]][None], before)
        same([batched[row, mask[row]], *end.select(row)], [alone[0], *alone_end])


def test_a_row_without_tokens_keeps_its_state():
    backbone, state = shaken(CONFIG), shaken(CONFIG)(tokens(2, 4, 128))[1]
    mask = torch.tensor([[True, True], [False, False]])
    _, end = backbone(tokens(2, 2, 128), state, mask=mask)
    same(end.select(1), state.select(1), atol=0)


def test_packed_is_separate():
    backbone = shaken(CONFIG)
    lengths = [3, 0, 1, 9]
    state = backbone(tokens(4, 5, 128, seed=3))[1]
    x = tokens(1, sum(lengths), 128)
    bounds = torch.tensor([0, 3, 3, 4, 13], dtype=torch.int32)
    packed, end = backbone(x, state, cu_seqlens=bounds)
    for i, n in enumerate(lengths):
        if n == 0:
            same(end.select(i), state.select(i), atol=0)
            continue
        piece = slice(int(bounds[i]), int(bounds[i + 1]))
        alone, alone_end = backbone(x[:, piece], state.select(i))
        same([packed[:, piece], *end.select(i)], [alone, *alone_end])


def test_bidirectional_mirrors():
    """With a symmetric shift, reading backwards is reading forwards in a mirror."""
    config = BackboneConfig(dim=64, num_layers=2, bidirectional=True, shift="conv")
    backbone, x = shaken(config), tokens(2, 12, 64)
    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, ConvShift):
                module.weight.add_(module.weight.flip(2, 3).clone())
            if hasattr(module, "gate_weight"):
                module.gate_weight.zero_()
                module.gate_bias.zero_()
    forward, _ = backbone(x, grid=(3, 4))
    backward, _ = backbone(x.flip(1), grid=(3, 4))
    torch.testing.assert_close(forward, backward.flip(1))


def test_bidirectional_batch_is_one_by_one():
    config = BackboneConfig(dim=64, num_layers=2, bidirectional=True, shift="conv")
    backbone, x = shaken(config), tokens(2, 20, 64)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, 12:] = False
    batched, _ = backbone(x, mask=mask, grid=(5, 4))
    alone, _ = backbone(x[1:, :12], grid=(3, 4))
    torch.testing.assert_close(batched[1:, :12], alone)


def test_state_is_repeated_selected_and_saved(tmp_path):
    state = shaken(CONFIG)(tokens(3, 5, 128))[1]
    same(state.repeat(2).select([0, 2, 4]), state, atol=0)
    same(state.select(slice(1, 3)), state.select([1, 2]), atol=0)
    state.save(tmp_path / "state.safetensors")
    same(State.load(tmp_path / "state.safetensors"), state, atol=0)
    (tmp_path / "state.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a saved state"):
        State.load(tmp_path / "state.safetensors")


def test_gradient_through_the_state_is_whole_backpropagation():
    backbone, x = shaken(CONFIG).train(), tokens(1, 16, 128)
    backbone(x)[0].square().sum().backward()
    whole = [p.grad.clone() for p in backbone.parameters()]
    backbone.zero_grad()
    first, state = backbone(x[:, :9])
    second, _ = backbone(x[:, 9:], state)
    (first.square().sum() + second.square().sum()).backward()
    same([p.grad for p in backbone.parameters()], whole)


def test_every_parameter_gets_the_official_start():
    """Values worked out by hand for channel 0, the last channel and a middle head."""
    config = BackboneConfig(dim=256, num_layers=4)
    torch.manual_seed(0)
    backbone = RWKV7(config)
    assert all(p.isfinite().all() for p in backbone.parameters())
    att, ffn = backbone.blocks[1].att, backbone.blocks[1].ffn
    n, rest, depth = 130, 1 - 1 / 4, 1 / 3
    at = (0, 0, n)
    saw = ((n % 64) - 31.5) / 31.5
    ramp, zigzag = n / 255 - 0.5, saw * abs(saw)
    expected = {
        "x_r": 1 - (n / 256) ** (0.2 * rest), "x_w": 1 - (n / 256) ** (0.9 * rest),
        "x_k": 1 - (n / 256) ** (0.7 * rest), "x_v": 1 - (n / 256) ** (0.7 * rest),
        "x_a": 1 - (n / 256) ** (0.9 * rest), "x_g": 1 - (n / 256) ** (0.2 * rest),
        "w0": -6 + 6 * (n / 255) ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
        "a0": -0.19 + 0.3 * zigzag + 0.4 * ramp, "v0": 0.73 - 0.4 * ramp,
        "k_k": 0.71 - 0.1 * ramp, "k_a": 1.02,
    }  # fmt: skip
    for name, value in expected.items():
        assert getattr(att, name)[at].item() == pytest.approx(value, abs=1e-5), name
    assert ffn.x_k[at].item() == pytest.approx(1 - (n / 256) ** (rest**4), abs=1e-5)
    assert att.r_k.unique().tolist() == pytest.approx([-0.04])
    for name in ("w1", "a1", "v1", "g1"):
        assert not getattr(att, name).any(), name
    for name in ("w2", "a2", "v2", "g2"):  # rows are orthogonal: rank <= dim
        low = getattr(att, name)
        torch.testing.assert_close(low @ low.T, 0.01 * torch.eye(len(low)), atol=1e-5, rtol=0)
    for weight, gain in [(att.receptance, 1), (att.key, 0.1), (att.value, 1)]:
        gram = weight.weight @ weight.weight.T
        torch.testing.assert_close(gram, gain**2 * torch.eye(256), atol=1e-4, rtol=0)
    gram = ffn.key.weight.T @ ffn.key.weight
    torch.testing.assert_close(gram, torch.eye(256), atol=1e-4, rtol=0)
    assert not att.output.weight.any() and not ffn.value.weight.any()
    assert att.ln_x.weight.unique().item() == pytest.approx((2 / 4) ** 0.7)
    assert not hasattr(backbone.blocks[0].att, "v0")
    assert backbone.blocks[0].att.ln_x.eps == pytest.approx(64e-5)


def test_one_layer_starts_finite():
    RWKV7(BackboneConfig(dim=64, num_layers=1))(torch.zeros(1, 1, 64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: b(tokens(1, 3, 64)), "128 wide, the input 64"),
        (lambda b: b(tokens(1, 0, 128)), "0 tokens"),
        (lambda b: b(tokens(2, 3, 128), State.zeros(CONFIG, 3)), "3 rows, the batch 2"),
        (lambda b: Stream.of(tokens(1, 6, 128), grid=(2, 4)), "2 x 4 does not tile 6"),
        (lambda b: BackboneConfig(dim=100), "multiple of head_size"),
    ],
)
def test_wrong_input_says_what_is_wrong(call, message):
    with pytest.raises((ValueError, ConfigError), match=message):
        call(shaken(CONFIG))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_gradients_of_every_sample_are_those_of_a_loop(bidirectional):
    """torch.func over a stack and over one block, as differential privacy asks for."""
    shift = "conv" if bidirectional else "token"
    config = BackboneConfig(
        dim=32, num_layers=2, head_size=16, bidirectional=bidirectional, shift=shift
    )
    stack, x = shaken(config), tokens(3, 1, 6, 32)

    def whole(weights, sample):
        y, _ = functional_call(stack, weights, (sample,), {"grid": (2, 3)})
        return y.sin().sum()

    def block(weights, sample):
        start = State.zeros(config, 1, dtype=sample.dtype)
        before = (start.time_shift[0], start.channel_shift[0], None)
        stream = Stream.of(sample, grid=(2, 3))
        arguments = (sample, None, before, stream, "auto")
        return functional_call(stack.blocks[0], weights, arguments)[0].sin().sum()

    for loss, module in ((whole, stack), (block, stack.blocks[0])):
        weights = dict(module.named_parameters())
        each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
        for i, sample in enumerate(x):
            alone = torch.autograd.grad(loss(weights, sample), list(weights.values()))
            same([g[i] for g in each.values()], alone)


@pytest.mark.parametrize("layout", ["rows", "mask", "packed"])
def test_the_meta_device_gives_shapes(layout):
    with torch.device("meta"):
        backbone = RWKV7(CONFIG)
        x = torch.zeros(1, 20, 128)
        mask = torch.ones(1, 20, dtype=torch.bool) if layout == "mask" else None
        bounds = torch.tensor([0, 3, 20], dtype=torch.int32) if layout == "packed" else None
        y, state = backbone(x, mask=mask, cu_seqlens=bounds)
    assert y.is_meta and y.shape == x.shape
    assert state.wkv.shape == (3, 2 if layout == "packed" else 1, 2, 64, 64)
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in backbone.parameters())


def test_models_do_not_look_at_their_decays(monkeypatch):
    """On CUDA that would be to wait for the device; they know that no kernel's range is left."""
    monkeypatch.setattr(sys.modules["goose_mm.kernels.wkv7"], "lowest_of", None)
    shaken(CONFIG)(tokens(1, 5, 128))
