"""RWKV-7 channel mixing: a two-layer squared-ReLU network on shifted tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from goose_mm.backbone.token_shift import ConvShift, Stream, TokenShift
from goose_mm.config import BackboneConfig


class ChannelMix(nn.Module):
    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.dim))
        self.key = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.value = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.shift = ConvShift(config.dim) if config.shift == "conv" else TokenShift()

    def forward(
        self, x: Float[Tensor, "B T C"], carried: Float[Tensor, "S C"], stream: Stream
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "S C"]]:
        """Return the output and the token to carry on."""
        shifted, carried = self.shift(x, carried, stream)
        hidden = torch.relu(self.key(x + (shifted - x) * self.x_k))
        return self.value(hidden * hidden), carried
