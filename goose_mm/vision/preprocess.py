"""Pictures in, normalised squares out: what people have on disk becomes what an encoder expects.

A picture is a path, the bytes of a file, a PIL image or a numpy array. Resizing is Pillow's
antialiased one for pictures; the tensor path (`normalise`) does the same on the device, for
training batches. Colour statistics belong to the encoder, so every encoder has its own transform.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from goose_mm.config import EncoderSpec

MAX_PIXELS = 64_000_000  # 192 MB once decoded; read from the header, before decoding
# Pillow would also hand PostScript to an interpreter: only plain picture formats are tried.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I")

Picture = str | Path | bytes | Image.Image | np.ndarray


def load_image(picture: Picture) -> Image.Image:
    """Any picture as upright 8-bit RGB: transparency on white, first frame of an animation.

    Arrays are `[H, W]` or `[H, W, 1 | 3 | 4]`, uint8, uint16 or floats in 0..1.
    FileNotFoundError when the path does not exist; ValueError when it is no picture, a broken
    one, or one of more than `MAX_PIXELS` pixels (refused without decoding it).
    """
    if isinstance(picture, np.ndarray):
        return _to_rgb(_from_array(picture), "the array")
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, "the image")
    if isinstance(picture, bytes):
        return _decode(io.BytesIO(picture), f"the image ({len(picture)} bytes)")
    path = Path(picture)
    if not path.exists():
        raise FileNotFoundError(f"image not found: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not an image but a folder or a device")
    with path.open("rb") as file:
        return _decode(file, str(path))


def _decode(file: io.BytesIO | io.BufferedReader, name: str) -> Image.Image:
    with warnings.catch_warnings():
        # our own limit is below Pillow's, and a broken EXIF block costs only the rotation
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise ValueError(_too_large(name)) from None
        except Image.UnidentifiedImageError:
            known = ", ".join(FORMATS)
            raise ValueError(f"{name} is no image, or damaged (known formats: {known})") from None
        except Exception as error:
            raise ValueError(_damaged(name, error)) from None
        return _to_rgb(image, name)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(f"{name} ({width} x {height})"))
    if width * height == 0:
        raise ValueError(f"{name} has no pixels ({width} x {height})")
    try:
        image.load()
    except Exception as error:  # decoders raise nearly any kind of error on broken files
        raise ValueError(_damaged(name, error)) from None

    image = ImageOps.exif_transpose(image)
    if image.mode in MODES_16_BIT:  # Pillow's own conversion would clip at 255
        image = Image.fromarray(_to_8_bit(np.asarray(image).clip(0, 65535)))
    if image.mode == "F":
        raise ValueError(f"{name} holds 32-bit floats; save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        on_white = Image.new("RGBA", image.size, "white")
        on_white.alpha_composite(image.convert("RGBA"))
        image = on_white
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if (
        not array.size
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and shape[2] not in (1, 3, 4))
    ):
        raise ValueError(f"an image array must be [H, W] or [H, W, 1 | 3 | 4], got {shape}")
    if array.ndim == 3 and shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.uint16:
        array = _to_8_bit(array)
    elif np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError("a float image array must lie in 0..1, without NaN")
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8, uint16 or float, got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _to_8_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _damaged(name: str, error: Exception) -> str:
    return f"{name} cannot be decoded, it is damaged: {error}"


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down first"


def image_digest(image: Image.Image) -> str:
    """sha256 of the pixels of an RGB image: the same for a file, its copy and its decoded form."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


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
