"""Any model that is read, and the way between formats of text models.

A format is a module with the same three functions:
- `recognise(tensors, settings)`: whether these names, shapes and config.json are of that format;
- `to_ours(tensors, settings)`: our configuration and tensors, ValueError when they do not fit;
- `from_ours(config, tensors)`: its config.json and tensors. Values and dtypes are kept both ways.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from goose_mm.checkpoint import fla, others, ours, rwkv7, shell
from goose_mm.checkpoint.files import (
    CONFIG,
    WEIGHT_SUFFIXES,
    Tensors,
    read_settings,
    read_tensors,
    write_folder,
    write_pickle,
)
from goose_mm.config import ModelConfig, TextModel

Layout = Literal["goose", "rwkv", "fla"]
FORMATS: dict[str, Any] = {"goose": ours, "shell": shell, "rwkv": rwkv7, "fla": fla}
WRAPPERS = ("_forward_module", "module", "_orig_mod")  # DeepSpeed, DDP, torch.compile
OF_TOKENIZERS = ("*token*", "*vocab*", "merges.txt", "*.model", "chat_template*")


def detect(tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None) -> str:
    """The format of a checkpoint. ValueError that says what else it is, if it is none."""
    others.refuse(tensors)
    for layout, form in FORMATS.items():
        if form.recognise(tensors, settings or {}):
            return layout
    raise others.unknown(tensors, settings or {})


def to_goose(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> tuple[Any, Tensors]:
    """A checkpoint in any format -> its configuration and tensors in ours.

    `settings` is its config.json, where there is one. ValueError names what is missing, unknown or
    misshapen.
    """
    settings = settings or {}
    if ours.states(settings):
        return ours.to_ours(dict(tensors), settings)
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor
        for name, tensor in tensors.items()
    }
    if len(plain) != len(tensors):
        raise ValueError(f"some tensors differ only by the wrappers {', '.join(WRAPPERS)}")
    return FORMATS[detect(plain, settings)].to_ours(plain, settings)


def from_goose(config: TextModel, tensors: Mapping[str, Tensor], layout: Layout) -> Tensors:
    """Tensors in our layout -> another layout, values and dtypes kept."""
    return FORMATS[layout].from_ours(config, tensors)[1]


def read_model(path: str | os.PathLike[str]) -> tuple[ModelConfig, Tensors]:
    """Configuration and tensors, in our layout, of any model we read.

    A folder of ours (text, vision or audio), an official `.pth`, a fla folder or file, or a folder
    that `goose_mm.hf` saved. FileNotFoundError or ValueError, in one line, when something is
    missing or broken.
    """
    path = Path(path)
    settings = read_settings(path)
    tensors = read_tensors(path)
    try:
        config, tensors = to_goose(tensors, settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not settings.keys() & {"model", "tokenizer"}:  # those of goose_mm say which it is
        config = _with_words_of(path, config)
    return config, tensors


def _with_words_of(folder: Path, config: TextModel) -> TextModel:
    """A tokenizer.json is the model's own, also of one with as many rows as the World vocabulary,
    which others call rwkv_vocab."""
    own = (folder / "tokenizer.json").is_file() and not any(folder.glob("rwkv_vocab*"))
    if not own or config.text.tokenizer != "world":
        return config
    return replace(config, text=replace(config.text, tokenizer="bpe"))


def load_model_files(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Tensors]:
    """Read what `save_model` wrote; FileNotFoundError also when there is no config.json."""
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}; it is not a model folder")
    return read_model(folder)


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: Layout | None = None,
    *,
    force: bool = False,
) -> Layout:
    """Write the text model at `src` again at `dst` in another layout, and return that layout.

    `to` is "rwkv" (one `.pth`), "goose" or "fla" (folders); by default what the name of `dst`
    suggests: `.pth` or a folder of ours. Files of a tokenizer are copied from folder to folder.
    FileExistsError when `dst` exists, unless `force`.
    """
    dst = Path(dst)
    suffix = dst.suffix.lower()
    layout: Layout = to or ("rwkv" if suffix == ".pth" else "goose")
    if layout == "rwkv" and suffix != ".pth":
        raise ValueError(f"layout 'rwkv' is one file that ends in .pth, not {dst}")
    if layout != "rwkv" and suffix in WEIGHT_SUFFIXES:
        raise ValueError(f"layout {layout!r} is a folder, {dst} looks like a file")
    if dst.exists() and not force:
        raise FileExistsError(f"{dst} exists; choose another name, or overwrite it with --force")
    config, tensors = read_model(src)
    if not isinstance(config, TextModel):
        raise ValueError(f"{src} is of kind {config.model!r}; only text models are converted")
    settings, tensors = FORMATS[layout].from_ours(config, tensors)
    if layout == "rwkv":
        write_pickle(dst, tensors)
        return layout
    write_folder(dst, settings, tensors, tokenizer_files(Path(src)))
    return layout


def tokenizer_files(folder: Path) -> list[Path]:
    """What stands beside the weights and has to do with words, read by us or not."""
    found = {path for pattern in OF_TOKENIZERS for path in folder.glob(pattern)}
    return sorted(p for p in found if p.is_file() and p.suffix.lower() not in WEIGHT_SUFFIXES)
