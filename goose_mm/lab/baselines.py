"""Two baselines of the same width, depth and feed-forward network as the RWKV-7 stack.

A causal transformer, and a recurrence whose state is a vector with gates for each channel (as
HGRN, arXiv:2311.04823, or RG-LRU, arXiv:2402.19427). Both keep the channel mixing of RWKV-7 with
its token shift, so all that differs is how tokens far apart meet.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from goose_mm.backbone import RWKV7
from goose_mm.backbone.channel_mix import ChannelMix
from goose_mm.backbone.init import initialise_vocabulary
from goose_mm.backbone.token_shift import Stream
from goose_mm.config import BackboneConfig

# B batch, T tokens, C channels, H heads, N head size, V vocabulary

Mixer = Literal["rwkv7", "transformer", "diagonal"]


def rotate(x: Float[Tensor, "B H T N"]) -> Float[Tensor, "B H T N"]:
    """Rotary position: channel pairs turn with the position, at wavelengths of 2 pi to 10^4."""
    length, half = x.shape[-2], x.shape[-1] // 2
    pace = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(length, device=x.device)[:, None] * pace
    left, right = x.float().chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal softmax attention with rotary positions."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.inputs = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        qkv = self.inputs(x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        return self.output(y.transpose(1, 2).flatten(2))


def diagonal_scan(
    gate: Float[Tensor, "B T C"], x: Float[Tensor, "B T C"]
) -> Float[Tensor, "B T C"]:
    """h[t] = gate[t] * h[t-1] + x[t] from h = 0, in O(log T) steps: each doubles the reach."""
    reach = 1
    while reach < x.shape[1]:
        later = x[:, reach:] + gate[:, reach:] * x[:, :-reach]
        x = torch.cat([x[:, :reach], later], dim=1)
        gate = torch.cat([gate[:, :reach], gate[:, reach:] * gate[:, :-reach]], dim=1)
        reach *= 2
    return x


class DiagonalRNN(nn.Module):
    """Gated linear recurrence, channel by channel.

    The gates lie in (1 - a_max, 1), the range that `a_max` gives to the eigenvalues of RWKV-7
    as well: a_max 2 lets a channel change its sign, without which parity cannot be told.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.a_max = config.a_max
        self.inputs = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.bias = nn.Parameter(torch.linspace(-6, 0, config.dim))  # from long memory to short
        self.norm = nn.LayerNorm(config.dim)
        self.output = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        forget, value, out = self.inputs(x).chunk(3, dim=-1)
        gate = 1 - self.a_max * torch.sigmoid(forget.float() + self.bias)
        h = diagonal_scan(gate, (1 - gate * gate) * value.float())
        return self.output(self.norm(h).to(out.dtype) * F.silu(out))


class Block(nn.Module):
    def __init__(self, config: BackboneConfig, mixer: Attention | DiagonalRNN) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.att, self.ffn = mixer, ChannelMix(config)
        nn.init.constant_(self.ffn.x_k, 0.5)
        for last in (self.att.output, self.ffn.value):  # branches begin silent, as in RWKV-7
            nn.init.zeros_(last.weight)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        x = x + self.att(self.ln1(x))
        start = torch.zeros_like(x[:, 0])
        return x + self.ffn(self.ln2(x), start, Stream())[0]


class Stack(nn.Module):
    """Blocks between norms, as in `RWKV7`; there is no state to carry on."""

    def __init__(self, config: BackboneConfig, mixer: type[Attention] | type[DiagonalRNN]) -> None:
        super().__init__()
        layers = range(config.num_layers)
        self.ln0, self.ln_out = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(Block(config, mixer(config)) for _ in layers)

    def forward(self, x: Float[Tensor, "B T C"]) -> tuple[Float[Tensor, "B T C"], None]:
        x = self.ln0(x)
        for block in self.blocks:
            x = block(x)
        return self.ln_out(x), None


class SequenceModel(nn.Module):
    """Embedding, a stack with the mixer of this name, head: an answer at every token."""

    def __init__(self, mixer: Mixer, config: BackboneConfig, vocab_size: int) -> None:
        super().__init__()
        config = config.resolved()
        self.emb = nn.Embedding(vocab_size, config.dim)
        if mixer == "rwkv7":
            self.backbone = RWKV7(config)
        else:
            self.backbone = Stack(config, Attention if mixer == "transformer" else DiagonalRNN)
        self.head = nn.Linear(config.dim, vocab_size, bias=False)
        initialise_vocabulary(self.emb.weight, self.head.weight)

    def forward(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        return self.head(self.backbone(self.emb(ids))[0])

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the targets that are due, and the share of right answers."""
        logits, targets = self(batch["ids"]).float(), batch["targets"]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        right = (logits.argmax(-1) == targets).sum() / (targets >= 0).sum()
        return loss, {"loss": loss.detach(), "accuracy": right}
