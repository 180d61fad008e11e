"""From a recipe to a model and its data, and from a model to the folder people load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from goose_mm import checkpoint
from goose_mm.config import (
    AudioModel,
    AudioRecipe,
    ModelConfig,
    Recipe,
    TextModel,
    TextRecipe,
    VisionModel,
    VisionRecipe,
    model_part,
)
from goose_mm.hub import build_model, load
from goose_mm.text.generate import need_tokenizer
from goose_mm.text.tokenizer import BPETokenizer, Tokenizer, load_tokenizer

TOKENIZER_FILE = "tokenizer.json"


def build(recipe: Recipe, out: Path) -> tuple[nn.Module, Any]:
    """A model ready to train, started from `recipe.init` if given, and its data."""
    config, seed, batch = model_part(recipe), recipe.train.seed, recipe.train.batch_size
    start = _start(recipe) if recipe.init else None
    if isinstance(recipe, AudioRecipe):
        from goose_mm.data.clips import Clips

        data = Clips(recipe.data, recipe.audio, batch, seed)
        assert isinstance(config, AudioModel)
        config = replace(config, audio=replace(config.audio, labels=tuple(data.labels)))
        return _started(build_model(config), start), data

    tokenizer = _tokenizer(recipe, start, out)
    config = _with_vocabulary(config, tokenizer)
    if isinstance(recipe, VisionRecipe):
        from goose_mm.data.scenes.pictures import Scenes

        data = Scenes(recipe.data, recipe.vision, tokenizer, batch, seed)
        model = _started(build_model(config), start)
        model.lm.tokenizer = tokenizer  # type: ignore[union-attr]
        return model, data

    from goose_mm.data.text import Books

    model = _started(build_model(config), start)
    model.tokenizer = tokenizer  # type: ignore[assignment]
    return model, Books(recipe.data, tokenizer, batch, seed)


def _start(recipe: Recipe) -> Any:
    """The model a run starts from. ValueError when it is of a kind that cannot become the other."""
    model: Any = load(recipe.init)
    kinds = ("text", "vision") if recipe.model == "vision" else (recipe.model,)
    if model.config.model not in kinds:
        raise ValueError(
            f"init = {recipe.init} is a model for {model.config.model}; a recipe for "
            f"{recipe.model} starts from one for {' or '.join(kinds)}"
        )
    return model


def save(model: nn.Module, out: Path) -> None:
    """Write config.json, model.safetensors and, where the model has its own, tokenizer.json."""
    config: Any = model.config
    tokenizer = getattr(getattr(model, "lm", model), "tokenizer", None)
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.save(out / TOKENIZER_FILE)
    checkpoint.save_model(out, config, model.state_dict())


def _tokenizer(recipe: TextRecipe | VisionRecipe, start: Any, out: Path) -> Tokenizer:
    """The tokenizer of the run in `out`, of the start model, or one learned from the data."""
    if (out / TOKENIZER_FILE).exists():
        return BPETokenizer.load(out / TOKENIZER_FILE)
    if start is not None:
        return need_tokenizer(getattr(start, "lm", start))
    if recipe.text.tokenizer != "bpe":
        return load_tokenizer(recipe.text, None)
    if not isinstance(recipe, TextRecipe):
        raise ValueError("a vision recipe with a BPE tokenizer needs init = a text model")
    from goose_mm.data.text import vocabulary_texts

    return BPETokenizer.train(vocabulary_texts(recipe.data), recipe.text.vocab_size)


def _with_vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model is as wide as the tokenizer learned from the data turned out to be."""
    assert isinstance(config, (TextModel, VisionModel))
    if not isinstance(tokenizer, BPETokenizer):
        return config
    return replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))


@torch.no_grad()
def _started(model: nn.Module, start: nn.Module | None) -> nn.Module:
    """Copy the weights of `start`: those of a text model become the `lm.` of a vision model."""
    if start is None:
        return model
    wanted = model.state_dict()
    given: dict[str, Tensor] = start.state_dict()
    if not given.keys() & wanted.keys():
        given = {f"lm.{name}": tensor for name, tensor in given.items()}
    wrong = [k for k, t in given.items() if k not in wanted or wanted[k].shape != t.shape]
    if wrong:
        raise ValueError(f"init does not fit this recipe: {', '.join(wrong[:3])}")
    model.load_state_dict(given, strict=False)
    return model
