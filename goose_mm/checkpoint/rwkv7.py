"""Official RWKV-7 text checkpoints: one `.pth` with `blocks.0.att.w1` [C, rank] and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goose_mm.checkpoint.files import Tensors
from goose_mm.checkpoint.ours import fit, text_model
from goose_mm.config import TextModel

OUTER = ("emb.weight", "head.weight")  # all others stand behind `backbone.` in our layout


def recognise(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bool:
    return "blocks.0.att.r_k" in tensors


def to_ours(tensors: Tensors, settings: Mapping[str, Any]) -> tuple[TextModel, Tensors]:
    return text_model({n if n in OUTER else f"backbone.{n}": t for n, t in tensors.items()})


def from_ours(config: TextModel, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Tensors]:
    """Layer 0 gets its unused value residual back, so that strict loaders work: `v0` at its
    initial value, `v1` and `v2` zero, with the rank of the other layers."""
    official = {name.removeprefix("backbone."): t for name, t in fit(config, tensors).items()}
    dim, rank = config.backbone.dim, config.backbone.v_rank
    like = official["blocks.0.att.a0"]
    slope = torch.linspace(-0.5, 0.5, dim, dtype=torch.float32)
    unused = {
        "v0": (0.73 - 0.4 * slope).view(1, 1, dim).to(like),
        "v1": like.new_zeros(dim, rank),
        "v2": like.new_zeros(rank, dim),
    }
    return {}, official | {f"blocks.0.att.{name}": tensor for name, tensor in unused.items()}
