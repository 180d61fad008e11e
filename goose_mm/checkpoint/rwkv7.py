"""The names and shapes of RWKV-7 text checkpoints: the only place that knows foreign ones.

Three layouts hold the same RWKV-7 text model:
- goose: our modules' names, `backbone.` before the official ones, except `emb` and `head`;
- rwkv: an official `.pth` (`blocks.0.att.w1` [C, rank], ...);
- fla: a Hugging Face folder of flash-linear-attention (`model.layers.0.attn.w_lora.lora.0.weight`).
Every size is read from tensor shapes, none from a formula (specs: backbone-and-text, 2.2 to 2.4).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from goose_mm.config import BackboneConfig, TextConfig, TextModel

Layout = Literal["goose", "rwkv", "fla"]
Tensors = dict[str, Tensor]

WRAPPERS = ("_forward_module", "module", "_orig_mod")  # DeepSpeed, DDP, torch.compile

NORMS = {"ln1": "attn_norm", "ln2": "ffn_norm", "ln0": "pre_norm", "att.ln_x": "attn.g_norm"}
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
FLA_FUSED = "rwkvag"  # the order of the six mixes in `attn.x_x` of old fla files

NOT_RWKV7 = (  # pattern in a tensor's name, what such a file is
    (r"\.att\.time_maa", "an RWKV-6 checkpoint; only RWKV-7 is read"),
    (r"\.att\.(time_faaaa|time_mix_g)$", "an RWKV-5 checkpoint; only RWKV-7 is read"),
    (r"\.time_(first|decay)$", "an RWKV-4 checkpoint; only RWKV-7 is read"),
    (r"\.ffn\.s_emb|\bqkv\.", "a DeepEmbed checkpoint (RWKV-7a/7b); only plain RWKV-7 is read"),
    (r"\.att\.time_state$", "a state-tuned checkpoint; give the base model without time_state"),
    (r"\.(lora_[AB]|bone|disha)\b", "an adapter; merge it into its base model first"),
    (r"^rwkv\.blocks\.", "a VisualRWKV checkpoint; only text models are converted"),
)


def _fla_block_names() -> dict[str, str]:
    """Official name inside a block -> fla name inside a layer."""
    names = {
        f"{ours}.{part}": f"{theirs}.{part}"
        for ours, theirs in NORMS.items()
        for part in ("weight", "bias")
    }
    names |= {f"att.{a}.weight": f"attn.{b}.weight" for a, b in PROJECTIONS.items()}
    names |= {f"att.x_{x}": f"attn.x_{x}" for x in FLA_FUSED}
    names |= {f"att.{n}": f"attn.{n}" for n in ("k_k", "k_a", "r_k")}
    for x in "wavg":
        names[f"att.{x}1"] = f"attn.{x}_lora.lora.0.weight"
        names[f"att.{x}2"] = f"attn.{x}_lora.lora.2.weight"
        if x != "g":
            names[f"att.{x}0"] = f"attn.{x}_lora.lora.2.bias"
    return names | {n: n for n in ("ffn.x_k", "ffn.key.weight", "ffn.value.weight")}


TO_FLA = _fla_block_names() | {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
TRANSPOSED = r"att\.[wavg][12]"  # `x @ w1` here, nn.Linear there
FROM_FLA = {theirs: ours for ours, theirs in TO_FLA.items()}


def text_shapes(config: TextModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a text model, in our layout."""
    size = config.backbone
    dim, wide = size.dim, size.ffn_dim
    ranks = {"w": size.decay_rank, "a": size.a_rank, "v": size.v_rank, "g": size.gate_rank}
    rows = (config.text.vocab_size, dim)
    shapes: dict[str, tuple[int, ...]] = {"emb.weight": rows}
    for layer in range(size.num_layers):
        norms = [norm for norm in NORMS if norm != "ln0" or layer == 0]
        block: dict[str, tuple[int, ...]] = {
            f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")
        }
        block |= {f"att.{name}.weight": (dim, dim) for name in PROJECTIONS}
        vectors = [f"x_{x}" for x in FLA_FUSED] + ["k_k", "k_a"]
        for x, rank in ranks.items():
            if x == "v" and layer == 0:  # layer 0 defines the value residual and mixes nothing
                continue
            block |= {f"att.{x}1": (dim, rank), f"att.{x}2": (rank, dim)}
            vectors += [f"{x}0"] if x != "g" else []
        block |= {f"att.{name}": (1, 1, dim) for name in vectors}
        block |= {"att.r_k": (size.num_heads, size.head_size), "ffn.x_k": (1, 1, dim)}
        block |= {"ffn.key.weight": (wide, dim), "ffn.value.weight": (dim, wide)}
        shapes |= {f"backbone.blocks.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {f"backbone.ln_out.{part}": (dim,) for part in ("weight", "bias")}
    return shapes | {"head.weight": rows}


def detect(tensors: Mapping[str, Tensor]) -> Layout:
    """Which layout these names are. ValueError that says what else the file is, if it is none."""
    for pattern, what in NOT_RWKV7:
        if any(re.search(pattern, name) for name in tensors):
            raise ValueError(f"this is {what}")
    for layout, name in (
        ("goose", "backbone.blocks.0.att.r_k"),
        ("rwkv", "blocks.0.att.r_k"),
        ("fla", "model.layers.0.attn.r_k"),
    ):
        if name in tensors:
            return layout
    raise ValueError(
        f"this is no RWKV-7 text model: {len(tensors)} tensors, {', '.join(list(tensors)[:3])} ..."
    )


def to_goose(tensors: Mapping[str, Tensor]) -> tuple[TextModel, Tensors]:
    """A checkpoint in any of the three layouts -> its configuration and tensors in ours.

    Values and dtypes are kept. The value residual of layer 0, which no model reads, is dropped.
    The tokenizer is guessed from the vocabulary size. ValueError names what is missing, unknown
    or misshapen.
    """
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in tensors.items()
    }
    if len(plain) != len(tensors):
        raise ValueError(f"some tensors differ only by the wrappers {', '.join(WRAPPERS)}")
    layout = detect(plain)
    if layout == "goose":
        official = {name.removeprefix("backbone."): t for name, t in plain.items()}
    else:
        official = plain if layout == "rwkv" else _from_fla(plain)
    ours = {
        name if name in ("emb.weight", "head.weight") else f"backbone.{name}": tensor
        for name, tensor in official.items()
        if not re.fullmatch(r"blocks\.0\.att\.v[012]", name)
    }
    config = _infer(ours, official)
    return config, fit(config, ours)


