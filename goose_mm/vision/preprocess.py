"""Pictures in, normalised squares out: what people have becomes what an encoder expects.

Resizing is Pillow's antialiased one for pictures; the tensor path (`normalise`) does the same on
the device, for training batches. Colour statistics belong to the encoder, so every encoder has its
own transform.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from goose_mm.config import EncoderSpec
from goose_mm.vision.decode import Picture, load_image


def as_pictures(images: Tensor) -> UInt8[Tensor, "B 3 H W"]:
    """A batch of pictures: uint8 [B, 3, H, W], or floats in 0..1, which are rounded to 8 bits.

    ValueError for anything else, as other layouts, other integers, and what is normalised already.
    """
    shape = list(images.shape)
    if images.ndim != 4 or shape[1] != 3 or 0 in shape:
        cure = "; permute(0, 3, 1, 2) moves the channels there" if shape[-1:] == [3] else ""
        raise ValueError(f"a batch of pictures is [B, 3, H, W], got {shape}{cure}")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(
            f"a batch of pictures is uint8, or floats in 0..1, got {images.dtype}; "
            "if its values are 0..255, use .to(torch.uint8)"
        )
    low, high = (x.item() for x in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"a float batch of pictures lies in 0..1, this one in {low:.4g}..{high:.4g}; divide by "
            "255, or give what preprocess() makes as the list that it is"
        )
    return (images.float() * 255).round().to(torch.uint8)


def to_square(image: Image.Image, spec: EncoderSpec) -> Image.Image:
    """RGB at the encoder's size: `squash` distorts, `crop` cuts the sides, `letterbox` adds
    bars in the encoder's mean colour (the strategies of prismatic-vlms)."""
    size = spec.image_size
    resample = Image.Resampling[spec.interpolation.upper()]
    width, height = image.size
    if spec.resize == "squash":
        return image.resize((size, size), resample)
    if spec.resize == "crop":
        short = min(width, height)
        scaled = (int(size * width / short), int(size * height / short))
        # the part of the picture that the middle of the scaled one shows
        left, top = (round((side - size) / 2) for side in scaled)
        x, y = width / scaled[0], height / scaled[1]
        box = (left * x, top * y, (left + size) * x, (top + size) * y)
        return image.resize((size, size), resample, box)
    long = max(width, height)
    scaled = (max(1, round(size * width / long)), max(1, round(size * height / long)))
    canvas = Image.new("RGB", (size, size), tuple(round(255 * m) for m in spec.mean))
    corner = ((size - scaled[0]) // 2, (size - scaled[1]) // 2)
    canvas.paste(image.resize(scaled, resample), corner)
    return canvas


def transform(pictures: Sequence[Picture], spec: EncoderSpec) -> Float[Tensor, "B 3 S S"]:
    """Load, resize and normalise pictures for one encoder. Raises what `load_image` raises."""
    squares = [np.array(to_square(load_image(picture), spec)) for picture in pictures]
    return normalise(torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2), spec)


def normalise(images: UInt8[Tensor, "B 3 H W"], spec: EncoderSpec) -> Float[Tensor, "B 3 S S"]:
    """(x / 255 - mean) / std on the tensor's device, resized first when it has another size.

    ValueError for a picture that is not square when the encoder does not squash: `transform`
    knows how to crop and letterbox.
    """
    height, width = images.shape[-2:]
    size = spec.image_size
    if height != width and spec.resize != "squash":
        raise ValueError(
            f"{spec.resize} needs square tensors, got {height} x {width}; use transform()"
        )
    pixels = images.float()
    if (height, width) != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode=spec.interpolation, antialias=True)
        pixels = pixels.round().clamp(0, 255)  # as a decoder stores them
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    return (pixels / 255 - mean) / std
