"""The official initialisation, all of it (RWKV-LM RWKV-v7/train_temp; paper, appendix).

With l the layer, L the number of layers and n the channel: `depth` l/(L-1), `rest` 1 - l/L,
`ramp` n/(C-1) - 1/2, and `zigzag` a signed square running -1..1 inside each head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_loading: ContextVar[bool] = ContextVar("loading", default=False)


@contextmanager
def uninitialised() -> Iterator[None]:
    """Models built inside keep what happens to be in memory: their weights are loaded next.

    Orthogonal matrices are slow to draw, too slow to be drawn in vain, and so is what torch's own
    layers draw for themselves.
    """
    token = _loading.set(True)
    try:
        with _NothingDrawn():
            yield
    finally:
        _loading.reset(token)


class _NothingDrawn(TorchFunctionMode):
    """Leaves out the random start of nn.Linear and nn.Conv2d."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (nn.init.kaiming_uniform_, nn.init.uniform_):
            return kwargs["tensor"]
        return func(*args, **kwargs)


@torch.no_grad()
def initialise(blocks: nn.ModuleList, ln_out: nn.LayerNorm) -> None:
    """Set every parameter of a stack; random ones draw from torch's default generator."""
    if _loading.get():
        return
    block: Any
    for layer, block in enumerate(blocks):
        for norm in (m for m in block.modules() if isinstance(m, nn.LayerNorm)):
            nn.init.ones_(norm.weight)
            nn.init.zeros_(norm.bias)
        _time_mix(block.att, layer, len(blocks))
        _channel_mix(block.ffn, layer, len(blocks))
    nn.init.ones_(ln_out.weight)
    nn.init.zeros_(ln_out.bias)


def _channels(dim: int) -> Tensor:
    return torch.arange(dim, dtype=torch.float32)


def _time_mix(att: Any, layer: int, layers: int) -> None:
    heads, size = att.r_k.shape
    dim = heads * size
    n = _channels(dim)
    depth = layer / max(layers - 1, 1)
    rest = 1 - layer / layers
    ramp = n / max(dim - 1, 1) - 0.5
    saw = ((n % size) - (size - 1) / 2) / ((size - 1) / 2)
    zigzag = saw * saw.abs()

    power = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}
    for name, exponent in power.items():
        getattr(att, name).copy_(1 - (n / dim) ** (exponent * rest))
    att.w0.copy_(-5.5 + 6 * (n / max(dim - 1, 1)) ** (1 + depth**0.3) + 2.5 * zigzag)
    att.a0.copy_(-0.19 + 0.3 * zigzag + 0.4 * ramp)
    att.k_k.copy_(0.71 - 0.1 * ramp)
    att.k_a.fill_(1.02)
    att.r_k.fill_(-0.04)
    names = "wag"
    if layer > 0:
        att.v0.copy_(0.73 - 0.4 * ramp)
        names = "wagv"
    for name in names:
        getattr(att, f"{name}1").zero_()
        orthogonal(getattr(att, f"{name}2"), 0.1, tall=True)

    orthogonal(att.receptance.weight, 1.0)
    orthogonal(att.key.weight, 0.1)
    orthogonal(att.value.weight, 1.0)
    att.output.weight.zero_()
    att.ln_x.weight.fill_(((layer + 1) / layers) ** 0.7)
    att.ln_x.bias.zero_()
    _shift(att.shift)
    if att.bidirectional:  # start as the mean of both directions
        att.gate_weight.zero_()
        att.gate_bias.zero_()


def _channel_mix(ffn: Any, layer: int, layers: int) -> None:
    dim = ffn.x_k.shape[-1]
    ffn.x_k.copy_(1 - (_channels(dim) / dim) ** ((1 - layer / layers) ** 4))
    orthogonal(ffn.key.weight, 1.0)
    ffn.value.weight.zero_()
    _shift(ffn.shift)


def _shift(shift: nn.Module) -> None:
    for weight in shift.parameters():  # a ConvShift: nine taps a channel
        nn.init.uniform_(weight, -1 / 3, 1 / 3)


@torch.no_grad()
def orthogonal(weight: Tensor, gain: float, tall: bool = False) -> None:
    """Orthogonal matrix; with `tall`, the gain grows by sqrt(rows/columns) where rows exceed."""
    rows, columns = weight.shape
    if tall and rows > columns:
        gain *= math.sqrt(rows / columns)
    nn.init.orthogonal_(weight, gain=gain)


@torch.no_grad()
def initialise_vocabulary(embedding: Tensor, head: Tensor) -> None:
    """Embedding [V,C] small and uniform, output head [V,C] orthogonal."""
    if _loading.get():
        return
    vocab, dim = head.shape
    nn.init.uniform_(embedding, -1e-4, 1e-4)
    orthogonal(head, 0.5 * math.sqrt(vocab / dim) if vocab > dim else 0.5)
