"""WKV-7 as its definition: a loop over time, and what direction and packing mean on top of it.

Every other kernel is held against this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences), D directions

Size = int | torch.SymInt  # the latter where a tracer leaves T or S open


def reference(
    r: Float[Tensor, "B T H N"],
    log_w: Float[Tensor, "B T H N"],
    k: Float[Tensor, "B T H N"],
    v: Float[Tensor, "B T H N"],
    kappa: Float[Tensor, "B T H N"],
    a: Float[Tensor, "B T H N"],
    state: Float[Tensor, "B H N N"] | None = None,
) -> tuple[Float[Tensor, "B T H N"], Float[Tensor, "B H N N"]]:
    """`S <- S diag(exp(log_w)) - (S kappa)(kappa * a)^T + v k^T`, then `y = S r`.

    Works in the dtype of its inputs and is differentiable any number of times. `S` has value rows
    and key columns (RWKV-7 "Goose", arXiv:2503.14456, section 4).
    """
    S = torch.zeros_like(r[:, 0]).diag_embed() if state is None else state
    w, erased = log_w.exp(), kappa * a
    y = []
    for t in range(r.shape[1]):
        found = S @ kappa[:, t, ..., None]  # what the state holds under kappa
        written = v[:, t, ..., None] * k[:, t, :, None]
        S = S * w[:, t, :, None] - found * erased[:, t, :, None] + written
        y.append((S @ r[:, t, ..., None]).squeeze(-1))
    return torch.stack(y, 1), S


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """What every kernel keeps states and sums in, for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def saved_states(tokens: int | torch.SymInt, apart: int, save: bool) -> int | torch.SymInt:
    """How many states a kernel saves that needs one after each `apart` tokens but the last.

    Two more than that: of a dimension that may be 0 or 1, torch.export makes a case of its own.
    """
    return (tokens - 1) // apart + 2 if save else 0


def by_definition(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    offsets: Sequence[int] | None,
    reverse: Sequence[bool],
) -> tuple[Float[Tensor, "D B T H N"], Float[Tensor, "D S H N N"]]:
    """The whole operator: packed sequences are scanned one by one, backward is forward flipped.

    One direction per entry of `reverse`; sequence i is `offsets[i]:offsets[i + 1]` along T.
    """
    _, T, H, N = inputs[0].shape
    dtype = work_dtype(inputs[0].dtype)
    pieces = [(slice(None), 0, T)]
    if offsets is not None:
        pieces = [(slice(i, i + 1), *bounds) for i, bounds in enumerate(pairwise(offsets))]
    ys, states = [], []
    for d, backwards in enumerate(reverse):
        for sequences, start, stop in pieces:
            last = None if state is None else state[d, sequences].to(dtype)
            if start < stop:
                piece = [x[:, start:stop].to(dtype) for x in inputs]
                piece = [x.flip(1) for x in piece] if backwards else piece
                y, last = reference(*piece, state=last)
                ys.append(y.flip(1) if backwards else y)
            states.append(inputs[0].new_zeros(1, H, N, N, dtype=dtype) if last is None else last)
    y = torch.cat(ys, 1).unflatten(1, (len(reverse), T)).transpose(0, 1)
    return y.to(inputs[0].dtype), torch.cat(states).unflatten(0, (len(reverse), -1))
