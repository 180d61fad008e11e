"""From logits to text: batched generation, stop strings, streaming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from goose_mm.backbone import State
from goose_mm.text.decoding import LanguageModel, decode, pad, prefill
from goose_mm.text.sampling import Sampler, Sampling
from goose_mm.text.tokenizer import Tokenizer

__all__ = [
    "LanguageModel",
    "Sampler",
    "Sampling",
    "Writer",
    "complete",
    "decode",
    "encode_prompt",
    "need_tokenizer",
    "pad",
    "prefill",
    "stream_text",
    "write",
]


class Writer:
    """Turns one row's tokens into text: whole characters, cut before the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self.decoder = tokenizer.stream_decoder()
        self.eos_id, self.stop = tokenizer.eos_id, stop
        self.pending = ""  # may be the beginning of a stop string
        self.done = False

    def push(self, token: int) -> str:
        """Text that is certain after this token."""
        if self.done:
            return ""
        if token == self.eos_id:
            return self.finish()
        self.pending += self.decoder.push(token)
        found = [i for i in (self.pending.find(s) for s in self.stop) if i >= 0]
        if found:
            self.done = True
            return self.pending[: min(found)]
        held = max((_overlap(self.pending, s) for s in self.stop), default=0)
        text = self.pending[: len(self.pending) - held]
        self.pending = self.pending[len(text) :]
        return text

    def finish(self) -> str:
        """The rest, once no more tokens come."""
        if self.done:
            return ""
        self.done = True
        return self.pending + self.decoder.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(stop), len(text)), 0, -1) if stop.startswith(text[-n:])), 0
    )


def write(
    model: LanguageModel, tokenizer: Tokenizer, logits: Tensor, state: State, sampling: Sampling
) -> Iterator[list[str]]:
    """Decode a batch; yield the new text of every row after each token, until all are done."""
    writers = [Writer(tokenizer, sampling.stop) for _ in range(len(logits))]
    for tokens in decode(model, logits, state, sampling):
        yield [writer.push(token) for writer, token in zip(writers, tokens.tolist(), strict=True)]
        if all(writer.done for writer in writers):
            return
    yield [writer.finish() for writer in writers]


def need_tokenizer(model: LanguageModel) -> Tokenizer:
    """ValueError says why there is none, if `goose_mm.load` found out."""
    if model.tokenizer is None:
        reason = getattr(model, "no_tokenizer", "") or "set model.tokenizer, or load a folder"
        raise ValueError(f"this model has no tokenizer: {reason}")
    return model.tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A document starts after the end-of-text token: it stands before every prompt."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def complete(model: LanguageModel, prompts: Sequence[str], sampling: Sampling) -> list[str]:
    """Continuations of a batch of prompts."""
    tokenizer = need_tokenizer(model)
    logits, state = prefill(model, [encode_prompt(tokenizer, p) for p in prompts])
    pieces = zip(*write(model, tokenizer, logits, state, sampling), strict=True)
    return ["".join(row) for row in pieces]


def stream_text(model: LanguageModel, prompt: str, sampling: Sampling) -> Iterator[str]:
    """The continuation of one prompt as it is written."""
    tokenizer = need_tokenizer(model)
    logits, state = prefill(model, [encode_prompt(tokenizer, prompt)])
    for (piece,) in write(model, tokenizer, logits, state, sampling):
        if piece:
            yield piece
