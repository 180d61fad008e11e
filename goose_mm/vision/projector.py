"""From a grid of encoder patches to tokens of the language model's width, row by row.

The table `PROJECTORS` holds the choices of `vision.projector`; each maps a grid [B, h, w, d] to
tokens [B, h*w, C], left to right and top to bottom.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from goose_mm.backbone import RWKV7
from goose_mm.config import BackboneConfig, ConfigError, VisionConfig

# B pictures, h x w patches, d their channels, P = h * w tokens, C channels of the language model


def linear(d_in: int, dim: int) -> nn.Module:
    """One matrix without bias: the smallest choice (VisualRWKV's `linear`)."""
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(d_in, dim, bias=False))


def mlp(d_in: int, dim: int) -> nn.Module:
    """Two layers with a GELU between (LLaVA-1.5's mlp2x_gelu)."""
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(d_in, dim), nn.GELU(), nn.Linear(dim, dim))


class ContextGating(nn.Module):
    """Features gate themselves before the projection (VisualRWKV-7 v7.00, its parameter names)."""

    def __init__(self, d_in: int, dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_in, d_in, bias=False)
        self.o_proj = nn.Linear(d_in, dim, bias=False)
        self.ln_v = nn.LayerNorm(dim)

    def forward(self, grid: Float[Tensor, "B h w d"]) -> Float[Tensor, "B P C"]:
        patches = grid.flatten(1, 2)
        return self.ln_v(self.o_proj(patches * torch.sigmoid(self.gate(patches))))


class GridMixer(nn.Module):
    """Patches exchange what they see before they are read in a line.

    A projection, a learned embedding for every row and column, then bidirectional RWKV-7 blocks
    whose token shift is a 3x3 filter over the grid; the stack's last norm ends it. Another grid
    than the one built for gets its row and column embeddings by interpolation.
    """

    def __init__(
        self, d_in: int, config: BackboneConfig, grid: tuple[int, int], feature_dropout: float
    ) -> None:
        super().__init__()
        dim = config.dim
        self.feature_dropout = feature_dropout
        self.proj = nn.Linear(d_in, dim)
        self.rows = nn.Parameter(0.02 * torch.randn(grid[0], dim))
        self.columns = nn.Parameter(0.02 * torch.randn(grid[1], dim))
        self.mixer = RWKV7(config)

    def forward(self, grid: Float[Tensor, "B h w d"]) -> Float[Tensor, "B P C"]:
        height, width = grid.shape[1:3]
        # A channel is kept or dropped in the whole picture: a thing must be known by many of them.
        kept = F.dropout(torch.ones_like(grid[:, :1, :1]), self.feature_dropout, self.training)
        grid = grid * kept
        place = resampled(self.rows, height)[:, None] + resampled(self.columns, width)
        tokens = (self.proj(grid) + place).flatten(1, 2)
        return self.mixer(tokens, grid=(height, width))[0]


def resampled(table: Float[Tensor, "n C"], count: int) -> Float[Tensor, "count C"]:
    """A table of position embeddings, interpolated linearly to another number of positions."""
    if len(table) == count:
        return table
    return F.interpolate(table.T[None], count, mode="linear", align_corners=False)[0].T


PROJECTORS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": linear,
    "mlp": mlp,
    "context_gating": ContextGating,
}


def build_projector(
    vision: VisionConfig, backbone: BackboneConfig, d_in: int, grid: tuple[int, int]
) -> nn.Module:
    """The projector a configuration names, for patches of `d_in` channels on `grid`.

    ConfigError when `mixer_layers` and the kind of projector do not belong together.
    """
    if vision.projector != "grid_mixer":
        if vision.mixer_layers:
            raise ConfigError(
                f"vision.mixer_layers={vision.mixer_layers} belongs to projector grid_mixer, "
                f"not to {vision.projector}"
            )
        return PROJECTORS[vision.projector](d_in, backbone.dim)
    if vision.mixer_layers < 1:
        raise ConfigError("projector grid_mixer needs vision.mixer_layers of at least 1")
    mixer = BackboneConfig(
        dim=backbone.dim,
        num_layers=vision.mixer_layers,
        head_size=backbone.head_size,
        bidirectional=True,
        shift="conv",
        dropout=backbone.dropout,
    )
    return GridMixer(d_in, mixer, grid, vision.feature_dropout)