def from_goose(config: TextModel, tensors: Mapping[str, Tensor], layout: Layout) -> Tensors:
    """Tensors in our layout -> another layout, values and dtypes kept.

    "rwkv" gets layer 0's unused value residual back, so that strict loaders work: `v0` at its
    initial value, `v1` and `v2` zero, with the rank of the other layers.
    """
    ours = fit(config, tensors)
    if layout == "goose":
        return ours
    official = {name.removeprefix("backbone."): tensor for name, tensor in ours.items()}
    if layout == "fla":
        return _to_fla(official)
    dim, rank = config.backbone.dim, config.backbone.v_rank
    like = official["blocks.0.att.a0"]
    slope = torch.linspace(-0.5, 0.5, dim, dtype=torch.float32)
    unused = {
        "v0": (0.73 - 0.4 * slope).view(1, 1, dim).to(like),
        "v1": like.new_zeros(dim, rank),
        "v2": like.new_zeros(rank, dim),
    }
    return official | {f"blocks.0.att.{name}": tensor for name, tensor in unused.items()}


def fla_config(config: TextModel) -> dict[str, Any]:
    """config.json of a model in fla's layout (model_type rwkv7), every rank written out."""
    size = config.backbone
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": config.text.vocab_size,
        "hidden_size": size.dim,
        "num_hidden_layers": size.num_layers,
        "head_dim": size.head_size,
        "num_heads": size.num_heads,
        "intermediate_size": size.ffn_dim,
        "hidden_ratio": size.ffn_dim / size.dim,
        "decay_low_rank_dim": size.decay_rank,
        "a_low_rank_dim": size.a_rank,
        "v_low_rank_dim": size.v_rank,
        "gate_low_rank_dim": size.gate_rank,
        "value_dim": [size.dim] * size.num_layers,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "fuse_norm": False,
        "attn": None,
        "attn_mode": "chunk",
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }


