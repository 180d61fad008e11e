"""The text model: tokenizers, RWKV7LM, generation."""

from goose_mm.text.generate import Sampling
from goose_mm.text.model import RWKV7LM
from goose_mm.text.tokenizer import BPETokenizer, PileTokenizer, WorldTokenizer

__all__ = ["RWKV7LM", "BPETokenizer", "PileTokenizer", "Sampling", "WorldTokenizer"]
