"""Pictures: preprocessing, frozen encoders, projectors, and VisualRWKV7."""

from goose_mm.vision.model import VisualRWKV7, prompt_text
from goose_mm.vision.prefix import Prefix, PrefixCache
from goose_mm.vision.preprocess import load_image

__all__ = ["Prefix", "PrefixCache", "VisualRWKV7", "load_image", "prompt_text"]
