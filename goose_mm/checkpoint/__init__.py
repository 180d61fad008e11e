"""Weights on disk: read safely, written whole or not at all, converted between formats."""

from goose_mm.checkpoint.files import (
    convert,
    detect,
    digest,
    fla_config,
    from_goose,
    is_ours,
    load_model_files,
    read_model,
    read_tensors,
    save_model,
    to_goose,
)
from goose_mm.checkpoint.rwkv7 import Layout

__all__ = [
    "Layout",
    "convert",
    "detect",
    "digest",
    "fla_config",
    "from_goose",
    "is_ours",
    "load_model_files",
    "read_model",
    "read_tensors",
    "save_model",
    "to_goose",
]
