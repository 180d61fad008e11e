"""`TextModel` of goose_mm.config in the words of transformers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, no_type_check

from transformers import PreTrainedConfig

from goose_mm.config import BackboneConfig, TextConfig, TextModel, from_dict

IGNORED = -100  # a label that is not to be predicted, and the id of no token

# what only other kinds of model have: a language model reads from left to right
NOT_FOR_TEXT = ("bidirectional", "shift")
SIZES = tuple(f.name for f in fields(BackboneConfig) if f.name not in NOT_FOR_TEXT)
WORDS = tuple(f.name for f in fields(TextConfig))


@no_type_check  # the base class gives it an __init__ that takes any keyword, and checks them
class RWKV7Config(PreTrainedConfig):
    """The fields of `BackboneConfig` and the vocabulary; `hidden_size`, `num_hidden_layers`,
    `intermediate_size` and `head_dim` are understood as well. ConfigError for impossible sizes."""

    model_type: ClassVar[str] = "goose_rwkv7"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "dim",
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_dim",
        "head_dim": "head_size",
    }

    dim: int = 768
    num_layers: int = 12
    head_size: int = 64
    ffn_dim: int = 0  # 0 here and in the ranks: the size the released models use
    decay_rank: int = 0
    a_rank: int = 0
    v_rank: int = 0
    gate_rank: int = 0
    a_max: float = 1.0
    dropout: float = 0.0
    vocab_size: int = 65536
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    tokenizer: str | None = "world"  # as `TextConfig` has it

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = self.goose().backbone.resolved()
        for name in SIZES:
            setattr(self, name, getattr(sizes, name))

    @property
    def num_attention_heads(self) -> int:
        return self.dim // self.head_size

    @classmethod
    def of(cls, config: TextModel, **more: Any) -> RWKV7Config:
        """The same model; `more` are fields of transformers, as `tie_word_embeddings`."""
        sizes = {name: getattr(config.backbone, name) for name in SIZES}
        words = {name: getattr(config.text, name) for name in WORDS}
        return cls(**sizes, **words, **more)

    def goose(self) -> TextModel:
        """The same model as goose_mm configures it."""
        sizes = {name: getattr(self, name) for name in SIZES}
        words = {name: getattr(self, name) for name in WORDS}
        return from_dict(TextModel, {"backbone": sizes, "text": words})
