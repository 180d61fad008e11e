"""A model's weights as a step of decoding reads them: the same numbers, some laid out anew.

Matrices that are multiplied together lie together, and all by rows. The parameters stay what they
were, with the same shapes and values, and become views of where the numbers lie now: nothing is
held twice, and what changes the parameters changes what a step reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from goose_mm.backbone.block import Block
from goose_mm.backbone.channel_mix import ChannelMix
from goose_mm.backbone.model import RWKV7
from goose_mm.backbone.time_mix import TimeMix
from goose_mm.backbone.token_shift import TokenShift
from goose_mm.kernels.step import Gates, Layer, Norm, Weights

PLAIN = (nn.Linear, nn.LayerNorm, nn.GroupNorm, nn.Embedding, nn.ModuleList)
PLAIN += (RWKV7, Block, TimeMix, ChannelMix, TokenShift)


def plain(embedding: nn.Module, backbone: RWKV7, head: nn.Module) -> bool:
    """Whether a step may read the weights itself: no part is replaced or hooked by others."""
    parts = [embedding, head, *backbone.modules()]
    return not backbone.config.bidirectional and not any(
        type(part) not in PLAIN
        or part._forward_hooks
        or part._forward_pre_hooks
        or any(type(p) is not nn.Parameter for p in part._parameters.values() if p is not None)
        for part in parts
    )


@torch.no_grad()
def lay_out(embedding: nn.Embedding, backbone: RWKV7, head: nn.Linear) -> Weights:
    """The weights of a model whose stack reads from left to right."""
    blocks: Any = backbone.blocks
    return Weights(
        embedding.weight.detach(),
        norm_of(blocks[0].ln0),
        tuple(layer_of(block) for block in blocks),
        norm_of(backbone.ln_out),
        head.weight.detach(),
        backbone.config.head_size,
    )


def layer_of(block: Any) -> Layer:
    att, ffn = block.att, block.ffn
    names = "wavg" if hasattr(att, "v0") else "wag"
    second = {name: by_rows(getattr(att, f"{name}2")) for name in names}
    gates = Gates(
        w2=second["w"], a2=second["a"], v2=second.get("v"), g2=second["g"],
        w0=flat(att.w0), a0=flat(att.a0), v0=flat(att.v0) if "v" in names else None,
        k_k=flat(att.k_k), k_a=flat(att.k_a), r_k=flat(att.r_k),
        norm=norm_of(att.ln_x), a_max=float(att.a_max),
    )  # fmt: skip
    return Layer(
        norm1=norm_of(block.ln1),
        mu=together([getattr(att, f"x_{x}") for x in "rkvwag"]).flatten(1),
        rkv=together([att.receptance.weight, att.key.weight, att.value.weight]),
        first=tuple(by_rows(getattr(att, f"{name}1")) for name in names),
        gates=gates,
        output=att.output.weight.detach(),
        norm2=norm_of(block.ln2),
        mu_ffn=flat(ffn.x_k)[None],
        key=ffn.key.weight.detach(),
        value=ffn.value.weight.detach(),
    )


def norm_of(norm: Any) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach())


def flat(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().flatten()


def by_rows(parameter: nn.Parameter) -> Tensor:
    """[a, b] as [b, a] by rows: each row holds what one output is made of."""
    if not parameter.t().is_contiguous():
        parameter.data = parameter.detach().t().contiguous().t()
    return parameter.detach().t()


def together(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Parameters of one shape as one tensor [n, *shape]."""
    first, size = parameters[0], parameters[0].nbytes
    whole = first.untyped_storage().data_ptr()
    if not all(
        p.is_contiguous()
        and p.untyped_storage().data_ptr() == whole
        and p.data_ptr() == first.data_ptr() + i * size
        for i, p in enumerate(parameters)
    ):
        for parameter, row in zip(parameters, torch.stack(list(parameters)), strict=True):
            parameter.data = row
    storage = first.detach()
    return storage.as_strided((len(parameters), *first.shape), (first.numel(), *first.stride()))
