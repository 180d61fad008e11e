"""Reading prompts and writing tokens, many rows at once.

A prompt is read in pieces of a fixed number of tokens, so memory does not grow with its length.
Then a step takes every row one token on and changes its memory in place. On an NVIDIA GPU a step
is a CUDA graph, one for each width of a batch, whose rows have their memory in slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from goose_mm.backbone import RWKV7, State
from goose_mm.backbone.layout import lay_out, plain
from goose_mm.kernels import step as definition
from goose_mm.kernels.cuda import step as cuda
from goose_mm.text.sampling import Sampler, Sampling
from goose_mm.text.tokenizer import Tokenizer

PIECE = 2**16  # tokens of all rows that are read at once
AHEAD = 2  # steps that a GPU may be ahead of what the host has seen

Steps = Callable[[Tensor], Tensor]  # tokens [B] -> logits [B,V] after them


class LanguageModel(nn.Module):
    """What is asked of a model that writes: `RWKV7LM` is one."""

    tokenizer: Tokenizer | None
    emb: nn.Embedding
    backbone: RWKV7
    head: nn.Linear


@torch.no_grad()
def prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: State | None = None
) -> tuple[Float[Tensor, "B V"], State]:
    """Read prompts of mixed lengths at once; logits after the last token of each, and states."""
    ids, mask = pad(prompts, model.emb.weight.device)
    last = mask.sum(1) - 1
    found = model.emb.weight.new_empty(len(ids), model.emb.weight.shape[1])
    size = max(16, PIECE // len(ids) // 16 * 16)
    for start in range(0, ids.shape[1], size):
        here = slice(start, start + size)
        real = mask[:, here]
        hidden, state = model.backbone(
            model.emb(ids[:, here]), state, mask=None if real.all() else real
        )
        ends = (last >= start) & (last < start + size)
        rows = ends.nonzero().squeeze(1)
        found[rows] = hidden[rows, last[rows] - start]
    assert state is not None
    return model.head(found), state


def pad(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Right-pad token lists: ids [B,T] and mask [B,T], True where a token is real."""
    if not rows or not all(len(row) for row in rows):
        raise ValueError("every prompt needs at least one token")
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate([np.asarray(row) for row in rows])
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def decode(
    model: LanguageModel, logits: Float[Tensor, "B V"], state: State, sampling: Sampling
) -> Iterator[Int[Tensor, "B"]]:
    """Yield the next token of every row, on the host, `max_new_tokens` times.

    The caller's state is kept. A GPU works ahead of what is taken from here.
    """
    sampler = Sampler(sampling, len(logits))
    ahead = AHEAD if logits.is_cuda else 0
    waiting: deque[Arrival] = deque()
    with stepping(model, state) as step:
        token = sampler(logits)
        waiting.append(Arrival.of(token))
        for _ in range(sampling.max_new_tokens - 1):
            if len(waiting) > ahead:
                yield waiting.popleft().take()
            token = sampler(step(token))
            waiting.append(Arrival.of(token))
    while waiting:
        yield waiting.popleft().take()


