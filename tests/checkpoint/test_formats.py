"""Three layouts of RWKV-7: sizes read from shapes, names translated there and back bit for bit."""

import json
import re

import pytest
import torch
from official import official_checkpoint
from torch import Tensor

from goose_mm import checkpoint
from goose_mm.config import BackboneConfig, TextConfig, TextModel

UNUSED = {f"blocks.0.att.v{i}" for i in (0, 1, 2)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal names, shapes, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[n].shape == b[n].shape and a[n].dtype == b[n].dtype and a[n].equal(b[n]) for n in a
    )


def used(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in UNUSED}


def test_every_size_is_read_from_the_shapes() -> None:
    tensors = official_checkpoint(
        3, 192, ffn=500, vocab=777, ranks=(64, 8, 12, 20), head_size=32, dtype=torch.bfloat16
    )
    config, ours = checkpoint.to_goose(tensors)
    assert config.backbone == BackboneConfig(
        dim=192, num_layers=3, head_size=32, ffn_dim=500,
        decay_rank=64, a_rank=8, v_rank=12, gate_rank=20,
    )  # fmt: skip
    assert config.text == TextConfig(vocab_size=777, tokenizer="bpe")
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours.values())


@pytest.mark.parametrize(
    ("rows", "tokenizer"),
    [(65536, "world"), (65529, "world"), (50304, "pile"), (50277, "pile"), (65537, "bpe")],
)
def test_the_vocabulary_size_tells_the_tokenizer(rows: int, tokenizer: str) -> None:
    tensors = official_checkpoint()
    for name in ("emb.weight", "head.weight"):
        tensors[name] = torch.zeros(1, 128).expand(rows, 128)
    assert checkpoint.to_goose(tensors)[0].text.tokenizer == tokenizer


def test_our_names_are_the_official_ones_under_backbone() -> None:
    tensors = official_checkpoint()
    _, ours = checkpoint.to_goose(tensors)
    renamed = {"emb.weight": tensors["emb.weight"], "head.weight": tensors["head.weight"]}
    renamed |= {f"backbone.{n}": t for n, t in used(tensors).items() if n not in renamed}
    assert same(ours, renamed)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_vectors_and_layer_0_come_in_two_forms(flat: bool, residual: bool) -> None:
    plain = checkpoint.to_goose(official_checkpoint())[1]
    other = official_checkpoint(flat=flat, layer0_value_residual=residual)
    if not residual:  # the generator then drew other numbers: compare with the same draw
        plain = checkpoint.to_goose(official_checkpoint(layer0_value_residual=False))[1]
    assert same(checkpoint.to_goose(other)[1], plain)


@pytest.mark.parametrize(
    "wrap",
    [
        "_forward_module.{}".format,
        "module._orig_mod.{}".format,
        lambda name: name.replace("blocks.", "_orig_mod.blocks.").replace(
            ".att.", "._orig_mod.att."
        ),
    ],
)
def test_wrappers_of_training_frameworks_are_removed(wrap) -> None:
    tensors = official_checkpoint()
    wrapped = {wrap(name): tensor for name, tensor in tensors.items()}
    assert same(checkpoint.to_goose(wrapped)[1], checkpoint.to_goose(tensors)[1])


def test_a_single_layer_has_no_value_residual() -> None:
    tensors = official_checkpoint(1)
    config, ours = checkpoint.to_goose(tensors)
    assert config.backbone.num_layers == 1 and not any(".v0" in name for name in ours)
    assert same(used(checkpoint.from_goose(config, ours, "rwkv")), used(tensors))


# fla


