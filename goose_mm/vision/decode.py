"""What people have becomes an upright picture of 8 bits; what is no picture is called by its name.

A picture is a path, the bytes of a file, a `data:` address, a PIL image or a numpy array. Nothing
here needs torch, so that a bad file is named before anything slow begins.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import warnings
from pathlib import Path
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps

from goose_mm.vision.recognise import HEAD, is_heif, what_it_is

MAX_PIXELS = 64_000_000  # 192 MB once decoded; read from the header, before decoding
# Pillow would also hand PostScript to an interpreter: only plain picture formats are tried.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "ICO")
MODES_16_BIT = ("I;16", "I;16L", "I;16B", "I")

Picture = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


def load_image(picture: Picture) -> Image.Image:
    """Any picture as upright 8-bit RGB: transparency on white, first frame of an animation.

    Arrays are `[H, W]` or `[H, W, 1 | 3 | 4]`, uint8, uint16 or floats in 0..1. Greys of 16 or 32
    bits are scaled, unless none exceeds 255: then they are 8-bit ones in a wider type.
    FileNotFoundError when the path does not exist; ValueError when it is no picture, a broken
    one, or one of more than `MAX_PIXELS` pixels (refused without decoding it).
    """
    if isinstance(picture, np.ndarray):
        return _to_rgb(_from_array(picture), "the array")
    if isinstance(picture, Image.Image):
        return _to_rgb(picture, "the image")
    if isinstance(picture, bytes):
        return _decode(io.BytesIO(picture), f"the image ({len(picture)} bytes)")
    if not isinstance(picture, (str, os.PathLike)):
        raise ValueError(
            "a picture is a path, bytes, a PIL image or a numpy array [H, W, 3], not "
            f"{type(picture).__name__}; a tensor [B, 3, H, W] is for ask_batch"
        )
    path = Path(picture)
    if str(picture).startswith("data:"):
        return _decode(io.BytesIO(_from_address(str(picture))), "the picture in a data: address")
    name = str(path)[-150:]  # whole pictures written as text are given for names, too
    if not os.path.exists(path):
        raise FileNotFoundError(f"image not found: {name}")
    if path.is_fifo():  # cannot be rewound
        return _decode(io.BytesIO(path.read_bytes()), name)
    if not path.is_file():
        raise ValueError(f"{name} is not an image but a folder or a device")
    with path.open("rb") as file:
        return _decode(file, name)


def _from_address(address: str) -> bytes:
    """What stands in a `data:` address (RFC 2397) itself."""
    about, _, data = address.partition(",")
    raw = unquote_to_bytes(data)
    if not about.endswith(";base64"):
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except ValueError as error:
        raise ValueError(f"the data: address of {len(address)} characters: {error}") from None


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
            image = _open_heif(file, name)
        except Exception as error:
            raise ValueError(_damaged(name, error)) from None
        return _to_rgb(image, name)


def _open_heif(file: io.BytesIO | io.BufferedReader, name: str) -> Image.Image:
    """What Pillow alone does not read. ValueError unless it is HEIC, and pillow-heif is there."""
    file.seek(0)
    head = file.read(HEAD)
    if not is_heif(head):
        unknown = f"no image, or damaged (known formats: {', '.join(FORMATS)}, HEIC)"
        what = what_it_is(head)
        raise ValueError(f"{name} is " + (f"no image but {what}" if what else unknown)) from None
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        cure = "pip install 'goose-mm[heif]' (or pip install pillow-heif)"
        raise ValueError(f"{name} is HEIC, which needs pillow-heif: {cure}") from None
    file.seek(0)
    try:
        return HeifImageFile(file)
    except Exception as error:
        raise ValueError(_damaged(name, error)) from None


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
    """Shades of 16 bits as 8; or of 8, if a wider type holds them."""
    if values.max() <= 255:
        return values.astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _damaged(name: str, error: Exception) -> str:
    said = " ".join(str(error).split())[:100]
    return f"{name} cannot be decoded, it is damaged: {said}"


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_PIXELS // 10**6} million pixels; scale it down first"


def image_digest(image: Image.Image) -> str:
    """sha256 of the pixels of an RGB image: the same for a file, its copy and its decoded form."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
