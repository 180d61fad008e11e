"""A conversation is one text: its state is that of everything said so far."""

from __future__ import annotations

import pytest
import torch

from goose_mm.config import BackboneConfig, TextConfig, TextModel
from goose_mm.text.chat import Chat
from goose_mm.text.generate import Sampling, prefill
from goose_mm.text.model import RWKV7LM
from goose_mm.text.tokenizer import WorldTokenizer

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def model() -> RWKV7LM:
    torch.manual_seed(0)
    small = BackboneConfig(dim=32, num_layers=2, head_size=16)
    config = TextModel(backbone=small, text=TextConfig(tokenizer="world"))
    return RWKV7LM(config, WorldTokenizer()).eval()


def same(chat: Chat, ids: list[int]) -> bool:
    """True if the chat remembers exactly these tokens."""
    _, state = prefill(chat.model, [ids])
    assert chat.state is not None
    pairs = zip(chat.state, state, strict=True)
    return all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in pairs)


def test_chat_remembers_every_turn(model):
    chat, encode = Chat(model, GREEDY, raw=True), model.tokenizer.encode
    list(chat.say("Once upon a time"))
    ids = [0, *encode("Once upon a time"), *chat.unread, *encode(" and then")]
    list(chat.say(" and then"))
    assert same(chat, ids)
    assert not same(chat, ids[:-1])


def test_going_on_is_one_long_reply(model):
    long = Chat(model, Sampling(max_new_tokens=12, temperature=0.0), raw=True)
    short = Chat(model, GREEDY, raw=True)
    replies = ["".join(short.say(text)) for text in ("Once", "")]
    assert "".join(replies) == "".join(long.say("Once"))


def test_questions_are_asked_in_the_trained_format(model):
    chat, encode = Chat(model, GREEDY), model.tokenizer.encode
    assert not chat.raw  # the World vocabulary
    reply = "".join(chat.say("Hello\r\n\r\nthere "))
    ids = [0, *encode("User: Hello\nthere\n\nAssistant:")]
    assert same(chat, ids)
    assert reply == reply.lstrip()
    transcript = model.tokenizer.decode(chat.unread)
    assert transcript.strip() == reply.strip() and transcript.endswith("\n\n")


def test_a_reply_ends_where_the_other_speaks(model, monkeypatch):
    script = model.tokenizer.encode(" Fine.\n\nUser: and I")
    monkeypatch.setattr("goose_mm.text.chat.decode", lambda *_: iter(script))
    chat = Chat(model, GREEDY)
    assert "".join(chat.say("How are you?")) == "Fine."
    assert model.tokenizer.decode(chat.unread) == " Fine.\n\n"


def test_what_may_begin_a_stop_is_not_lost(model, monkeypatch):
    script = model.tokenizer.encode(" Fine.\n\nUs")
    monkeypatch.setattr("goose_mm.text.chat.decode", lambda *_: iter(script))
    chat = Chat(model, GREEDY)
    assert "".join(chat.say("How are you?")) == "Fine.\n\nUs"
    assert model.tokenizer.decode(chat.unread) == " Fine.\n\nUs\n\n"


def test_a_reply_that_is_cut_off_leaves_a_usable_chat(model):
    chat = Chat(model, GREEDY, raw=True)
    reply = chat.say("Once")
    next(reply)
    reply.close()
    assert chat.unread
    assert list(chat.say(" more"))