def test_fla_names_and_orientation() -> None:
    """Names and shapes of flash-linear-attention 0.6.0, whose own loader was used as a check."""
    tensors = official_checkpoint(layers=2, dim=128)
    config, ours = checkpoint.to_goose(tensors)
    fla = checkpoint.from_goose(config, ours, "fla")
    expected = {
        "model.embeddings.weight": (300, 128),
        "model.norm.weight": (128,),
        "model.norm.bias": (128,),
        "lm_head.weight": (300, 128),
    }
    for layer in (0, 1):
        block = f"model.layers.{layer}"
        norms = ["attn_norm", "ffn_norm", "attn.g_norm"] + ["pre_norm"] * (layer == 0)
        for norm in norms:
            expected |= {f"{block}.{norm}.weight": (128,), f"{block}.{norm}.bias": (128,)}
        expected |= {f"{block}.attn.x_{x}": (1, 1, 128) for x in "rwkvag"}
        expected |= {f"{block}.attn.{x}_proj.weight": (128, 128) for x in "rkvo"}
        expected |= {f"{block}.attn.k_k": (128,), f"{block}.attn.k_a": (128,)}
        expected |= {f"{block}.attn.r_k": (2, 64), f"{block}.ffn.x_k": (128,)}
        expected |= {f"{block}.ffn.key.weight": (512, 128), f"{block}.ffn.value.weight": (128, 512)}
        for x, rank in {"w": 32, "a": 24, "v": 16, "g": 40}.items():
            if x == "v" and layer == 0:
                continue
            expected[f"{block}.attn.{x}_lora.lora.0.weight"] = (rank, 128)
            expected[f"{block}.attn.{x}_lora.lora.2.weight"] = (128, rank)
            if x != "g":
                expected[f"{block}.attn.{x}_lora.lora.2.bias"] = (128,)
    assert {name: tuple(tensor.shape) for name, tensor in fla.items()} == expected

    lora = "model.layers.1.attn.w_lora.lora"
    assert fla[f"{lora}.0.weight"].equal(tensors["blocks.1.att.w1"].T)
    assert fla[f"{lora}.2.bias"].equal(tensors["blocks.1.att.w0"].flatten())
    assert fla["model.layers.1.attn.g_norm.bias"].equal(tensors["blocks.1.att.ln_x.bias"])
    assert fla["model.layers.0.pre_norm.weight"].equal(tensors["blocks.0.ln0.weight"])
    assert fla["model.layers.1.attn.o_proj.weight"].equal(tensors["blocks.1.att.output.weight"])


def test_fla_config_states_every_rank() -> None:
    sizes = BackboneConfig(
        dim=128, num_layers=2, ffn_dim=512, decay_rank=32, a_rank=24, v_rank=16, gate_rank=40
    )
    config = TextModel(backbone=sizes, text=TextConfig(vocab_size=300, tokenizer="bpe"))
    values = checkpoint.fla_config(config)
    stated = {
        "model_type": "rwkv7", "vocab_size": 300, "hidden_size": 128, "num_hidden_layers": 2,
        "head_dim": 64, "num_heads": 2, "intermediate_size": 512, "hidden_ratio": 4.0,
        "decay_low_rank_dim": 32, "a_low_rank_dim": 24, "v_low_rank_dim": 16,
        "gate_low_rank_dim": 40, "value_dim": [128, 128], "norm_eps": 1e-5, "norm_bias": True,
        "norm_first": True, "hidden_act": "sqrelu", "tie_word_embeddings": False,
    }  # fmt: skip
    assert stated.items() <= values.items()
    json.dumps(values)


@pytest.mark.parametrize("shape", [(6, 1, 1, 128), (6, 128)])
def test_old_fla_files_fuse_the_six_mixes(shape: tuple[int, ...]) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    fla = checkpoint.from_goose(config, ours, "fla")
    for layer in (0, 1):
        mixes = [fla.pop(f"model.layers.{layer}.attn.x_{x}") for x in "rwkvag"]
        fla[f"model.layers.{layer}.attn.x_x"] = torch.stack(mixes).reshape(shape)
    assert same(checkpoint.to_goose(fla)[1], ours)


def test_a_tied_head_is_the_embedding() -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    fla = checkpoint.from_goose(config, ours, "fla")
    del fla["lm_head.weight"]
    assert same(checkpoint.to_goose(fla)[1], ours | {"head.weight": ours["emb.weight"]})


def test_fla_norms_without_a_bias_have_one_of_0() -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    biases = [n for n in ours if n.endswith(".bias") and "ln_x" not in n]  # ln_x keeps its own
    zeros = {n: torch.zeros_like(ours[n]) for n in biases}
    fla = checkpoint.from_goose(config, ours | zeros, "fla")
    stated = checkpoint.fla_config(config) | {"norm_bias": False}
    lacking = {n: t for n, t in fla.items() if not re.search(r"(?<!g_)norm\.bias", n)}
    assert len(lacking) == len(fla) - len(biases)
    for tensors in (lacking, checkpoint.from_goose(config, ours, "fla")):  # fla skips what is there
        assert same(checkpoint.to_goose(tensors, stated)[1], ours | zeros)
    with pytest.raises(ValueError, match="missing"):
        checkpoint.to_goose(lacking, stated | {"norm_bias": True})


