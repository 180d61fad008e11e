"""EfficientNet-Lite0, layer for layer timm's `tf_efficientnet_lite0`, with the same names.

It is the encoder of the shipped vision model. timm cannot be imported in part: with all of its
models and with torchvision it takes twice as long as torch itself.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# B pictures, of S x S pixels; d channels of a map of h x w cells

STAGES = (  # repeats, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
LAST = (0, 1, 2, 4, 6)  # the last stage of each stride


class StridedConv(nn.Conv2d):
    """Padded as TensorFlow does: ceil(n / stride) cells, an odd one more at the far edge."""

    def forward(self, input: Float[Tensor, "B d h w"]) -> Float[Tensor, "B e i j"]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = input.shape[2:]
        down = max((-(-rows // stride) - 1) * stride + kernel - rows, 0)
        across = max((-(-columns // stride) - 1) * stride + kernel - columns, 0)
        edges = (across // 2, across - across // 2, down // 2, down - down // 2)
        return super().forward(F.pad(input, edges))


def conv(width: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(width, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return StridedConv(width, out, kernel, stride, groups=groups, bias=False)


def norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class Separable(nn.Module):
    """A filter on each channel, then a mix of channels."""

    def __init__(self, width: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv_dw, self.bn1 = conv(width, width, kernel, stride, width), norm(width)
        self.conv_pw, self.bn2 = conv(width, out, 1), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv_pw(F.relu6(self.bn1(self.conv_dw(x)))))


class Inverted(nn.Module):
    """The same in a wider space; added to what came in where that has the same shape."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = expansion * width
        self.skips = width == out and stride == 1
        self.conv_pw, self.bn1 = conv(width, wide, 1), norm(wide)
        self.conv_dw, self.bn2 = conv(wide, wide, kernel, stride, wide), norm(wide)
        self.conv_pwl, self.bn3 = conv(wide, out, 1), norm(out)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.bn1(self.conv_pw(x)))
        y = F.relu6(self.bn2(self.conv_dw(y)))
        y = self.bn3(self.conv_pwl(y))
        return y + x if self.skips else y


class EfficientNetLite0(nn.Module):
    """Pictures to six maps: one of each of the strides 2, 4, 8, 16, 32, with 16, 24, 40, 112 and
    320 channels, and the last with 1280. `classifier` is there for the sake of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn1 = conv(3, 32, 3, 2), norm(32)
        self.blocks, width = nn.Sequential(), 32
        for repeats, kernel, stride, expansion, out in STAGES:
            stage = nn.Sequential()
            for step in (stride, *[1] * (repeats - 1)):
                stage.append(
                    Inverted(width, out, kernel, step, expansion)
                    if expansion > 1
                    else Separable(width, out, kernel, step)
                )
                width = out
            self.blocks.append(stage)
        self.conv_head, self.bn2 = conv(width, 1280, 1), norm(1280)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, pictures: Float[Tensor, "B 3 S S"]) -> list[Float[Tensor, "B _ _ _"]]:
        x, maps = F.relu6(self.bn1(self.conv_stem(pictures))), []
        for stage in self.blocks:
            x = stage(x)
            maps.append(x)
        return [*(maps[i] for i in LAST), F.relu6(self.bn2(self.conv_head(x)))]
