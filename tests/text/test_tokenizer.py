"""Tokenizers: exact against the official one, lossless on bytes, id 0 never out of text."""

import json
import os
import pickle
import random
import time
from pathlib import Path

import pytest
import rwkv
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from goose_mm.config import TextConfig
from goose_mm.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    PileTokenizer,
    Tokenizer,
    WorldTokenizer,
    load_tokenizer,
    world_tokens,
)

TEXTS = [
    "The geese are flying south. 'Why?' she asked; nobody's answer came.\n\n",
    "Zug um Zug fährt der Schnellzug über die Brücke,\tund 1234 Vögel sehen zu.\r\n",
    "春眠不觉晓。处处闻啼鸟。夜来风雨声。 ひらがな 한국어 \U0001f986\U0001f468\u200d\U0001f469",
    "def f(x):\n        return {'a': [x ** 2, -1e-3], \"b\": None}  # it's  --  fine\n",
] * 3
FRAGMENTS = [b" ", b"\n  ", b"'s", b"naive", b"2024", b"==", b"\xc3", b"\xe2\x80", b"<|endoftext|>"]
SOME_BYTES = st.lists(
    st.binary(max_size=6) | st.text(max_size=6).map(str.encode) | st.sampled_from(FRAGMENTS),
    max_size=12,
).map(b"".join)


@pytest.fixture(scope="module")
def world() -> WorldTokenizer:
    return WorldTokenizer()


@pytest.fixture(scope="module")
def official() -> TRIE_TOKENIZER:
    return TRIE_TOKENIZER(os.path.join(next(iter(rwkv.__path__)), "rwkv_vocab_v20230424.txt"))


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def pile_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of the form of 20B_tokenizer.json: NFC, runs of spaces added, no byte 0xff."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet()) - set("ÀÁõö÷øùúûüýþÿ")
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[END_OF_TEXT, "<|padding|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    library.train_from_iterator(TEXTS, trainer)
    spaces = [tokenizers.AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)]
    library.add_tokens(spaces)
    path = tmp_path_factory.mktemp("pile") / "20B_tokenizer.json"
    library.save(str(path))
    return path


@pytest.fixture(scope="module", params=["world", "bpe", "pile"])
def any_tokenizer(
    request: pytest.FixtureRequest, world: WorldTokenizer, bpe: BPETokenizer, pile_file: Path
) -> Tokenizer:
    return {"world": world, "bpe": bpe, "pile": PileTokenizer(pile_file)}[request.param]


# World against the official implementation


def random_text(rng: random.Random) -> str:
    """Pieces of real text, spaces, digits, rare characters and control codes, in any order."""
    pieces = []
    for _ in range(rng.randrange(1, 8)):
        text = rng.choice(TEXTS)
        start = rng.randrange(len(text))
        pieces += [text[start : start + rng.randrange(1, 20)], rng.choice(["", " ", "\n", "  -"])]
        pieces.append(chr(rng.choice([rng.randrange(128), rng.randrange(0xE000, 0x30000)])))
    return "".join(pieces)


def test_world_ids_equal_the_official_ones_on_text(
    world: WorldTokenizer, official: TRIE_TOKENIZER
) -> None:
    rng = random.Random(1)
    for _ in range(10_000):
        text = random_text(rng)
        assert world.encode(text) == official.encode(text), repr(text)


def test_world_ids_equal_the_official_ones_on_bytes(
    world: WorldTokenizer, official: TRIE_TOKENIZER
) -> None:
    rng = random.Random(2)
    tokens = world_tokens()
    for number in range(10_000):
        if number % 2:  # halves of tokens side by side: the matches that nearly happen
            some = rng.choices(tokens, k=rng.randrange(1, 8))
            data = b"".join(token[: rng.randrange(1, len(token) + 1)] for token in some)
        else:
            data = rng.randbytes(rng.randrange(40))
        assert world.encode(data) == official.encodeBytes(data), data


@settings(max_examples=500, deadline=None)
@given(data=SOME_BYTES)
def test_world_is_the_greedy_longest_match(
    world: WorldTokenizer, official: TRIE_TOKENIZER, data: bytes
) -> None:
    assert world.encode(data) == official.encodeBytes(data)


