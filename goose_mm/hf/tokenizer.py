"""Our tokenizers as a tokenizer of transformers: the same ids, and no text becomes id 0.

transformers wants a string for every token; a token's bytes are written in the printable
stand-ins of byte-level BPE. End of text is `<|endoftext|>` there, as bos, eos and padding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizer

from goose_mm.config import TextConfig
from goose_mm.hf.configuration import IGNORED
from goose_mm.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    PileTokenizer,
    Tokenizer,
    byte_of_character,
    load_tokenizer,
)

SAME_BYTES = "\u200b"  # behind the name of a token whose bytes an earlier one has, too
ENDS = ("bos_token", "eos_token", "pad_token")


class GooseTokenizer(PreTrainedTokenizer):
    """`kind` is "world", "pile" or "bpe"; the last two are read from tokenizer.json.

    By default id 0 is put before a text, as `RWKV7LM.generate` does, and batches are padded on
    the left. The vocabulary is closed: special tokens may be any of its tokens, by name, and
    others are a ValueError that changes nothing. A literal `<|endoftext|>` is text like any
    other, whatever `split_special_tokens` says; put id 0 between ids yourself.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(
        self,
        tokenizer_file: str | None = None,
        kind: str = "world",
        words: Tokenizer | None = None,
        **kwargs: Any,
    ) -> None:
        folder = Path(tokenizer_file).parent if tokenizer_file else None
        self.kind = kind
        self.words = words or load_tokenizer(TextConfig(tokenizer=kind), folder)  # type: ignore[arg-type]
        bytes_of = (self.words.decode_bytes([i]) for i in range(1, self.words.vocab_size))
        character_of = {byte: character for character, byte in byte_of_character().items()}
        self._ids = {END_OF_TEXT: 0}
        for i, data in enumerate(bytes_of, start=1):
            name = "".join(character_of[byte] for byte in data)
            while name in self._ids:
                name += SAME_BYTES
            self._ids[name] = i
        self._names = list(self._ids)
        kwargs.pop("added_tokens_decoder", None)  # a file's own list of what `words` has read
        defaults = dict.fromkeys(ENDS, END_OF_TEXT) | {"special_tokens_pattern": "bos"}
        super().__init__(kind=kind, **(defaults | kwargs))

    @classmethod
    def of(cls, words: Tokenizer, kind: str) -> GooseTokenizer:
        """Around a tokenizer of ours; `kind` is `TextConfig.tokenizer` of its model."""
        return cls(kind=kind, words=words)

    @property
    def vocab_size(self) -> int:
        return self.words.vocab_size

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return self._tokenize(text)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._names[i] for i in self.words.encode(text)]

    def _encode_plus(  # type: ignore[bad-override]
        self, text: Any, text_pair: Any = None, *, is_split_into_words: bool = False, **kwargs: Any
    ) -> BatchEncoding:
        if is_split_into_words:
            text, text_pair = _joined(text), _joined(text_pair)
        return super()._encode_plus(
            text, text_pair, is_split_into_words=is_split_into_words, **kwargs
        )

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        if 0 <= index < len(self._names):
            return self._names[index]
        if index == IGNORED:
            return ""
        return self.words.decode([index])  # empty for a row of padding, else ValueError

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        byte_of = byte_of_character()
        text = "".join(tokens).replace(SAME_BYTES, "")
        if foreign := set(text) - byte_of.keys():
            raise ValueError(f"{min(foreign)!r} stands in no token's name; give names, not texts")
        return bytes(byte_of[character] for character in text).decode(errors="replace")

    def _must_know(self, tokens: Iterable[Any]) -> None:
        if unknown := [str(token) for token in tokens if str(token) not in self._ids]:
            raise ValueError(
                f"the vocabulary is closed, {unknown[0]!r} cannot be added: it is encoded as any "
                f"text is, and a special token must be one that is there, as {END_OF_TEXT}"
            )

    def __setattr__(self, key: str, value: Any) -> None:
        name = key.removesuffix("_ids").removesuffix("_id")
        if value is not None and name in (*self.SPECIAL_TOKENS_ATTRIBUTES, "extra_special_tokens"):
            if name != key:
                key, value = name, self.convert_ids_to_tokens(value)
            self._must_know(value if isinstance(value, list | tuple) else [value])
        elif key == "added_tokens_decoder" and value:
            self._must_know(value.values())
        super().__setattr__(key, value)

    def add_special_tokens(self, *args: Any, **kwargs: Any) -> int:
        before = dict(self._special_tokens_map), list(self._extra_special_tokens)
        try:
            return super().add_special_tokens(*args, **kwargs)
        except Exception:  # some may be set by then
            self._special_tokens_map, self._extra_special_tokens = before
            raise

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        self._must_know(new_tokens)
        return super()._add_tokens(new_tokens, special_tokens)

    def save_vocabulary(
        self, save_directory: str | os.PathLike[str], filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        if not isinstance(self.words, BPETokenizer | PileTokenizer):  # it comes with this package
            return ()
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}tokenizer.json"
        self.words.save(path)
        return (str(path),)


def _joined(text: Any) -> Any:
    """One text from its words; anything else, as a batch of texts, as it is."""
    words = isinstance(text, list | tuple) and all(isinstance(word, str) for word in text)
    return " ".join(text) if words else text
