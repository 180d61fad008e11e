"""The folder that `goose_mm.hf` saves: our names behind `lm.`, our fields among transformers' own.

transformers itself writes it, so there is only the way from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from goose_mm.checkpoint.files import Tensors
from goose_mm.checkpoint.ours import fit
from goose_mm.config import BackboneConfig, TextConfig, TextModel, from_dict

MODEL_TYPE = "goose_rwkv7"


def recognise(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    return settings.get("model_type") == MODEL_TYPE


def to_ours(tensors: Tensors, settings: Mapping[str, Any]) -> tuple[TextModel, Tensors]:
    def part(cls: type) -> dict[str, Any]:
        return {f.name: settings[f.name] for f in fields(cls) if f.name in settings}

    config = from_dict(TextModel, {"backbone": part(BackboneConfig), "text": part(TextConfig)})
    ours = {name.removeprefix("lm."): tensor for name, tensor in tensors.items()}
    if settings.get("tie_word_embeddings") and "emb.weight" in ours:
        ours.setdefault("head.weight", ours["emb.weight"])
    return config, fit(config, ours)