def test_every_world_token_encodes_to_itself(world: WorldTokenizer) -> None:
    assert world.vocab_size == 65530
    for i, token in enumerate(world_tokens(), start=1):
        assert world.encode(token) == [i]
    assert world.decode_bytes(range(1, 65530)) == b"".join(world_tokens())


def test_world_golden_ids(world: WorldTokenizer) -> None:
    # from rwkv 0.8.32
    ids = [24281, 59, 36786, 45, 38609, 34, 261, 5585, 41693, 59, 33, 13087, 14795]
    assert world.encode("User: Hello, goose!\n\nAssistant: 春眠") == ids


def test_world_reads_several_megabytes_a_second(official: TRIE_TOKENIZER) -> None:
    """Twice the official speed; on books it is three to five times."""
    world = WorldTokenizer()
    rng = random.Random(3)
    words = ["".join(rng.choices("etaoinshrdlucm", k=rng.randrange(1, 9))) for _ in range(5000)]
    text = " ".join(rng.choices(words, k=60_000)).encode()

    def seconds(encode) -> float:
        spent = []
        for _ in range(3):
            start = time.process_time()
            encode(text)
            spent.append(time.process_time() - start)
        return min(spent)

    assert seconds(world.encode) < 0.5 * seconds(official.encodeBytes)


def test_world_memory_is_bounded(world: WorldTokenizer) -> None:
    novel = b" ".join(b"%x" % (i * 1_000_003) for i in range(60_000))
    assert world.decode_bytes(world.encode(b"a" * 1000 + novel)) == b"a" * 1000 + novel
    assert len(world._known) <= 100_000
    assert all(len(chunk) <= 32 for chunk in world._known)


def test_a_changed_world_vocabulary_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("goose_mm.text.tokenizer.resources.files", lambda _: tmp_path)
    (tmp_path / "rwkv_vocab_v20230424.txt").write_text("1 '\\x00' 1\n")
    with pytest.raises(ValueError, match="not the official vocabulary"):
        world_tokens.__wrapped__()


# laws of every tokenizer


@settings(max_examples=200, deadline=None)
@given(data=SOME_BYTES)
def test_bytes_come_back(world: WorldTokenizer, bpe: BPETokenizer, data: bytes) -> None:
    for tokenizer in (world, bpe):
        ids = tokenizer.encode(data)
        assert tokenizer.decode_bytes(ids) == data
        assert 0 not in ids and all(i < tokenizer.vocab_size for i in ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_text_comes_back(world: WorldTokenizer, bpe: BPETokenizer, text: str) -> None:
    for tokenizer in (world, bpe):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text) == tokenizer.encode(text.encode())


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(SOME_BYTES, st.text().map(str.encode)))
def test_streamed_decoding_is_whole_decoding(
    world: WorldTokenizer, bpe: BPETokenizer, data: bytes
) -> None:
    for tokenizer in (world, bpe):
        ids = tokenizer.encode(data)
        stream = tokenizer.stream_decoder()
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_a_stream_never_shows_half_a_character(world: WorldTokenizer) -> None:
    stream = world.stream_decoder()
    single_bytes = [byte + 1 for byte in "a\U0001f986é".encode()]
    assert [stream.push(i) for i in single_bytes] == ["a", "", "", "", "\U0001f986", "", "é"]
    assert stream.flush() == ""
    assert [stream.push(i) for i in single_bytes[1:3]] == ["", ""]
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f"{END_OF_TEXT * 2} "])
def test_text_cannot_end_itself(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert 0 not in ids
    assert any_tokenizer.decode(ids) == text
    opened = any_tokenizer.encode(text, allow_special=True)
    assert opened.count(0) == text.count(END_OF_TEXT)
    assert any_tokenizer.decode(opened) == text.replace(END_OF_TEXT, "")
    assert opened == any_tokenizer.encode(text.encode(), allow_special=True)


def test_nothing_is_nothing(any_tokenizer: Tokenizer) -> None:
    assert any_tokenizer.encode("") == any_tokenizer.encode(b"") == []
    assert any_tokenizer.decode([]) == ""
    assert any_tokenizer.bos_id == any_tokenizer.eos_id == 0
    assert any_tokenizer.decode([0]) == ""


def test_unknown_ids_are_refused(any_tokenizer: Tokenizer) -> None:
    for wrong in (-1, 10**6):
        with pytest.raises(ValueError, match=f"token id {wrong} is not in this vocabulary"):
            any_tokenizer.decode([1, wrong])


def test_padding_rows_of_the_released_embeddings_decode_to_nothing(
    world: WorldTokenizer, pile_file: Path
) -> None:
    assert world.decode([65530, 65535]) == ""
    assert PileTokenizer(pile_file).decode([50303]) == ""


def test_half_a_surrogate_pair_is_refused(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="character 1 of the text is half of a surrogate"):
        any_tokenizer.encode("a\ud83d")


def test_a_tokenizer_can_be_sent_to_another_process(any_tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert copy.encode(TEXTS[1]) == any_tokenizer.encode(TEXTS[1])


# BPE and the Pile's


def test_bpe_learns_merges_and_reloads(bpe: BPETokenizer, tmp_path: Path) -> None:
    assert bpe.vocab_size == 400
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0])
    bpe.save(tmp_path / "tokenizer.json")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]
    again = BPETokenizer.load(tmp_path / "tokenizer.json")
    for text in TEXTS:
        assert again.encode(text) == bpe.encode(text)
    assert again.encode(END_OF_TEXT) == bpe.encode(END_OF_TEXT) != [0]


