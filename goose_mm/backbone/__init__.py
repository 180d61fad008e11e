"""The RWKV-7 stack: blocks, state, initialisation."""

from goose_mm.backbone.model import RWKV7
from goose_mm.backbone.state import State

__all__ = ["RWKV7", "State"]
