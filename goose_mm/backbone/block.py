"""One RWKV-7 layer: time mixing and channel mixing on a residual stream, pre-norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from goose_mm.backbone.channel_mix import ChannelMix
from goose_mm.backbone.time_mix import TimeMix
from goose_mm.backbone.token_shift import Stream
from goose_mm.config import BackboneConfig


class Block(nn.Module):
    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        if layer == 0:
            self.ln0 = nn.LayerNorm(config.dim)  # normalises whatever enters the stack
        self.ln1 = nn.LayerNorm(config.dim)
        self.ln2 = nn.LayerNorm(config.dim)
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self,
        x: Tensor,
        v_first: Tensor | None,
        state: tuple[Tensor, Tensor, Tensor | None],
        stream: Stream,
        kernel: str,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return (x [B,T,C], layer 0's values, this layer's new state)."""
        time_shift, channel_shift, wkv = state
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        mixed, v_first, time_shift, wkv = self.att(
            self.ln1(x), v_first, time_shift, wkv, stream, kernel
        )
        x = x + F.dropout(mixed, self.dropout, self.training)
        mixed, channel_shift = self.ffn(self.ln2(x), channel_shift, stream)
        x = x + F.dropout(mixed, self.dropout, self.training)
        return x, v_first, (time_shift, channel_shift, wkv)
