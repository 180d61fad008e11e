"""Hugging Face folders of flash-linear-attention (`model.layers.0.attn.w_lora.lora.0.weight`).

What config.json says is honoured or refused: it can change the mathematics while every tensor
keeps its name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from goose_mm.checkpoint.files import Tensors
from goose_mm.checkpoint.ours import MIXES, fit, text_model
from goose_mm.config import TextModel

NORMS = {"ln1": "attn_norm", "ln2": "ffn_norm", "ln0": "pre_norm", "att.ln_x": "attn.g_norm"}
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
MATRIX = r"att\.[wavg][12]"  # `x @ w1` here, nn.Linear there: transposed


def _block_names() -> dict[str, str]:
    """Our name inside a block -> fla's inside a layer."""
    names = {f"{a}.{part}": f"{b}.{part}" for a, b in NORMS.items() for part in ("weight", "bias")}
    names |= {f"att.{a}.weight": f"attn.{b}.weight" for a, b in PROJECTIONS.items()}
    names |= {f"att.x_{x}": f"attn.x_{x}" for x in MIXES}
    names |= {f"att.{n}": f"attn.{n}" for n in ("k_k", "k_a", "r_k")}
    for x in "wavg":
        names[f"att.{x}1"] = f"attn.{x}_lora.lora.0.weight"
        names[f"att.{x}2"] = f"attn.{x}_lora.lora.2.weight"
        if x != "g":
            names[f"att.{x}0"] = f"attn.{x}_lora.lora.2.bias"
    return names | {n: n for n in ("ffn.x_k", "ffn.key.weight", "ffn.value.weight")}


TO_FLA = _block_names() | {
    "emb.weight": "model.embeddings.weight",
    "backbone.ln_out.weight": "model.norm.weight",
    "backbone.ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
FROM_FLA = {theirs: ours for ours, theirs in TO_FLA.items()}


def recognise(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    return "model.layers.0.attn.r_k" in tensors


def to_ours(tensors: Tensors, settings: Mapping[str, Any]) -> tuple[TextModel, Tensors]:
    """ValueError also for what config.json asks for and our model does not do."""
    _refuse(settings)
    ours: Tensors = {}
    for name, tensor in tensors.items():
        layer, inner = _split(name, "model.layers.")
        block = f"backbone.blocks.{layer}." if layer else ""
        if inner == "attn.x_x":  # files of early versions: the six mixes in one
            if tensor.ndim < 2 or len(tensor) != len(MIXES):
                raise ValueError(f"{name} is {list(tensor.shape)}, expected [6, 1, 1, C]")
            ours |= {f"{block}att.x_{x}": t for x, t in zip(MIXES, tensor.flatten(1), strict=True)}
            continue
        name = FROM_FLA.get(inner, inner)
        ours[block + name] = tensor.t() if re.fullmatch(MATRIX, name) else tensor
    config, ours = text_model(_tied(_with_biases(ours, settings), settings))
    _compare(config, settings)
    return config, ours


def from_ours(config: TextModel, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensors]:
    theirs: Tensors = {}
    for name, tensor in fit(config, tensors).items():
        layer, inner = _split(name, "backbone.blocks.")
        if re.fullmatch(MATRIX, inner):
            tensor = tensor.t()
        elif tensor.ndim == 3 and not inner.startswith("att.x_"):
            tensor = tensor.flatten()
        theirs[f"model.layers.{layer}.{TO_FLA[inner]}" if layer else TO_FLA[inner]] = tensor
    dtype = str(theirs["model.embeddings.weight"].dtype).split(".")[-1]
    return fla_config(config) | {"torch_dtype": dtype}, theirs


def fla_config(config: TextModel) -> dict[str, Any]:
    """config.json of a model in fla's layout (model_type rwkv7), every rank written out."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        **_sizes(config),
        "hidden_ratio": config.backbone.ffn_dim / config.backbone.dim,
        "value_dim": [config.backbone.dim] * config.backbone.num_layers,
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


def _sizes(config: TextModel) -> dict[str, int]:
    size = config.backbone
    return {
        "vocab_size": config.text.vocab_size,
        "hidden_size": size.dim,
        "num_hidden_layers": size.num_layers,
        "head_dim": size.head_size,
        "num_heads": size.num_heads,
        "intermediate_size": size.ffn_dim,
        "decay_low_rank_dim": size.decay_rank,
        "a_low_rank_dim": size.a_rank,
        "v_low_rank_dim": size.v_rank,
        "gate_low_rank_dim": size.gate_rank,
    }


ONLY = {  # field -> what our model does
    "hidden_act": ("sqrelu", "relu2"),
    "norm_eps": (1e-5,),
    "norm_first": (True,),
    "attn": (None,),
    "quantization_config": (None,),
}


def _refuse(settings: Mapping[str, Any]) -> None:
    for field, known in ONLY.items():
        if field in settings and settings[field] not in known:
            raise ValueError(
                f"config.json says {field} = {settings[field]!r}, and only "
                f"{' or '.join(map(repr, known))} is computed here"
            )


def _compare(config: TextModel, settings: Mapping[str, Any]) -> None:
    """Sizes that config.json states must be those of the tensors; fla loads by the former."""
    size = config.backbone
    found = _sizes(config) | {"value_dim": size.dim}
    if settings.get("head_dim") is not None:
        del found["num_heads"]  # not looked at then
    if size.num_layers == 1:
        del found["v_low_rank_dim"]  # of the layers behind the first
    for field, number in found.items():
        stated = settings.get(field)
        if stated is not None and any(
            n != number for n in (stated if isinstance(stated, list) else [stated])
        ):
            raise ValueError(f"config.json says {field} = {stated}, the tensors say {number}")


def _with_biases(ours: Tensors, settings: Mapping[str, Any]) -> Tensors:
    """`norm_bias` false: LayerNorms without a bias, which is a bias of 0."""
    if settings.get("norm_bias") is not False:
        return ours
    norms = r"(.*\.)?(ln0|ln1|ln2|ln_out)\.weight"
    zeros = {n[: -len("weight")] + "bias": t for n, t in ours.items() if re.fullmatch(norms, n)}
    return ours | {name: tensor.new_zeros(tensor.shape) for name, tensor in zeros.items()}


def _tied(ours: Tensors, settings: Mapping[str, Any]) -> Tensors:
    """`tie_word_embeddings` true, or unsaid and no head in the file: the head is the embedding."""
    tied = settings.get("tie_word_embeddings")
    if "emb.weight" in ours and (tied or (tied is None and "head.weight" not in ours)):
        return ours | {"head.weight": ours["emb.weight"]}
    return ours


def _split(name: str, blocks: str) -> tuple[str, str]:
    """Layer ("" outside the blocks) and the name inside it: blocks.3.att.w1 -> 3, att.w1."""
    match = re.fullmatch(rf"{re.escape(blocks)}(\d+)\.(.+)", name)
    return (match[1], match[2]) if match else ("", name)
