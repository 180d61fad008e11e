"""Tokenizers: the RWKV World vocabulary, the Pile's GPT-NeoX one, and a byte-level BPE of our own.

All are lossless on bytes (the Pile's normalises Unicode to NFC first) and share one rule: id 0
ends a text, and no text turns into it unless the caller says `allow_special=True`.
"""

from __future__ import annotations

import ast
import codecs
import functools
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from importlib import resources
from itertools import chain, pairwise
from pathlib import Path
from string import ascii_letters
from typing import TYPE_CHECKING

from goose_mm.checkpoint import whole
from goose_mm.checkpoint.contents import what_it_is
from goose_mm.config import TextConfig

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
WORLD_FILE = "rwkv_vocab_v20230424.txt"
WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"
WORLD_ROWS = 65536  # rows of the released embeddings; ids from vocab_size on are never trained
PILE_ROWS = 50304


class NoTokenizer(ValueError):
    """A model has no tokenizer, or one of a kind that is not read. It still works on ids."""


class Tokenizer(ABC):
    """Text to token ids and back. A subclass gives `_encode` and the bytes of every id."""

    bos_id = 0
    eos_id = 0

    def __init__(self, pieces: list[bytes], rows: int = 0) -> None:
        self.vocab_size = len(pieces)
        self._pieces = pieces + [b""] * (rows - len(pieces))

    @abstractmethod
    def _encode(self, data: bytes) -> list[int]:
        """Ids of any byte string, none of them 0."""

    def encode(self, text: str | bytes, *, allow_special: bool = False) -> list[int]:
        """Ids of a text, or of bytes that need not be UTF-8; no id is put before or after.

        `allow_special` turns a literal `<|endoftext|>` into id 0: only for text you wrote yourself.
        ValueError for a string that is not Unicode text (half of a surrogate pair).
        """
        try:
            data = text.encode() if isinstance(text, str) else text
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is half of a surrogate pair; "
                "decode its source as UTF-8 with errors='replace'"
            ) from None
        if not allow_special:
            return self._encode(data)
        first, *rest = (self._encode(part) for part in data.split(END_OF_TEXT.encode()))
        return first + [token for part in rest for token in (self.eos_id, *part)]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids; end of text and padding are empty. ValueError on unknown ids."""
        ids = list(ids)
        known = len(self._pieces)
        if ids and not 0 <= min(ids) <= max(ids) < known:
            wrong = next(i for i in ids if not 0 <= i < known)
            raise ValueError(f"token id {wrong} is not in this vocabulary of ids 0 to {known - 1}")
        return b"".join([self._pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes ids one at a time; the pieces and the flush together are `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters this id completes; bytes of an unfinished character are held back."""
        return self._text.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is held back at the end: U+FFFD or nothing."""
        return self._text.decode(b"", True)


class WorldTokenizer(Tokenizer):
    """The official RWKV vocabulary: greedy longest match over bytes (specs: 65529 tokens).

    Matching never looks across a pair of bytes that no token contains, so the input may be cut
    there without changing a single id. Words and the like recur: their ids are remembered.
    """

    def __init__(self) -> None:
        tokens = world_tokens()
        super().__init__([b"", *tokens], WORLD_ROWS)
        self._ids = {token: i for i, token in enumerate(tokens, start=1)}
        lengths: dict[bytes, set[int]] = {}
        for token in tokens[256:]:  # the first 256 are the single bytes
            lengths.setdefault(token[:2], set()).add(len(token))
        self._lengths = {start: sorted(some, reverse=True) for start, some in lengths.items()}
        self._chunk = chunk_pattern(tokens)
        self._known = _Remembered(self._match)

    def _encode(self, data: bytes) -> list[int]:
        chunks = self._chunk.findall(data)
        return list(chain.from_iterable(map(self._known.__getitem__, chunks)))

    def _match(self, data: bytes) -> tuple[int, ...]:
        """Greedy longest match, by the token lengths that occur for the next two bytes."""
        ids, at = [], 0
        while at < len(data):
            for length in self._lengths.get(data[at : at + 2], ()):
                token = self._ids.get(data[at : at + length])
                if token is not None:
                    break
            else:
                token, length = data[at] + 1, 1
            ids.append(token)
            at += length
        return tuple(ids)


class _Remembered(dict[bytes, tuple[int, ...]]):
    """Ids of the short chunks met lately; emptied when full, so novel text cannot fill memory."""

    def __init__(self, match: Callable[[bytes], tuple[int, ...]]) -> None:
        super().__init__()
        self._match = match

    def __missing__(self, chunk: bytes) -> tuple[int, ...]:
        ids = self._match(chunk)
        if len(self) >= 100_000:
            self.clear()
        if len(chunk) <= 32:
            self[chunk] = ids
        return ids


@functools.cache
def world_tokens() -> tuple[bytes, ...]:
    """The tokens with ids 1 to 65529. NoTokenizer when the shipped file was changed."""
    data = resources.files("goose_mm.text").joinpath(WORLD_FILE).read_bytes()
    data = _check_world(data, WORLD_FILE)
    tokens = []
    for line in data.decode().rstrip("\n").split("\n"):
        literal = line[line.index(" ") + 1 : line.rindex(" ")]
        plain = "\\" not in literal and literal[0] != "b"
        token = literal[1:-1] if plain else ast.literal_eval(literal)
        tokens.append(token.encode() if isinstance(token, str) else token)
    return tuple(tokens)


def _check_world(data: bytes, source: Path | str) -> bytes:
    """The file as it was published, whatever its line ends. NoTokenizer when it was changed."""
    data = data.replace(b"\r\n", b"\n")
    if hashlib.sha256(data).hexdigest() != WORLD_SHA256:
        raise NoTokenizer(f"{source} is not the official vocabulary, no other is read")
    return data


def chunk_pattern(tokens: Iterable[bytes]) -> re.Pattern[bytes]:
    """Cuts any bytes into chunks, only between two bytes that are neighbours in no token.

    That is: behind a byte of some class, before a byte that follows none of this class in any
    token. A chunk ends at the first such place; words and punctuation are only found faster.
    """
    after: list[set[int]] = [set() for _ in range(256)]
    for token in tokens:
        for left, right in pairwise(token):
            after[left].add(right)

    def one_of(members: set[int]) -> bytes:
        return b"[" + b"".join(b"\\x%02x" % byte for byte in sorted(members)) + b"]"

    def follows(members: set[int]) -> set[int]:
        return set().union(*(after[byte] for byte in members))

    letters, digits, joiners = (set(c.encode()) for c in (ascii_letters, "0123456789", " \t\r\n'-"))
    beyond_ascii = set(range(128, 256))
    marks = set(range(128)) - letters - digits - joiners
    runs = (b"%s+(?!%s)" % (one_of(c), one_of(c | follows(c))) for c in (letters, marks))
    ends = (
        b"%s(?!%s)" % (one_of(c), one_of(follows(c)))
        for c in (marks, joiners, letters, beyond_ascii, digits)
    )
    return re.compile(b" ?(?:%s)|(?s:.)*?(?:%s)" % (b"|".join(runs), b"|".join(ends)))


class _ByteLevel(Tokenizer):
    """A byte-level BPE of the `tokenizers` library, made safe for text one did not write."""

    def __init__(self, library: tokenizers.Tokenizer, rows: int = 0, source: str = "") -> None:
        library.encode_special_tokens = True  # text that looks like a special token stays text
        super().__init__(_pieces(library, source), rows)
        self._library = library
        self._byte_ids = {
            byte: library.token_to_id(char) for char, byte in byte_of_character().items()
        }

    def _encode(self, data: bytes) -> list[int]:
        ids = []
        # surrogateescape stands one character in U+DC80..U+DCFF for each byte that is not UTF-8
        for part in re.split("([\udc80-\udcff]+)", data.decode(errors="surrogateescape")):
            if "\udc80" <= part[:1] <= "\udcff":
                ids += [self._byte_id(ord(char) - 0xDC00) for char in part]
            else:
                ids += self._library.encode(part, add_special_tokens=False).ids
        return ids

    def _byte_id(self, byte: int) -> int:
        token = self._byte_ids[byte]
        if token is None:
            raise ValueError(
                f"byte 0x{byte:02x} is not UTF-8 and has no token in this vocabulary; "
                "decode the input with errors='replace'"
            )
        return token

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, whole or not at all."""
        with whole(Path(path)) as part:
            part.write_text(self._library.to_str(pretty=True), encoding="utf-8")