def _infer(ours: Tensors, official: Tensors) -> TextModel:
    """The sizes of a model from the shapes of its tensors."""

    def shape(name: str) -> tuple[int, int]:
        if name not in official:
            raise ValueError(f"{name} is missing: not a whole RWKV-7 text model")
        if official[name].ndim != 2:
            raise ValueError(f"{name} is {list(official[name].shape)}, expected a matrix")
        if 0 in official[name].shape:
            raise ValueError(f"{name} is empty: {list(official[name].shape)}")
        return official[name].shape[0], official[name].shape[1]

    found = {int(m[1]) for name in official if (m := re.match(r"blocks\.(\d+)\.", name))}
    layers = len(found)
    if found != set(range(layers)):
        gap = min(set(range(layers)) - found)
        raise ValueError(f"layer {gap} is missing, layer {max(found)} is there")
    vocab_size, dim = shape("emb.weight")
    block = "blocks.0.att."
    backbone = BackboneConfig(
        dim=dim,
        num_layers=layers,
        head_size=shape(block + "r_k")[1],
        ffn_dim=shape("blocks.0.ffn.key.weight")[0],
        decay_rank=shape(block + "w1")[1],
        a_rank=shape(block + "a1")[1],
        v_rank=shape("blocks.1.att.v1")[1] if layers > 1 else 0,
        gate_rank=shape(block + "g1")[1],
    )
    tokenizer: Literal["world", "pile", "bpe"] = "bpe"
    if 65529 <= vocab_size <= 65536:
        tokenizer = "world"
    elif 50277 <= vocab_size <= 50304:
        tokenizer = "pile"
    return TextModel(backbone=backbone, text=TextConfig(vocab_size=vocab_size, tokenizer=tokenizer))


def fit(config: TextModel, tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors in order, vectors as [1,1,C]; ValueError unless they are just this model's."""
    shapes = text_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ValueError(
            "these tensors are not one RWKV-7 text model: "
            + _some("missing", missing)
            + (" and " if missing and unknown else "")
            + _some("unknown", unknown)
        )
    fitted = {}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: quantised checkpoints are not read")
        if tensor.shape == shape[-1:] and shape[:-1] == (1, 1):
            tensor = tensor.view(shape)
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
        fitted[name] = tensor
    return fitted


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _from_fla(tensors: Mapping[str, Tensor]) -> Tensors:
    official: Tensors = {}
    for name, tensor in tensors.items():
        layer, inner = _split(name, "model.layers.")
        if inner == "attn.x_x":
            if tensor.ndim < 2 or len(tensor) != len(FLA_FUSED):
                raise ValueError(f"{name} is {list(tensor.shape)}, expected [6, 1, 1, C]")
            for x, mix in zip(FLA_FUSED, tensor.flatten(1), strict=True):
                official[f"blocks.{layer}.att.x_{x}"] = mix
            continue
        ours = FROM_FLA.get(inner, inner)
        name = f"blocks.{layer}.{ours}" if layer else ours
        official[name] = tensor.t() if re.fullmatch(TRANSPOSED, ours) else tensor
    if "emb.weight" in official:  # absent head: tie_word_embeddings
        official.setdefault("head.weight", official["emb.weight"])
    return official


def _to_fla(official: Mapping[str, Tensor]) -> Tensors:
    theirs: Tensors = {}
    for name, tensor in official.items():
        layer, inner = _split(name, "blocks.")
        if re.fullmatch(TRANSPOSED, inner):
            tensor = tensor.t()
        elif tensor.ndim == 3 and not inner.startswith("att.x_"):
            tensor = tensor.flatten()
        theirs[f"model.layers.{layer}.{TO_FLA[inner]}" if layer else TO_FLA[inner]] = tensor
    return theirs


def _split(name: str, blocks: str) -> tuple[str, str]:
    """Layer ("" outside the blocks) and the name inside it: blocks.3.att.w1 -> 3, att.w1."""
    match = re.fullmatch(rf"{re.escape(blocks)}(\d+)\.(.+)", name)
    return (match[1], match[2]) if match else ("", name)
