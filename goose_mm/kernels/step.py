"""One token of every row through a whole language model, its memory changed in place.

Three operators make up a layer: `norm` normalises the residual stream and mixes it with the token
before, a product multiplies it by some matrices, `mix` takes the state one token on. This file says
what they are, in plain PyTorch, which every device runs; `cuda/step.py` has them for NVIDIA GPUs.
The residual stream is float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from goose_mm.kernels.reference import work_dtype
from goose_mm.kernels.wkv7 import RWKV7_LOWEST

# B rows, C channels, H heads, N head size, M mixes, K columns of a matrix

EPS = 1e-5  # of norms over C; per channel of a head, of norms over a head


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(work_dtype(x.dtype))


class Norm(NamedTuple):
    weight: Float[Tensor, " C"]
    bias: Float[Tensor, " C"]


class Gates(NamedTuple):
    """What follows the products of a time mix: `second` factors, biases, vectors per channel.

    `v2` and `v0` are None in the first layer, which defines the value residual.
    """

    w2: Float[Tensor, "C rank_w"]
    a2: Float[Tensor, "C rank_a"]
    v2: Float[Tensor, "C rank_v"] | None
    g2: Float[Tensor, "C rank_g"]
    w0: Float[Tensor, " C"]
    a0: Float[Tensor, " C"]
    v0: Float[Tensor, " C"] | None
    k_k: Float[Tensor, " C"]
    k_a: Float[Tensor, " C"]
    r_k: Float[Tensor, " C"]
    norm: Norm
    a_max: float


class Layer(NamedTuple):
    """The weights of a layer. The mixes stand in the order r, k, v, w, a, g."""

    norm1: Norm
    mu: Float[Tensor, "6 C"]
    rkv: Float[Tensor, "3 C C"]
    first: tuple[Float[Tensor, "_ C"], ...]  # factors of w, a, v, g; no v in the first layer
    gates: Gates
    output: Float[Tensor, "C C"]
    norm2: Norm
    mu_ffn: Float[Tensor, "1 C"]
    key: Float[Tensor, "F C"]
    value: Float[Tensor, "C F"]


class Weights(NamedTuple):
    """A language model, as a step reads it."""

    embedding: Float[Tensor, "V C"]
    norm0: Norm
    layers: tuple[Layer, ...]
    norm: Norm
    head: Float[Tensor, "V C"]
    head_size: int

    @property
    def ranks(self) -> tuple[int, int, int, int]:
        """Of w, a, v and g; a lone layer's v, which it does not have, counts as one of 32."""
        gates = self.layers[-1].gates
        v = 32 if gates.v2 is None else gates.v2.shape[1]
        return gates.w2.shape[1], gates.a2.shape[1], v, gates.g2.shape[1]


def step(
    tokens: Int[Tensor, " B"],
    weights: Weights,
    time_shift: Float[Tensor, "L B C"],
    channel_shift: Float[Tensor, "L B C"],
    wkv: Float[Tensor, "L B H N N"],
) -> Float[Tensor, "B V"]:
    """Logits after one more token of every row; the memory goes on in place."""
    x = normalised(F.embedding(tokens, weights.embedding), weights.norm0)
    added: Tensor | None = None
    v_first: Tensor | None = None
    memory = zip(time_shift, channel_shift, wkv, strict=True)
    for layer, (before, before_ffn, state) in zip(weights.layers, memory, strict=True):
        xr, xk, xv, xw, xa, xg = norm(x, added, layer.norm1, layer.mu, before)
        r, k, v = (F.linear(x, m) for x, m in zip((xr, xk, xv), layer.rkv, strict=True))
        mixed = (xw, xa, xv, xg) if len(layer.first) == 4 else (xw, xa, xg)
        w, a, *v_gate, g = (F.linear(x, m) for x, m in zip(mixed, layer.first, strict=True))
        hidden = [torch.tanh(w), a, *v_gate, torch.sigmoid(g)]
        y, v_first = mix(r, k, v, hidden, layer.gates, v_first, state)
        x += F.linear(y, layer.output)
        (xk,) = norm(x, None, layer.norm2, layer.mu_ffn, before_ffn)
        added = F.linear(torch.relu(F.linear(xk, layer.key)).square(), layer.value)[None]
    (last,) = norm(x, added, weights.norm)
    return F.linear(last, weights.head)


def normalised(x: Float[Tensor, "B C"], norm: Norm) -> Float[Tensor, "B C"]:
    return F.layer_norm(wide(x), x.shape[-1:], wide(norm.weight), wide(norm.bias), EPS)


def norm(
    x: Float[Tensor, "B C"],
    added: Float[Tensor, "parts B C"] | None,
    norm: Norm,
    mu: Float[Tensor, "M C"] | None = None,
    carried: Float[Tensor, "B C"] | None = None,
) -> Float[Tensor, "M B C"]:
    """Add to x, in place; then its norm, mixed M times with the token before, which it replaces.

    Without `mu` the norm alone, [1, B, C]. In the type of the norm's weight.
    """
    if added is not None:
        x += added.sum(0)
    y = normalised(x, norm)
    if mu is None or carried is None:
        return y[None].to(norm.weight.dtype)
    mixed = torch.lerp(y, wide(carried), wide(mu)[:, None])
    carried.copy_(y)
    return mixed.to(mu.dtype)


def mix(
    r: Float[Tensor, "B C"],
    k: Float[Tensor, "B C"],
    v: Float[Tensor, "B C"],
    hidden: Sequence[Float[Tensor, "B _"]],
    gates: Gates,
    v_first: Float[Tensor, "B C"] | None,
    wkv: Float[Tensor, "B H N N"],
) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
    """The heads' gated outputs and the first layer's values; `wkv` goes on in place.

    `hidden` are the first factors of the gates, of w, a, v and g (paper, section 4).
    """
    B, H, N, _ = wkv.shape
    decay, a = wide(F.linear(hidden[0], gates.w2)), wide(F.linear(hidden[1], gates.a2))
    decay = torch.exp(RWKV7_LOWEST * torch.sigmoid(decay + wide(gates.w0)))
    a = torch.sigmoid(a + wide(gates.a0))
    g = wide(F.linear(hidden[-1], gates.g2))
    r, k, v = wide(r), wide(k), wide(v)
    if v_first is None or gates.v2 is None or gates.v0 is None:
        v_first = v
    else:
        toward = torch.sigmoid(wide(F.linear(hidden[2], gates.v2)) + wide(gates.v0))
        v = torch.lerp(v, v_first, toward)

    def heads(x: Tensor) -> Tensor:
        return x.view(B, H, N)

    kappa = F.normalize(heads(k * wide(gates.k_k)), dim=-1, eps=1e-12)
    k = k * (1 + (a - 1) * wide(gates.k_a))
    removed = torch.einsum("bhvk,bhk->bhv", wkv, kappa)
    wkv *= heads(decay)[:, :, None]
    wkv -= removed[..., None] * (kappa * heads(a * gates.a_max))[:, :, None]
    wkv += heads(v)[..., None] * heads(k)[:, :, None]
    y = torch.einsum("bhvk,bhk->bhv", wkv, heads(r))
    y = F.layer_norm(y, (N,), eps=EPS * N).flatten(1)
    y = y * wide(gates.norm.weight) + wide(gates.norm.bias)
    bonus = heads(r * k * wide(gates.r_k)).sum(-1, keepdim=True) * heads(v)
    return ((y + bonus.flatten(1)) * g).to(gates.w2.dtype), v_first
