"""Pictures: decoding, preprocessing, frozen encoders, projectors, and VisualRWKV7."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from goose_mm.vision.decode import load_image as load_image
    from goose_mm.vision.model import VisualRWKV7 as VisualRWKV7
    from goose_mm.vision.model import prompt_text as prompt_text
    from goose_mm.vision.prefix import Prefix as Prefix
    from goose_mm.vision.prefix import PrefixCache as PrefixCache

_HOME = {  # imported when asked for: a picture can be decoded without torch
    "Prefix": "prefix",
    "PrefixCache": "prefix",
    "VisualRWKV7": "model",
    "load_image": "decode",
    "prompt_text": "model",
}
__all__ = ["Prefix", "PrefixCache", "VisualRWKV7", "load_image", "prompt_text"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
