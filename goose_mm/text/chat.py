"""A conversation that goes on: the state is kept, so a turn reads only what is new."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from goose_mm.backbone import State
from goose_mm.text.generate import Sampling, Writer, decode, need_tokenizer, prefill
from goose_mm.text.model import RWKV7LM

QUESTION = "User: {}\n\nAssistant:"  # the format of the released G1 models, no space at the end
NEXT_TURN = "\n\n"


class Chat:
    """Talk with a model, or write on together with it.

    `raw=True` continues the text as it stands, the text of every turn appended to it; otherwise
    turns are questions in the User/Assistant format. By default World-vocabulary checkpoints,
    which are trained on that format, are talked with, and all others write on.
    """

    def __init__(self, model: RWKV7LM, sampling: Sampling, raw: bool | None = None) -> None:
        self.model, self.tokenizer = model, need_tokenizer(model)
        self.raw = model.config.text.tokenizer != "world" if raw is None else raw
        stop = sampling.stop if self.raw else (*sampling.stop, NEXT_TURN + "User:")
        self.sampling = replace(sampling, stop=stop)
        self.state: State | None = None
        self.unread = [self.tokenizer.bos_id]  # part of the text, not yet of the state

    def say(self, text: str) -> Iterator[str]:
        """Add a turn; yield the reply piece by piece. Without text (raw) the model just goes on."""
        prompt = text if self.raw else QUESTION.format(_without_blank_lines(text))
        ids = self.unread + self.tokenizer.encode(prompt)
        logits, state = prefill(self.model, [ids], self.state)
        self.state = state
        writer, written, reply = Writer(self.tokenizer, self.sampling.stop), [], ""

        def pieces() -> Iterator[str]:
            for token in decode(self.model, logits, state, self.sampling):
                written.append(int(token))
                yield writer.push(written[-1])
                if writer.done:
                    return
            yield writer.finish()

        try:
            for piece in pieces():
                shown = piece if self.raw or reply.strip() else piece.lstrip()
                reply += piece
                if shown:
                    yield shown
        finally:  # also when the listener walks away in the middle
            encode = self.tokenizer.encode
            self.unread = written if self.raw else encode(reply.rstrip() + NEXT_TURN)


def _without_blank_lines(text: str) -> str:
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()
