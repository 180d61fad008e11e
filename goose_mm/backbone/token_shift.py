"""What a token sees of its neighbours before it mixes: the previous token, or a 3x3 patch.

`Stream` is worked out once per forward pass and says where tokens stand: which are padding,
where packed sequences begin, what grid they tile. The layers only follow it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Stream(NamedTuple):
    """Positions of one batch. `previous` and `last` index into [carried tokens; tokens]."""

    mask: Bool[Tensor, "B T"] | None = None  # False: padding, invisible to every layer
    cu_seqlens: Int[Tensor, "S_plus_1"] | None = None
    grid: tuple[int, int] | None = None  # rows, columns; columns run fastest
    previous: Int[Tensor, "B T"] | None = None  # None: simply the left neighbour
    last: Int[Tensor, "B S"] | None = None  # last real token of every sequence

    @classmethod
    def of(
        cls,
        tokens: Float[Tensor, "B T C"],
        mask: Bool[Tensor, "B T"] | None = None,
        cu_seqlens: Int[Tensor, "S_plus_1"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Stream:
        """Check the layout of a batch and index every token's predecessor."""
        batch, length, _ = tokens.shape
        if grid is not None and grid[0] * grid[1] != length:
            raise ValueError(f"grid {grid[0]} x {grid[1]} does not tile {length} tokens")
        if mask is not None and cu_seqlens is not None:
            raise ValueError("give either mask (padded batch) or cu_seqlens (packed), not both")
        if mask is not None:
            place = torch.arange(1, length + 1, device=tokens.device)
            seen = torch.cummax(torch.where(mask, place, 0), dim=1).values
            previous = torch.where(place == 1, 0, seen.roll(1, 1))
            return cls(mask, None, grid, previous, seen[:, -1:])
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"packed sequences need batch 1, got {batch}")
            count = cu_seqlens.shape[0] - 1
            bounds = cu_seqlens.long()
            token = torch.arange(length, device=tokens.device)
            owner = torch.searchsorted(bounds, token, right=True) - 1
            previous = torch.where(token == bounds[owner], owner, count + token - 1)
            sequence = torch.arange(count, device=tokens.device)
            last = torch.where(bounds[1:] > bounds[:-1], count + bounds[1:] - 1, sequence)
            return cls(None, cu_seqlens, grid, previous[None], last[None])
        return cls(grid=grid)


class TokenShift(nn.Module):
    """The predecessor of every token; before the first one, the token carried by the state."""

    def forward(
        self, x: Float[Tensor, "B T C"], carried: Float[Tensor, "S C"], stream: Stream
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "S C"]]:
        """Return the shifted tokens and the token to carry on, one per sequence."""
        batch, _, dim = x.shape
        memory = torch.cat([carried.to(x.dtype).view(batch, -1, dim), x], dim=1)
        if stream.previous is None or stream.last is None:
            return memory[:, :-1], memory[:, -1]
        index = stream.previous[..., None].expand(-1, -1, dim)
        last = stream.last[..., None].expand(-1, -1, dim)
        return memory.gather(1, index), memory.gather(1, last).view(-1, dim)


class ConvShift(nn.Module):
    """A depthwise 3x3 filter over the grid (AudioRWKV's ConvShift): looks both ways, no memory."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, 3, 3))

    def forward(
        self, x: Float[Tensor, "B T C"], carried: Float[Tensor, "S C"], stream: Stream
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "S C"]]:
        if stream.grid is None:
            raise ValueError('shift="conv" needs grid=(rows, columns) of the tokens')
        if stream.mask is not None:
            x = x.masked_fill(~stream.mask[..., None], 0)
        picture = x.transpose(1, 2).unflatten(2, stream.grid)
        filtered = F.conv2d(picture, self.weight, padding=1, groups=x.shape[-1])
        return filtered.flatten(2).transpose(1, 2), carried
