"""The tokenizer of the transformers shell: our ids, and special tokens that the vocabulary has."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken

from goose_mm.hf import GooseTokenizer
from goose_mm.text import BPETokenizer, WorldTokenizer


@pytest.fixture(scope="module")
def own() -> tuple[BPETokenizer, GooseTokenizer]:
    words = BPETokenizer.train(["the goose swam over the wide river " * 9], 300)
    return words, GooseTokenizer.of(words, "bpe")


@pytest.fixture(scope="module")
def world() -> tuple[WorldTokenizer, GooseTokenizer]:
    words = WorldTokenizer()
    return words, GooseTokenizer.of(words, "world")


TEXTS = st.text() | st.sampled_from(["<|endoftext|>", " <|endoftext|>x", "\u200b", "é漢字\n\n"])


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=3).map("".join))
def test_the_ids_are_ours_and_never_0(own, world, text):
    for ours, theirs in (own, world):
        ids = ours.encode(text)
        for more in ({}, {"split_special_tokens": False}):
            assert theirs.encode(text, add_special_tokens=False, **more) == ids
        assert 0 not in ids and theirs(text)["input_ids"] == [0, *ids]
        assert theirs.decode(ids) == text
        assert theirs.convert_tokens_to_ids(theirs.convert_ids_to_tokens(ids)) == ids
        assert theirs.decode([0, *ids], skip_special_tokens=True) == text
        assert theirs.decode([0, *ids]) == "<|endoftext|>" + text


def test_every_token_has_a_name_of_its_own(world, own):
    for words in (world[1], own[1]):
        names = words.convert_ids_to_tokens(list(range(len(words))))
        assert words.convert_tokens_to_ids(names) == list(range(len(words)))
    assert world[1].decode([65535]) == ""  # a row without a token
    assert {world[1].bos_token_id, world[1].eos_token_id, world[1].pad_token_id} == {0}


def test_a_file_cannot_open_the_vocabulary(own, tmp_path):
    own[1].save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"split_special_tokens": False}))
    again = GooseTokenizer.from_pretrained(tmp_path)
    assert 0 not in again.encode("<|endoftext|>", add_special_tokens=False)


# --- special tokens -----------------------------------------------------------------------------


def all_of(tokenizer: GooseTokenizer) -> tuple:
    """What a refusal must not change."""
    padded = tokenizer(["a", "the goose"], padding=True)
    named = (tokenizer.special_tokens_map, tokenizer.extra_special_tokens, len(tokenizer))
    added = (tokenizer.added_tokens_decoder, tokenizer.get_added_vocab(), tokenizer.all_special_ids)
    return named, added, padded, tokenizer.batch_decode(padded.input_ids, skip_special_tokens=True)


STRANGERS = {
    "pad by dict": lambda t: t.add_special_tokens({"pad_token": "[PAD]"}),
    "an AddedToken": lambda t: t.add_special_tokens({"pad_token": AddedToken("[PAD]")}),
    "the second of two": lambda t: t.add_special_tokens({"sep_token": "the", "pad_token": "[P]"}),
    "one more": lambda t: t.add_special_tokens({"extra_special_tokens": ["the", "<image>"]}),
    "one more by its old name": lambda t: t.add_special_tokens(
        {"additional_special_tokens": ["<image>"]}
    ),
    "a key that is none": lambda t: t.add_special_tokens({"sep_token": "the", "tok": "the"}),
    "a plain token": lambda t: t.add_tokens(["the", "<image>"]),
    "an attribute": lambda t: setattr(t, "pad_token", "[PAD]"),
    "a list of them": lambda t: setattr(t, "extra_special_tokens", ["<image>"]),
    "an id": lambda t: setattr(t, "pad_token_id", 300),
    "an id below 0": lambda t: setattr(t, "eos_token_id", -1),
    "the table": lambda t: setattr(t, "added_tokens_decoder", {5: "[PAD]"}),
}


@pytest.mark.parametrize("how", STRANGERS)
def test_a_token_that_is_not_there_is_refused_and_nothing_changes(own, how):
    tokenizer = copy.deepcopy(own[1])
    before = all_of(tokenizer)
    with pytest.raises(ValueError):
        STRANGERS[how](tokenizer)
    assert all_of(tokenizer) == before
    with pytest.raises(ValueError, match="vocabulary is closed, '<image>' cannot be added"):
        tokenizer.add_tokens("<image>")


@pytest.mark.parametrize(
    "given",
    [
        {"pad_token": "[PAD]"},
        {"bos_token": "<s>"},
        {"extra_special_tokens": ["<image>"]},
        {"image_token": "<image>"},
    ],
)
def test_a_constructor_refuses_it_too(own, given, tmp_path):
    own[1].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="vocabulary is closed"):
        GooseTokenizer(words=own[0], kind="bpe", **given)
    with pytest.raises(ValueError, match="vocabulary is closed"):
        GooseTokenizer.from_pretrained(tmp_path, **given)


def test_a_token_that_is_there_is_what_one_names_it(own, tmp_path):
    words, there = own[0], own[1].convert_tokens_to_ids("the")
    by_name = GooseTokenizer(words=words, kind="bpe", pad_token="the")
    by_id, by_attribute, by_dict = (copy.deepcopy(own[1]) for _ in range(3))
    by_id.pad_token_id = there
    by_attribute.pad_token = "the"
    assert by_dict.add_special_tokens({"pad_token": "the"}) == 0
    by_dict.save_pretrained(tmp_path)
    saved = GooseTokenizer.from_pretrained(tmp_path)
    own[1].save_pretrained(tmp_path)
    asked = GooseTokenizer.from_pretrained(tmp_path, pad_token="the")
    goose = words.encode("goose")
    for tokenizer in (by_name, by_id, by_attribute, by_dict, saved, asked):
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("the", there)
        rows = tokenizer(["", "goose"], padding=True).input_ids
        assert rows == [[there] * len(goose) + [0], [0, *goose]]
        assert tokenizer.eos_token_id == 0


# --- what is no token, and what is no text ------------------------------------------------------


def test_an_unknown_name_has_no_id_and_an_unknown_id_no_text(own, world):
    for words, tokenizer in (own, world):
        assert tokenizer.convert_tokens_to_ids("<|im_end|>") is None
        assert tokenizer.convert_tokens_to_ids(["the", "<|im_end|>"])[1] is None
        for stranger in (-101, -1, 70000):
            with pytest.raises(ValueError, match=f"token id {stranger} is not in this vocabulary"):
                tokenizer.decode([words.encode("a")[0], stranger])
            with pytest.raises(ValueError, match="not in this vocabulary"):
                tokenizer.convert_ids_to_tokens(stranger)
        with pytest.raises(ValueError, match="' ' stands in no token's name"):
            tokenizer.convert_tokens_to_string(["the goose"])


def test_labels_are_decoded_without_what_is_ignored(own):
    words, tokenizer = own
    labels = [-100, -100, *words.encode("a goose"), 0, -100]
    assert tokenizer.decode(labels, skip_special_tokens=True) == "a goose"
    assert tokenizer.batch_decode([labels, [-100]])[1] == ""
    with pytest.raises(ValueError, match="vocabulary is closed"):
        copy.deepcopy(tokenizer).pad_token_id = -100


def test_words_are_read_as_a_text_with_spaces(own):
    words, tokenizer = own
    first, second = [0, *words.encode("the wide river")], [0, *words.encode("a goose")]
    split, pair = ["the", "wide", "river"], ["a", "goose"]

    def read(*given):
        return tokenizer(*given, is_split_into_words=True).input_ids

    assert read(split) == read(tuple(split)) == first
    assert read([split, pair, ["a"], []]) == [first, second, [0, *words.encode("a")], [0]]
    assert read(split, pair) == first + second
    assert read([split, pair], [pair, split]) == [first + second, second + first]
    assert tokenizer(["the wide river", "a goose"]).input_ids == [first, second]
