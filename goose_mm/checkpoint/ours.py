"""Our own layout: a folder with config.json and model.safetensors.

The tensors of a text model have the official names behind `backbone.`, except `emb` and `head`.
Every size of a model can be read from their shapes; none comes from a formula.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from goose_mm.checkpoint.files import Tensors, read_settings, write_folder
from goose_mm.config import (
    BackboneConfig,
    ModelConfig,
    TextConfig,
    TextModel,
    model_config,
    to_dict,
)

NORMS = ("ln0", "ln1", "ln2", "att.ln_x")  # of a block; ln0 in the first alone
PROJECTIONS = ("receptance", "key", "value", "output")
MIXES = "rwkvag"  # what is mixed with the token before: receptance, decay, key, value, a, gate


def recognise(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    """The names of a text model; with a config.json of ours (`states`), any model is."""
    return "backbone.blocks.0.att.r_k" in tensors


def states(settings: Mapping[str, Any]) -> bool:
    """Whether this is a config.json of ours; Hugging Face's names a `model_type`."""
    return bool(settings) and "model_type" not in settings


def to_ours(tensors: Tensors, settings: Mapping[str, Any]) -> tuple[ModelConfig, Tensors]:
    """The tensors of a text model are checked against config.json; those of other models are
    checked by the model that takes them."""
    if not states(settings):
        return text_model(tensors)
    config = model_config(settings, "config.json")
    return config, fit(config, tensors) if isinstance(config, TextModel) else tensors


def from_ours(config: TextModel, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensors]:
    return to_dict(config), fit(config, tensors)


def is_ours(folder: str | os.PathLike[str]) -> bool:
    """Whether config.json of a folder is ours."""
    return states(read_settings(Path(folder)))


def save_model(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    extra_files: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Write model.safetensors, copies of `extra_files` and config.json, all of them or none.

    OSError when they cannot be written; then the files that were there are as they were.
    """
    write_folder(Path(folder), to_dict(config), tensors, map(Path, extra_files))


def text_model(tensors: Tensors) -> tuple[TextModel, Tensors]:
    """The model that these tensors, in our layout, are: its sizes read from their shapes.

    The value residual of layer 0, which no model reads, is dropped. ValueError names what is
    missing, unknown or misshapen.
    """
    used = {n: t for n, t in tensors.items() if not re.fullmatch(UNUSED, n)}
    config = sizes(used)
    return config, fit(config, used)


UNUSED = r"backbone\.blocks\.0\.att\.v[012]"


def sizes(tensors: Mapping[str, Tensor]) -> TextModel:
    """The configuration of a text model from the shapes of its tensors.

    Of the tokenizer they tell the number of rows alone, which names the released vocabularies.
    """

    def shape(name: str) -> tuple[int, int]:
        if name not in tensors:
            raise ValueError(f"{name} is missing: not a whole RWKV-7 text model")
        if tensors[name].ndim != 2:
            raise ValueError(f"{name} is {list(tensors[name].shape)}, expected a matrix")
        if 0 in tensors[name].shape:
            raise ValueError(f"{name} is empty: {list(tensors[name].shape)}")
        return tensors[name].shape[0], tensors[name].shape[1]

    found = {int(m[1]) for name in tensors if (m := re.match(r"backbone\.blocks\.(\d+)\.", name))}
    layers = len(found)
    if found != set(range(layers)):
        gap = min(set(range(layers)) - found)
        raise ValueError(f"layer {gap} is missing, layer {max(found)} is there")
    vocab_size, dim = shape("emb.weight")
    block = "backbone.blocks.0."
    backbone = BackboneConfig(
        dim=dim,
        num_layers=layers,
        head_size=shape(block + "att.r_k")[1],
        ffn_dim=shape(block + "ffn.key.weight")[0],
        decay_rank=shape(block + "att.w1")[1],
        a_rank=shape(block + "att.a1")[1],
        v_rank=shape("backbone.blocks.1.att.v1")[1] if layers > 1 else 0,
        gate_rank=shape(block + "att.g1")[1],
    )
    tokenizer: Literal["world", "pile", "bpe"] = "bpe"
    if 65529 <= vocab_size <= 65536:
        tokenizer = "world"
    elif 50277 <= vocab_size <= 50304:
        tokenizer = "pile"
    return TextModel(backbone=backbone, text=TextConfig(vocab_size=vocab_size, tokenizer=tokenizer))


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
        vectors = [f"x_{x}" for x in MIXES] + ["k_k", "k_a"]
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