class Arrival(NamedTuple):
    """Numbers on their way from a device to the host."""

    values: Tensor
    event: Any

    @classmethod
    def of(cls, values: Tensor) -> Arrival:
        if not values.is_cuda:
            return cls(values, None)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(host, event)

    def take(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.values


def stepping(model: LanguageModel, state: State) -> AbstractContextManager[Steps]:
    """A function that takes rows one token on from `state`, which stays as it is."""
    if model.training or not plain(model.emb, model.backbone, model.head):
        return nullcontext(one_by_one(model, state))
    decoder = DECODERS.get(model)
    if decoder is None or not decoder.current(model):
        decoder = DECODERS[model] = Decoder(model)
    return decoder.rows(state)


def one_by_one(model: LanguageModel, state: State) -> Steps:
    """Steps through the modules of a model, for one that others have changed."""

    @torch.no_grad()
    def step(tokens: Tensor) -> Tensor:
        nonlocal state
        logits, state = model(tokens[:, None], state)
        return logits[:, -1]

    return step


class Graph(NamedTuple):
    """A step of some width, captured: what goes in, and where the logits come out."""

    tokens: Int[Tensor, " W"]
    slots: Int[Tensor, " W"]
    logits: Float[Tensor, "W V"]
    graph: Any
    step: cuda.Step  # whose buffers the graph uses


class Decoder:
    """Steps of one model. On the kernels' devices its rows share one memory, slot by slot."""

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.backbone.config
        self.weights = lay_out(model.emb, model.backbone, model.head)
        self.places = places(model)
        self.device, self.dtype = model.emb.weight.device, model.emb.weight.dtype
        self.in_slots = not cuda.unavailable(self.device, self.weights)
        self.memory = State.zeros(self.config, 0, self.device, self.dtype)
        self.free: list[int] = []
        self.graphs: dict[int, Graph] = {}
        self.lock = RLock()

    def current(self, model: LanguageModel) -> bool:
        """Whether the model's numbers still lie where they did."""
        return self.places == places(model)

    @contextmanager
    def rows(self, state: State) -> Iterator[Steps]:
        """Steps of some rows; their memory is given back in the end."""
        if not self.in_slots:
            moving = state.clone()
            yield torch.no_grad()(lambda tokens: definition.step(tokens, self.weights, *moving))
            return
        count = state.wkv.shape[1]
        with self.lock:
            taken = self.take(count)
            places = torch.tensor(taken, device=self.device)
            for all_rows, mine in zip(self.memory, state, strict=True):
                all_rows[:, places] = mine.to(all_rows.dtype)
        padded = torch.full((padded_width(count),), -1, dtype=torch.int32, device=self.device)
        padded[:count] = places
        try:
            yield lambda tokens: self.step(tokens, padded)
        finally:
            with self.lock:
                self.free += taken

    def take(self, count: int) -> list[int]:
        """Slots that nobody uses; where there are too few, all move to a larger memory."""
        held = self.memory.wkv.shape[1]
        if count > len(self.free):
            size = max(2 * held, held + count)
            larger = State.zeros(self.config, size, self.device, self.dtype)
            for new, old in zip(larger, self.memory, strict=True):
                new[:, :held] = old
            self.memory = larger
            self.free += range(held, size)
            self.graphs.clear()  # they know where the smaller one was
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def step(self, tokens: Int[Tensor, " B"], slots: Int[Tensor, " W"]) -> Float[Tensor, "B V"]:
        """Logits that are good until the next step, of whomever."""
        with self.lock:
            width = len(slots)
            if width not in self.graphs:
                self.graphs[width] = self.capture(width)
            graph = self.graphs[width]
            graph.tokens[: len(tokens)] = tokens
            graph.slots.copy_(slots)
            graph.graph.replay()
            return graph.logits[: len(tokens)]

    @torch.no_grad()
    def capture(self, width: int) -> Graph:
        tokens = torch.zeros(width, dtype=torch.long, device=self.device)
        slots = torch.full((width,), -1, dtype=torch.int32, device=self.device)
        step = cuda.Step(self.weights, width)
        step(tokens, slots, *self.memory)  # compiles; rows of padding change nothing
        torch.cuda.current_stream(self.device).synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = step(tokens, slots, *self.memory)
        return Graph(tokens, slots, logits, graph, step)


DECODERS: WeakKeyDictionary[LanguageModel, Decoder] = WeakKeyDictionary()


def places(model: LanguageModel) -> tuple[int, ...]:
    parts = (model.emb, model.backbone, model.head)
    return tuple(p.data_ptr() for part in parts for p in part.parameters())


def padded_width(rows: int) -> int:
    """The next power of two, but of more than 64 rows a multiple of 64."""
    return 1 << (rows - 1).bit_length() if rows <= 64 else -(-rows // 64) * 64
