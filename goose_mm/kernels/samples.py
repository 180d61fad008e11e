"""The samples of torch.vmap as one batch: WKV-7 has a batch already, and packed sequences.

Rows of samples follow each other along B. Packed samples, which have one row each, follow each
other along T, and their offsets move with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

BATCH, TOKENS = -4, -3  # axes of inputs [..., B, T, H, N]; that of states is [..., S, H, N, N]


def joined(
    size: int, dims: Sequence[int | None], tensors: Sequence[Tensor | None]
) -> tuple[list[Tensor | None], int]:
    """Six inputs, states and offsets of `size` samples as those of one call.

    Also the axis of the inputs along which samples now follow each other. `dims` says where the
    samples of each tensor lie (None: it is the same for all); later entries are not looked at.
    """
    *inputs, state, cu_seqlens = tensors
    axis = BATCH if cu_seqlens is None else TOKENS
    found: list[Any] = [join(x, dim, size, axis) for x, dim in zip(inputs, dims[:6], strict=True)]
    if cu_seqlens is not None:
        each = cu_seqlens.expand(size, -1) if dims[7] is None else cu_seqlens.movedim(dims[7], 0)
        tokens = found[0].shape[TOKENS] // size
        each = each + torch.arange(size, device=each.device)[:, None] * tokens
        cu_seqlens = torch.cat([each[:, :-1].flatten(), each[-1, -1:]]).to(cu_seqlens.dtype)
    return [*found, join(state, dims[6], size, BATCH), cu_seqlens], axis


def join(x: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """`size` samples along `dim` (None: all the same), one after the other along `axis`."""
    if x is None:
        return None
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis - 1).flatten(axis - 1, axis)


def part(x: Tensor, size: int, axis: int) -> Tensor:
    """The samples of `join`, along the first axis."""
    return x.unflatten(axis, (size, -1)).movedim(axis - 1, 0)
