"""Log-mel frames to patch tokens on a grid of time columns and frequency rows.

Tokens run time-major, frequency fastest, so a column of a live stream is complete as soon as its
frames are. The only position is a learned embedding per frequency row: any length goes in.

With `stem` widths the patches are cut from 3x3 convolutions of stride 2 instead of from the
frames. Over an even number of frames such a convolution looks back one frame and never ahead,
so a clip's tokens depend neither on the batch it is in nor on what follows it.
"""

# B clips, F frames, M mel bins, T tokens = columns * rows, C channels

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from goose_mm.config import AudioConfig, ConfigError


class Patches(NamedTuple):
    """Tokens and what they stand for. `weight` is the share of real frames in each token."""

    tokens: Float[Tensor, "B T C"]
    weight: Float[Tensor, "B T"]
    grid: tuple[int, int]  # (time columns, frequency rows)

    @property
    def mask(self) -> Bool[Tensor, "B T"]:
        """False where the batch is padding and the clip has ended."""
        return self.weight > 0


class PatchEmbed(nn.Module):
    """`patch_time` x `patch_freq` patches to `dim` channels.

    Args:
        config: patch sizes, mel bins and `stem` widths.
        dim: channels of a token.
        silence: feature value of digital silence; it fills the last, partial column of a clip.
    """

    def __init__(self, config: AudioConfig, dim: int, silence: float):
        super().__init__()
        scale = 2 ** len(config.stem)
        self.size = (config.patch_time, config.patch_freq)
        if any(side % scale for side in self.size) or config.num_mel_bins % config.patch_freq:
            raise ConfigError(
                f"audio: patches {self.size[0]}x{self.size[1]} must divide by {scale} (stem has "
                f"{len(config.stem)} stages) and num_mel_bins={config.num_mel_bins} by patch_freq"
            )
        self.silence = silence
        self.cut = (self.size[0] // scale, self.size[1] // scale)
        widths = (1, *config.stem)
        self.stem = nn.ModuleList(Downsample(*pair) for pair in pairwise(widths))
        self.proj = nn.Linear(self.cut[0] * self.cut[1] * widths[-1], dim)
        self.frequency = nn.Parameter(torch.empty(config.num_mel_bins // config.patch_freq, dim))
        nn.init.trunc_normal_(self.frequency, std=0.02)

    def forward(self, features: Float[Tensor, "B F M"], frames: Int[Tensor, " B"]) -> Patches:
        """Patches of normalised features of which the first `frames[b]` belong to clip b."""
        width = self.size[0]
        columns = -(-features.shape[1] // width)
        padded = nn.functional.pad(features, (0, 0, 0, columns * width - features.shape[1]))
        real = torch.arange(columns * width, device=frames.device) < frames[:, None]
        x = torch.where(real[..., None], padded, self.silence)
        x = rearrange(x, "b f m -> b 1 f m").to(self.proj.weight.dtype)
        for stage in self.stem:
            x = stage(x)
        x = rearrange(x, "b c (t p) (f q) -> b t f (c p q)", p=self.cut[0], q=self.cut[1])
        x = self.proj(x) + self.frequency
        share = real.float().unflatten(1, (columns, width)).mean(-1)
        rows = len(self.frequency)
        return Patches(x.flatten(1, 2), repeat(share, "b t -> b (t f)", f=rows), (columns, rows))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, LayerNorm over channels at every position, GELU."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(channels_out)

    def forward(self, x: Float[Tensor, "B C_in F M"]) -> Float[Tensor, "B C_out F2 M2"]:
        x = self.norm(self.conv(x).movedim(1, -1))
        return nn.functional.gelu(x).movedim(-1, 1)