def test_bpe_training_is_reproducible(bpe: BPETokenizer) -> None:
    again = BPETokenizer.train(iter(TEXTS), 400)
    assert again._library.to_str() == bpe._library.to_str()


def test_bpe_of_no_text_is_the_bytes() -> None:
    bare = BPETokenizer.train([], 1000)
    assert bare.vocab_size == 257
    assert bare.decode_bytes(bare.encode(bytes(range(256)))) == bytes(range(256))
    with pytest.raises(ValueError, match="at least 257 tokens, got 256"):
        BPETokenizer.train([], 256)


def test_pile_keeps_its_own_rules(pile_file: Path) -> None:
    pile = PileTokenizer(pile_file)
    assert pile.decode(pile.encode("e\u0301")) == "\u00e9"  # NFC
    (five_spaces,) = pile.encode(" " * 5)
    assert pile.decode([five_spaces]) == " " * 5
    assert 1 not in pile.encode("<|padding|>")
    for text in TEXTS:
        assert pile.decode(pile.encode(text)) == text
    assert pile.decode_bytes(pile.encode(b"ab\xe2\x82z")) == b"ab\xe2\x82z"
    with pytest.raises(ValueError, match="byte 0xff is not UTF-8 and has no token"):
        pile.encode(b"ab\xff")


def test_pile_ids_are_those_of_the_library(pile_file: Path) -> None:
    pile, library = PileTokenizer(pile_file), tokenizers.Tokenizer.from_file(str(pile_file))
    for text in TEXTS:
        assert pile.encode(text) == library.encode(text).ids


# from a folder


def test_load_tokenizer(bpe: BPETokenizer, pile_file: Path, tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(TextConfig(), None), WorldTokenizer)
    bpe.save(tmp_path / "tokenizer.json")
    assert isinstance(load_tokenizer(TextConfig(tokenizer="bpe"), tmp_path), BPETokenizer)
    pile = load_tokenizer(TextConfig(tokenizer="pile"), pile_file.parent)
    assert isinstance(pile, PileTokenizer)
    for config in (TextConfig(tokenizer="bpe"), TextConfig(tokenizer="pile")):
        with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*tokenizer\.json"):
            load_tokenizer(config, tmp_path / "empty")
        with pytest.raises(ValueError, match="is read from a model folder"):
            load_tokenizer(config, None)


def test_broken_tokenizer_files_are_named(bpe: BPETokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"\xff\xfe", b'{"model": 1'):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer file"):
            BPETokenizer.load(path)
    bpe.save(path)
    saved = json.loads(path.read_text())
    saved["added_tokens"], vocabulary = [], saved["model"]["vocab"]
    vocabulary["<|start|>"] = vocabulary.pop(END_OF_TEXT)
    path.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="id 0 must be"):
        BPETokenizer.load(path)
