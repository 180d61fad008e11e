"""RWKV-7 time mixing: the generalised delta rule between its projections (paper, section 4).

Parameter names are those of the official checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from goose_mm.backbone.token_shift import ConvShift, Stream, TokenShift
from goose_mm.config import BackboneConfig
from goose_mm.kernels import RWKV7_LOWEST, choose, wkv7

NORM_EPS = 1e-5  # per channel of a head: 64e-5 for heads of 64


def upcast(x: Tensor) -> Tensor:
    """At least fp32: for norms and decays, whose rounding would accumulate."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class TimeMix(nn.Module):
    """Attention's place in the block: six shifted inputs, four low-rank gates, one scan."""

    x_r: nn.Parameter
    x_w: nn.Parameter
    x_k: nn.Parameter
    x_v: nn.Parameter
    x_a: nn.Parameter
    x_g: nn.Parameter
    w0: nn.Parameter
    w1: nn.Parameter
    w2: nn.Parameter
    a0: nn.Parameter
    a1: nn.Parameter
    v1: nn.Parameter
    g1: nn.Parameter
    g2: nn.Parameter
    k_k: nn.Parameter
    k_a: nn.Parameter

    def __init__(self, config: BackboneConfig, layer: int) -> None:
        super().__init__()
        dim, heads, size = config.dim, config.num_heads, config.head_size
        self.heads, self.bidirectional, self.a_max = heads, config.bidirectional, config.a_max
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a"):
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, dim)))
        ranks = {"w": config.decay_rank, "a": config.a_rank, "g": config.gate_rank}
        if layer > 0:  # layer 0 defines the value residual, the others mix towards it
            self.v0 = nn.Parameter(torch.empty(1, 1, dim))
            ranks["v"] = config.v_rank
        for name, rank in ranks.items():
            self.register_parameter(f"{name}1", nn.Parameter(torch.empty(dim, rank)))
            self.register_parameter(f"{name}2", nn.Parameter(torch.empty(rank, dim)))
        self.r_k = nn.Parameter(torch.empty(heads, size))
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.ln_x = nn.GroupNorm(heads, dim, eps=NORM_EPS * size)
        self.shift = ConvShift(dim) if config.shift == "conv" else TokenShift()
        if self.bidirectional:
            self.gate_weight = nn.Parameter(torch.empty(heads, size))
            self.gate_bias = nn.Parameter(torch.empty(heads))

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        v_first: Float[Tensor, "B T H N"] | None,
        carried: Float[Tensor, "S C"],
        wkv: Float[Tensor, "S H N N"] | None,
        stream: Stream,
        kernel: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (output, layer 0's values, token to carry, wkv state)."""

        def per_head(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1))

        shifted, carried = self.shift(x, carried, stream)
        delta = shifted - x
        mu = torch.stack((self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g))
        x_r, x_w, x_k, x_v, x_a, x_g = (x + delta * mu).unbind()

        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        decay = upcast(self.w0) + torch.tanh(x_w @ self.w1) @ self.w2
        log_w = RWKV7_LOWEST * torch.sigmoid(decay)
        a = torch.sigmoid(self.a0 + (x_a @ self.a1) @ self.a2)
        g = torch.sigmoid(x_g @ self.g1) @ self.g2
        if v_first is None:
            v_first = v = per_head(v)
        else:
            mix = torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
            v = per_head(v)
            v = v + (v_first - v) * per_head(mix)
        kappa = F.normalize(upcast(per_head(k * self.k_k)), dim=-1, eps=1e-12)
        k = per_head(k * (1 + (a - 1) * self.k_a))
        if self.a_max != 1:  # of the removal alone: the factor c of the paper's state tracking
            a = a * self.a_max
        r, log_w, a = per_head(r), per_head(log_w), per_head(a)
        if stream.mask is not None:  # padding: keep the state as it is
            padding = ~stream.mask[..., None, None]
            log_w, k, v, a = (t.masked_fill(padding, 0) for t in (log_w, k, v, a))

        direction = "both" if self.bidirectional else "forward"
        k, v, kappa, a = (t.to(r.dtype) for t in (k, v, kappa, a))
        kernel = choose(kernel, r.device, r.dtype, r.shape[-1])  # here: log_w need not be looked at
        y, wkv = wkv7(
            r, log_w, k, v, kappa, a, wkv,
            cu_seqlens=stream.cu_seqlens, direction=direction, kernel=kernel,
        )  # fmt: skip
        if self.bidirectional:
            toward = (per_head(delta) * self.gate_weight).sum(-1) + self.gate_bias
            mix = torch.sigmoid(toward)[..., None]
            y = mix * y[0] + (1 - mix) * y[1]
        y = F.layer_norm(upcast(y), y.shape[-1:], eps=self.ln_x.eps)  # ln_x, one group a head
        y = y * per_head(upcast(self.ln_x.weight)) + per_head(upcast(self.ln_x.bias))
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v
        y = (y + bonus).flatten(2).to(g.dtype)
        return self.output(y * g), v_first, carried, wkv
