"""Where models come from: shipped names, folders, official checkpoints, the Hugging Face hub."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from goose_mm import checkpoint
from goose_mm.backbone.init import uninitialised
from goose_mm.config import AudioModel, ModelConfig, TextConfig, TextModel, VisionModel
from goose_mm.text.model import RWKV7LM
from goose_mm.text.tokenizer import NoTokenizer, Tokenizer, load_tokenizer


def shipped() -> list[str]:
    """Names of the models inside the package."""
    return sorted(p.parent.name for p in _pretrained().glob("*/config.json"))


def _pretrained() -> Path:
    return Path(str(resources.files("goose_mm") / "pretrained"))


def build_model(config: ModelConfig) -> nn.Module:
    """A freshly initialised model of a configuration, without a tokenizer."""
    if isinstance(config, AudioModel):
        from goose_mm.audio.model import AudioRWKV7

        return AudioRWKV7(config)
    if isinstance(config, VisionModel):
        from goose_mm.vision.model import VisualRWKV7

        return VisualRWKV7(config)
    return RWKV7LM(config)


def load(
    name_or_path: str | os.PathLike[str],
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Load a model in evaluation mode, in fp32 on the CPU unless told otherwise.

    `name_or_path` is a shipped name (goose-tiny-text, goose-tiny-vision, goose-tiny-audio), a
    folder of ours or in fla/HF layout, an official RWKV-7 `.pth`, or a hub id `owner/name`.
    FileNotFoundError or ValueError, in one line, when the source is missing or broken. A model
    whose tokenizer is missing, or is of a kind that is not read, has `tokenizer = None`.
    """
    path = locate(name_or_path)
    config, tensors = checkpoint.read_model(path)
    with uninitialised():
        model = build_model(config)
    fill(model, tensors, str(path))
    if not isinstance(config, AudioModel):
        language_model: Any = model if isinstance(config, TextModel) else model.lm
        try:
            language_model.tokenizer = _tokenizer(config.text, path)
        except (FileNotFoundError, NoTokenizer) as error:
            language_model.no_tokenizer = str(error)
    return model.eval().to(device=device or "cpu", dtype=dtype or torch.float32)


def _tokenizer(config: TextConfig, path: Path) -> Tokenizer:
    return load_tokenizer(config, path if path.is_dir() else None)


def lost_words(source: Path, converted: Path) -> str:
    """What to say of a tokenizer that a conversion left behind, or copied though it is not read;
    "" when there is nothing to say."""
    files = ", ".join(path.name for path in checkpoint.tokenizer_files(source))
    if not files:
        return ""
    config: Any = checkpoint.read_model(converted)[0]
    try:
        _tokenizer(config.text, converted)
    except (FileNotFoundError, ValueError) as error:
        done = "copied, but not read here" if converted.is_dir() else "left behind"
        return f"{files} {done}: {error}"
    return ""


def open_model(name: str, kind: str, device: str = "", dtype: torch.dtype | None = None) -> Any:
    """`load`, but ValueError unless it is of a kind: text, vision or audio; see `usable_device`."""
    model: Any = load(name, usable_device(device), dtype)
    found = model.config.model
    if found != kind:
        raise ValueError(
            f"{name} is a model for {found}; use one for {kind}, like goose-tiny-{kind}"
        )
    return model


def usable_device(asked: str) -> str:
    """The device asked for, or ValueError; without a wish, a GPU if there is one."""
    count = torch.cuda.device_count()
    usable = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if asked and asked not in usable:
        raise ValueError(f"--device {asked} cannot be used here; usable: {', '.join(usable)}")
    return asked or ("cuda" if count else "cpu")


def fill(model: nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Load every tensor of a model; ValueError names what is missing, left over or misshapen."""
    wanted = model.state_dict()
    missing, unknown = sorted(wanted.keys() - tensors), sorted(tensors.keys() - wanted)
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit its configuration: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ValueError(
                f"{source}: {name} is {list(tensor.shape)}, the configuration says "
                f"{list(wanted[name].shape)}"
            )
    model.load_state_dict(tensors)


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The local path of a model; hub ids are downloaded (or found in the hub's cache)."""
    name = os.fspath(name_or_path)
    if name in shipped():
        return _pretrained() / name
    path = Path(name)
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not checkpoint.is_weights(name):
        return _download(name)
    raise FileNotFoundError(
        f"{name}: no such file or folder, and no shipped model; those are {', '.join(shipped())}"
    )


def _download(repository: str) -> Path:
    """The folder of a repository: settings, words, weights; pickles where there is nothing else."""
    from huggingface_hub import HfApi, snapshot_download

    wanted = ["*.json", "*.txt", "*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
        if any(checkpoint.is_weights(path.name) for path in folder.iterdir()):
            return folder
        files = [name for name in HfApi().list_repo_files(repository) if "/" not in name]
        pickles = [name for name in files if checkpoint.is_weights(name)]
        single = [name for name in pickles if not name.startswith("pytorch_model")]
        if len(single) > 1:  # as many models, which would fill the disk
            raise ValueError(
                f"it holds {len(single)} models ({', '.join(single[:3])}, ...); "
                "download one of them and give its path"
            )
        return Path(snapshot_download(repository, allow_patterns=[*wanted, *pickles]))
    except Exception as error:  # the hub raises many kinds: no network, no such repository
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"no folder {repository!r} here, and the hub did not give it: {reason}"
        ) from None