def test_fla_ties_the_head_where_its_configuration_says_so() -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    fla, stated = checkpoint.from_goose(config, ours, "fla"), checkpoint.fla_config(config)
    tied = checkpoint.to_goose(fla, stated | {"tie_word_embeddings": True})[1]
    assert tied["head.weight"].equal(ours["emb.weight"])
    del fla["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing \(head\.weight\)"):
        checkpoint.to_goose(fla, stated)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "silu"),
        ("norm_eps", 1e-6),
        ("norm_first", False),
        ("attn", {"layers": [1], "num_heads": 2}),
        ("quantization_config", {"bits": 4}),
        ("num_hidden_layers", 1),
        ("hidden_size", 64),
        ("head_dim", 32),
        ("vocab_size", 299),
        ("intermediate_size", 256),
        ("value_dim", 256),
        ("value_dim", [128, 256]),
        ("gate_low_rank_dim", 32),
    ],
)
def test_fla_fields_that_ask_for_other_mathematics_are_refused(field: str, value: object) -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    fla, stated = checkpoint.from_goose(config, ours, "fla"), checkpoint.fla_config(config)
    assert same(checkpoint.to_goose(fla, stated)[1], ours)
    with pytest.raises(ValueError, match=rf"config\.json says {field} = ") as error:
        checkpoint.to_goose(fla, stated | {field: value})
    assert "\n" not in str(error.value)


def test_fla_reads_heads_by_number_or_size() -> None:
    config, ours = checkpoint.to_goose(official_checkpoint())
    fla, stated = checkpoint.from_goose(config, ours, "fla"), checkpoint.fla_config(config)
    for heads in ({"num_heads": None}, {"head_dim": None}, {"num_heads": 7}, {"value_dim": None}):
        assert same(checkpoint.to_goose(fla, stated | heads)[1], ours)
    with pytest.raises(ValueError, match="num_heads = 4"):
        checkpoint.to_goose(fla, stated | {"head_dim": None, "num_heads": 4})


# there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["goose", "rwkv", "fla"])
def test_there_and_back_is_bit_exact(layout: checkpoint.Layout, dtype: torch.dtype) -> None:
    tensors = official_checkpoint(3, 192, ranks=(64, 32, 24, 48), dtype=dtype)
    config, ours = checkpoint.to_goose(tensors)
    there = checkpoint.from_goose(config, ours, layout)
    assert checkpoint.detect(there) == layout
    config_again, back = checkpoint.to_goose(there)
    assert config_again == config and same(back, ours)
    official = checkpoint.from_goose(config, back, "rwkv")
    assert official.keys() == tensors.keys()  # strict loaders find layer 0's unused tensors
    assert all(official[n].shape == tensors[n].shape for n in tensors)
    assert all(official[n].dtype == dtype for n in UNUSED)
    assert same(used(official), used(tensors))


# what is not a checkpoint of RWKV-7


