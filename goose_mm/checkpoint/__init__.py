"""Weights on disk: read safely, written whole or not at all, converted between formats."""

from goose_mm.checkpoint.convert import (
    Layout,
    convert,
    detect,
    from_goose,
    load_model_files,
    read_model,
    to_goose,
    tokenizer_files,
)
from goose_mm.checkpoint.files import digest, dump, is_weights, made, read_tensors, whole
from goose_mm.checkpoint.fla import fla_config
from goose_mm.checkpoint.ours import is_ours, save_model

__all__ = [
    "Layout",
    "convert",
    "detect",
    "digest",
    "dump",
    "fla_config",
    "from_goose",
    "is_ours",
    "is_weights",
    "load_model_files",
    "made",
    "read_model",
    "read_tensors",
    "save_model",
    "to_goose",
    "tokenizer_files",
    "whole",
]