class BPETokenizer(_ByteLevel):
    """Our own BPE: 256 bytes and end of text, the rest learned. Saved as tokenizer.json."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn merges from texts; few texts may give fewer tokens than `vocab_size`.

        ValueError when `vocab_size` is below 257, the bytes and end of text.
        """
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise ValueError(f"a byte-level vocabulary needs at least 257 tokens, got {vocab_size}")
        library = tokenizers.Tokenizer(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(byte_of_character()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        return cls(library)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BPETokenizer:
        """Read tokenizer.json. FileNotFoundError, or ValueError when it is no byte-level BPE."""
        return cls(_read_library(Path(path)), source=f"{path}: ")


class PileTokenizer(_ByteLevel):
    """GPT-NeoX's 20B_tokenizer.json, used by the models trained on the Pile.

    It normalises text to Unicode NFC, and 13 bytes that never occur in UTF-8 have no token.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(_read_library(Path(path)), PILE_ROWS, source=f"{path}: ")


def load_tokenizer(config: TextConfig, folder: Path | None) -> Tokenizer:
    """The tokenizer a configuration names; `bpe` and `pile` read their file from the folder.

    NoTokenizer or FileNotFoundError, with the cure, when there is none or of a kind that is not
    read; ValueError when its file is broken.
    """
    if config.tokenizer == "world":
        for vocabulary in folder.glob("rwkv_vocab*.txt") if folder else ():
            _check_world(vocabulary.read_bytes(), vocabulary)
        return WorldTokenizer()
    if folder is None:
        raise NoTokenizer(
            f"the tokenizer of its {config.vocab_size} ids is read from a model folder, and there "
            "is none"
        )
    saved = folder / "tokenizer.json"
    if config.tokenizer == "pile":
        return PileTokenizer(saved if saved.is_file() else folder / "20B_tokenizer.json")
    tokenizer = BPETokenizer.load(saved)
    if tokenizer.vocab_size > config.vocab_size:
        raise NoTokenizer(
            f"{saved} has {tokenizer.vocab_size} tokens, the model {config.vocab_size} ids"
        )
    return tokenizer


def _read_library(path: Path) -> tokenizers.Tokenizer:
    import tokenizers

    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer file {path}; it belongs beside the weights of its model "
            "(20B_tokenizer.json for the Pile models is in github.com/BlinkDL/ChatRWKV)"
        )
    try:
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises bare Exception
        what = what_it_is(path)
        raise ValueError(
            f"{path} is not a tokenizer file: {error}" + (f"; it is {what}" if what else "")
        ) from None


def _pieces(library: tokenizers.Tokenizer, source: str) -> list[bytes]:
    """The bytes of every id. NoTokenizer unless this is byte-level, with end of text first."""
    if library.token_to_id(END_OF_TEXT) != 0:
        raise NoTokenizer(f"{source}id 0 must be {END_OF_TEXT}, it is {library.id_to_token(0)!r}")
    added = library.get_added_tokens_decoder()
    byte_of = byte_of_character()
    vocabulary = library.get_vocab()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i not in added:
            if not byte_of.keys() >= set(token):
                raise NoTokenizer(f"{source}token {token!r} is not byte-level")
            pieces[i] = bytes(byte_of[char] for char in token)
        elif not added[i].special:
            pieces[i] = token.encode()
    return pieces


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The printable stand-ins that byte-level BPE uses for bytes (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + i): byte for i, byte in enumerate(others)}