R_K = "blocks.0.att.r_k"
ALIKE = {  # what an RWKV-7 text model may be taken for
    "RWKV-4": ["blocks.0.att.time_first"],
    "an RWKV-4": ["rwkv.blocks.0.attention.time_decay"],
    "RWKV-5": ["blocks.0.att.time_faaaa", "blocks.0.att.gate.weight"],
    "RWKV-6": ["blocks.0.att.time_maa_x", "blocks.0.att.gate.weight"],
    "DeepEmbed": ["blocks.0.ffn.s_emb.weight"],
    "7b checkpoint .DeepEmbed": ["blocks.0.qkv.s_emb.weight"],
    "state-tuned": ["blocks.0.att.time_state"],
    "an adapter": ["blocks.0.att.receptance.lora_A"],
    "a VisualRWKV-7 checkpoint": [
        f"rwkv.{R_K}", "vit.dino_featurizer.blocks.0.attn.qkv.weight", "proj.gate.weight",
    ],
    "VisualRWKV checkpoint of an older RWKV": ["rwkv.blocks.0.att.time_maa_x", "vit.pos_embed"],
    "a ModRWKV checkpoint": [f"llm.{R_K}", "proj.mlp.0.weight"],
    "ModRWKV": ["modality.world_encoder.adapter.proj.0.weight"],
    "an AudioRWKV checkpoint": ["pos_embed", R_K, "blocks.0.att.time_shift.weight"],
}  # fmt: skip
UNLIKE = {
    "the visual half of a VisualRWKV": ["proj.o_proj.weight", "vit.sam.blocks.0.attn.qkv.weight"],
    "audio model of goose_mm": ["backbone.blocks.0.att.a0", "patch.proj.weight"],
    "a vision.* model of goose_mm": ["lm.backbone.blocks.0.att.a0", "projector.proj.weight"],
    "flash-linear-attention": ["model.embeddings.weight", "model.layers.0.attn.q_proj.weight"],
    "timm": ["pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"],
    "open_clip": ["logit_scale", "visual.trunk.blocks.0.attn.qkv.weight"],
    "SigLIP model of transformers": ["vision_model.encoder.layers.0.self_attn.q_proj.weight"],
    "SAM": ["image_encoder.blocks.0.attn.qkv.weight", "mask_decoder.iou_token.weight"],
    "LLaMA": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    "GPT-2": ["transformer.h.0.attn.c_attn.weight"],
    "Mamba": ["backbone.layers.0.mixer.A_log"],
    "BERT": ["bert.encoder.layer.0.attention.self.query.weight"],
    "2 tensors, a, b": ["a", "b"],
}


@pytest.mark.parametrize("says", ALIKE)
def test_files_like_a_text_model_are_named(says: str) -> None:
    other = {name: torch.ones(1) for name in ALIKE[says]}
    for tensors in (other, official_checkpoint() | other):  # also beside the tensors of a model
        with pytest.raises(ValueError, match=f"this is.*{says}"):
            checkpoint.to_goose(tensors)


@pytest.mark.parametrize("says", UNLIKE)
def test_other_models_are_named(says: str) -> None:
    with pytest.raises(ValueError, match=f"no RWKV-7 text model.*{says}") as error:
        checkpoint.to_goose({name: torch.ones(1) for name in UNLIKE[says]})
    assert "DeepEmbed" not in str(error.value)


def test_other_files_are_named_behind_wrappers_too() -> None:
    names = [f"module.{name}" for name in ALIKE["an AudioRWKV checkpoint"]]
    with pytest.raises(ValueError, match="an AudioRWKV checkpoint"):
        checkpoint.to_goose({name: torch.ones(1) for name in names})


def test_other_models_are_named_by_their_configuration() -> None:
    with pytest.raises(ValueError, match="it looks like rwkv6qwen2"):
        checkpoint.to_goose({"weird.weight": torch.ones(1)}, {"model_type": "rwkv6qwen2"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ln_out.bias": None}, r"1 missing \(backbone.ln_out.bias\)"),
        ({"emb.weight": None}, "emb.weight is missing"),
        ({"extra": torch.ones(1)}, r"1 unknown \(backbone.extra\)"),
        ({"blocks.3.ln1.bias": torch.ones(128)}, "layer 2 is missing, layer 3 is there"),
        ({"blocks.1.att.w1": torch.ones(128, 33)}, r"w1 is \[128, 33\], expected \[128, 32\]"),
        (
            {"blocks.1.att.x_r": torch.ones(1, 1, 64)},
            r"x_r is \[1, 1, 64\], expected \[1, 1, 128\]",
        ),
        ({"blocks.0.att.r_k": torch.ones(128)}, r"r_k is \[128\], expected a matrix"),
        ({"blocks.0.att.r_k": torch.ones(2, 0)}, "r_k is empty"),
        ({"blocks.0.att.r_k": torch.ones(3, 50)}, "dim=128 must be a multiple of head_size=50"),
        ({"head.weight": torch.ones(299, 128)}, r"head.weight is \[299, 128\]"),
        ({"head.weight": torch.ones(300, 128).char()}, "int8: quantised"),
        ({"module.head.weight": torch.ones(300, 128)}, "differ only by the wrappers"),
    ],
)
def test_misfits_are_named(change: dict[str, Tensor | None], says: str) -> None:
    tensors = official_checkpoint() | change
    with pytest.raises(ValueError, match=says):
        checkpoint.to_goose({n: t for n, t in tensors.items() if t is not None})
