"""goose_mm: RWKV-7 "Goose" for text, pictures and sound. Importing it imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from goose_mm.audio.model import AudioRWKV7 as AudioRWKV7
    from goose_mm.hub import load as load
    from goose_mm.kernels import wkv7 as wkv7
    from goose_mm.text.model import RWKV7LM as RWKV7LM
    from goose_mm.vision.model import VisualRWKV7 as VisualRWKV7

_HOME = {
    "AudioRWKV7": "goose_mm.audio.model",
    "RWKV7LM": "goose_mm.text.model",
    "VisualRWKV7": "goose_mm.vision.model",
    "load": "goose_mm.hub",
    "wkv7": "goose_mm.kernels",
}
__all__ = ["RWKV7LM", "AudioRWKV7", "VisualRWKV7", "__version__", "load", "wkv7"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'goose_mm' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
