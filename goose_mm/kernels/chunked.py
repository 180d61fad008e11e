"""WKV-7 in chunks, in plain PyTorch: matrix products instead of a loop over tokens.

A token writes twice to the state, `v` under the key `k` and `u = -S kappa` under the key
`kappa * a`, and reads from it twice, `y` with `r` and `u` with `-kappa`. So a chunk of Q tokens is
linear attention with two entries per token. With `g` the running sum of `log_w` in the chunk,

    reads = [r exp(g); -kappa exp(g - log_w)]        keys = [k exp(-g); kappa a exp(-g)]
    [y; u] = reads S^T + scores [v; u]               scores = mask * (reads keys^T)
    S_next = (S + [v; u]^T keys) diag(exp(g_Q))

where y sees the writes of its own token and u only earlier ones, so that u solves a unit lower
triangular system. What does not depend on S is computed for all chunks of a span at once, and two
products per chunk remain serial. The backward pass transposes each line. It recomputes a span from
the state before it: besides inputs, outputs and gradients only these states, N / SPAN of one input
in float32, grow with T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from goose_mm.kernels.reference import reference, work_dtype

# B batch, T tokens, H heads, N head size, S states (B, or packed sequences), D directions
# in a span: C chunks of Q tokens, b rows, G = b * H, P = C * G; K states between spans

CHUNK = 16
SPAN = 128
TILE = 2**17  # elements of a tensor worked on at a time on CPU, if a single row has no more
LOWEST_LOG_W = -44 / CHUNK  # a product of two exp(44) still fits float32


def unavailable(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Why this kernel cannot run there: never, it is the one that runs everywhere."""
    return ""


def saved_states(tokens: int | torch.SymInt) -> int | torch.SymInt:
    """How many states between spans a backward pass over `tokens` may need."""
    return (tokens - 1) // SPAN


def forward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    offsets: list[int] | None,
    reverse: Sequence[bool],
    save: bool,
) -> tuple[Float[Tensor, "D B T H N"], Float[Tensor, "D S H N N"], Float[Tensor, "D K B H N N"]]:
    """y, the last states, and the states between spans (K = 0 unless `save`).

    `inputs` are r, log_w, k, v, kappa, a; there is one direction per entry of `reverse`.
    Raises ValueError for a decay this kernel cannot take.
    """
    r = inputs[0]
    B, T, H, N = r.shape
    D, S = len(reverse), B if offsets is None else len(offsets) - 1
    work = work_dtype(r.dtype)
    check_decay(inputs[1])
    y = r.new_empty(D, B, T, H, N)
    last = r.new_zeros(D, S, H, N, N, dtype=work) if state is None else state.to(work, copy=True)
    saved = r.new_empty(D, saved_states(T) if save else 0, B, H, N, N, dtype=work)
    masks = cache(partial(Masks.of, like=last))
    for d, backwards in enumerate(reverse):
        for states, spans in plan(r, offsets, backwards):
            current = last[d, states]
            for span in spans:
                if save and span.slot >= 0:
                    saved[d, span.slot, span.rows] = current
                if span.tokens == 1:  # quicker as the recurrence itself
                    token = [span.part(x).to(work) for x in inputs]
                    out, current = reference(*token, state=current)
                else:
                    tiles = [span.load(x, work) for x in inputs]
                    f = run(tiles, current, masks(span.chunk))
                    out = span.unload(outputs(f).view(tiles[0].shape))
                    current = f.states[-1].view_as(current)
                span.part(y[d]).copy_(out)
            last[d, states] = current
    return y, last, saved


def backward(
    inputs: Sequence[Float[Tensor, "B T H N"]],
    state: Float[Tensor, "D S H N N"] | None,
    offsets: list[int] | None,
    reverse: Sequence[bool],
    saved: Float[Tensor, "D K B H N N"],
    dy: Float[Tensor, "D B T H N"] | None,
    dlast: Float[Tensor, "D S H N N"] | None,
) -> tuple[list[Float[Tensor, "B T H N"]], Float[Tensor, "D S H N N"]]:
    """Gradients of the six inputs, each in its dtype, and of the initial states."""
    r = inputs[0]
    B, _, H, N = r.shape
    D, S = len(reverse), B if offsets is None else len(offsets) - 1
    work = work_dtype(r.dtype)
    grads = [x.new_empty(x.shape) for x in inputs]
    first = r.new_zeros(D, S, H, N, N, dtype=work) if dlast is None else dlast.to(work, copy=True)
    masks = cache(partial(Masks.of, like=first))
    for d, backwards in enumerate(reverse):
        for states, spans in plan(r, offsets, backwards):
            dstate = first[d, states]
            for span in reversed(spans):
                if span.slot >= 0:
                    before = saved[d, span.slot, span.rows]
                elif state is not None:
                    before = state[d, states].to(work)
                else:
                    before = torch.zeros_like(dstate)
                tiles = [span.load(x, work) for x in inputs]
                dout = torch.zeros_like(tiles[0]) if dy is None else span.load(dy[d], work)
                parts, dfirst = run_back(tiles, before, dout, dstate, masks(span.chunk))
                dstate = dfirst.view_as(dstate)
                for grad, part in zip(grads, parts, strict=True):
                    target, part = span.part(grad), span.unload(part)
                    target.copy_(part) if d == 0 else target.add_(part)
            first[d, states] = dstate
    return grads, first


def check_decay(log_w: Tensor) -> None:
    """Below LOWEST_LOG_W exp(-g) might overflow: an error, where silence would mean NaN.

    On CUDA a device-side assertion, since to read the value would be to wait for the device.
    """
    lowest = log_w.amin()
    if log_w.is_cuda:
        torch._assert_async(~(lowest < LOWEST_LOG_W), "wkv7: log_w too low for kernel 'chunked'")
    elif lowest < LOWEST_LOG_W:
        raise ValueError(
            f"log_w = {lowest.item():.4g} is below {LOWEST_LOG_W:.4g}, the lowest that kernel "
            "'chunked' takes (RWKV-7 itself stays above -0.607); use kernel='reference'"
        )


class Span(NamedTuple):
    """At most SPAN tokens of some rows of the batch, cut into chunks in the order of the scan."""

    rows: slice
    start: int
    stop: int
    reverse: bool
    slot: int  # of the state before it among the saved ones; negative: the scan begins here

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    @property
    def chunk(self) -> int:
        return min(CHUNK, self.tokens)

    def part(self, x: Float[Tensor, "B T H N"]) -> Float[Tensor, "b t H N"]:
        return x[self.rows, self.start : self.stop]

    def load(self, x: Float[Tensor, "B T H N"], dtype: torch.dtype) -> Float[Tensor, "C b H Q N"]:
        """Zeros fill up the last chunk: such a token leaves the state alone."""
        x = self.part(x).to(dtype)
        if self.reverse:
            x = x.flip(1)
        x = F.pad(x, (0, 0, 0, 0, 0, -self.tokens % self.chunk))
        return x.unflatten(1, (-1, self.chunk)).permute(1, 0, 3, 2, 4)

    def unload(self, x: Float[Tensor, "C b H Q N"]) -> Float[Tensor, "b t H N"]:
        x = x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, : self.tokens]
        return x.flip(1) if self.reverse else x


def plan(
    r: Float[Tensor, "B T H N"], offsets: list[int] | None, reverse: bool
) -> Iterator[tuple[slice, list[Span]]]:
    """All scans, each as the states it runs on and its spans.

    One scan is a packed sequence, or some rows of the batch: on CPU few, to stay in the caches.
    """
    B, T, H, N = r.shape
    if offsets is None:
        step = max(1, TILE // (min(T, SPAN) * H * N)) if r.device.type == "cpu" else B
        scans = [(slice(i, i + step), slice(i, i + step), 0, T) for i in range(0, B, step)]
    else:
        numbered = enumerate(pairwise(offsets))
        scans = [(slice(i, i + 1), slice(0, 1), start, stop) for i, (start, stop) in numbered]
    for states, rows, start, stop in scans:
        spans = []
        for first in range(start, stop, SPAN):
            last = min(first + SPAN, stop)
            tokens = (start + stop - last, start + stop - first) if reverse else (first, last)
            slot = first // SPAN - 1 if first > start else -1
            spans.append(Span(rows, *tokens, reverse, slot))
        yield states, spans


class Masks(NamedTuple):
    """Constant matrices of a chunk of Q tokens."""

    scores: Float[Tensor, "2*Q 2*Q"]  # rows y then u, columns v then u
    eye: Float[Tensor, "Q Q"]
    joins: list[Float[Tensor, "Q Q"]]  # for 1, 2, 4 ...: below each second diagonal block

    @staticmethod
    def of(chunk: int, like: Tensor) -> Masks:
        ones = like.new_ones(chunk, chunk)
        index = torch.arange(chunk, device=like.device)
        joins, block = [], 1
        while block < CHUNK:
            row, column = index[:, None] // block, index[None, :] // block
            joins.append(((row % 2 == 1) & (column == row - 1)).to(like.dtype))
            block *= 2
        scores = torch.cat([ones.tril(), ones.tril(-1)]).repeat(1, 2)
        return Masks(scores, torch.eye(chunk, dtype=like.dtype, device=like.device), joins)


def unit_lower_inverse(lower: Float[Tensor, "P Q Q"], masks: Masks) -> Float[Tensor, "P Q Q"]:
    """`(I - lower)^-1` for strictly lower triangular matrices, by substitution in blocks.

    Two inverted diagonal blocks are joined by `X21 = X22 lower21 X11`, for blocks of 1, 2, 4 ...
    No powers of `lower` are formed, as a Neumann series would: with nearly parallel keys those grow
    beyond any precision before they cancel.
    """
    inverse = torch.addcmul(masks.eye, lower, masks.joins[0])
    for join in masks.joins[1:]:
        inverse = torch.baddbmm(inverse, inverse @ (lower * join), inverse)
    return inverse


class Work(NamedTuple):
    """What a span has computed once its states are known."""

    growth: Float[Tensor, "P 2 Q N"]  # of the reads: exp(g), exp(g - log_w)
    shrink: Float[Tensor, "P 1 Q N"]  # of the keys: exp(-g)
    total: Float[Tensor, "P 1 N"]  # of the state: exp(g_Q)
    reads: Float[Tensor, "P 2*Q N"]
    keys: Float[Tensor, "P 2*Q N"]
    ends: Float[Tensor, "P 2*Q N"]  # keys as the end of the chunk sees them
    writes: Float[Tensor, "P 2*Q N"]  # v, u
    scores: Float[Tensor, "P 2*Q 2*Q"]
    inverse: Float[Tensor, "P Q Q"]
    states: Float[Tensor, "C+1 G N N"]  # before, between and after the chunks


def stack(first: Tensor, second: Tensor) -> Float[Tensor, "P 2 Q N"]:
    """Two tiles [C, b, H, Q, N] above each other."""
    return torch.stack([first, second], 3).flatten(0, 2)


def run(
    tiles: Sequence[Float[Tensor, "C b H Q N"]], state: Float[Tensor, "b H N N"], masks: Masks
) -> Work:
    """The scan over one span; `tiles` are r, log_w, k, v, kappa, a."""
    r, log_w, k, v, kappa, a = tiles
    C, Q, N = len(r), *r.shape[-2:]
    log_w = log_w.reshape(-1, Q, N)
    g = log_w.cumsum(1)
    growth = torch.stack([g, g - log_w], 1).exp_()
    shrink = growth[:, :1].reciprocal()
    total = growth[:, 0, -1:]
    reads = stack(r, -kappa).mul_(growth).flatten(1, 2)
    keys = stack(k, kappa * a).mul_(shrink).flatten(1, 2)
    ends = keys * total
    writes = stack(v, v).flatten(1, 2)

    scores = (reads @ keys.mT).mul_(masks.scores)
    inverse = unit_lower_inverse(scores[:, Q:, Q:], masks)
    removal = inverse @ reads[:, Q:]  # u = removal S^T + what the chunk itself wrote
    u = inverse @ (scores[:, Q:, :Q] @ writes[:, :Q])

    states = state.new_empty(C + 1, state.shape[:2].numel(), N, N)
    states[0] = state.flatten(0, 1)
    total_c, ends_c, writes_c, removal_c, u_c = (
        x.unflatten(0, (C, -1)) for x in (total, ends, writes, removal, u)
    )
    for c in range(C):
        writes_c[c, :, Q:] = u_c[c].baddbmm_(removal_c[c], states[c].mT)
        torch.mul(states[c], total_c[c], out=states[c + 1])
        states[c + 1].baddbmm_(writes_c[c].mT, ends_c[c])
    return Work(growth, shrink, total, reads, keys, ends, writes, scores, inverse, states)


def outputs(work: Work) -> Float[Tensor, "P Q N"]:
    """y of a span."""
    Q = work.inverse.shape[-1]
    before = work.states[:-1].flatten(0, 1)
    return (work.reads[:, :Q] @ before.mT).baddbmm_(work.scores[:, :Q], work.writes)


def run_back(
    tiles: Sequence[Float[Tensor, "C b H Q N"]],
    state: Float[Tensor, "b H N N"],
    dy: Float[Tensor, "C b H Q N"],
    dstate: Float[Tensor, "b H N N"],
    masks: Masks,
) -> tuple[list[Float[Tensor, "C b H Q N"]], Float[Tensor, "G N N"]]:
    """Gradients of a span's six tiles and of the state before it."""
    r, _, _, _, kappa, a = tiles
    C, Q = len(r), r.shape[-2]
    f = run(tiles, state, masks)

    douts = stack(dy, dy).flatten(1, 2)  # of y and of the right-hand side of u
    returned = f.inverse.mT @ f.ends[:, Q:]
    du = f.inverse.mT @ (f.scores[:, :Q, Q:].mT @ douts[:, :Q])
    dstates = torch.empty_like(f.states)
    dstates[C] = dstate.flatten(0, 1)
    total_c, reads_c, douts_c, returned_c, du_c = (
        x.unflatten(0, (C, -1)) for x in (f.total, f.reads, douts, returned, du)
    )
    for c in reversed(range(C)):
        douts_c[c, :, Q:] = du_c[c].baddbmm_(returned_c[c], dstates[c + 1].mT)
        torch.mul(dstates[c + 1], total_c[c], out=dstates[c])
        dstates[c].baddbmm_(douts_c[c].mT, reads_c[c])

    before, after, dafter = (x.flatten(0, 1) for x in (f.states[:-1], f.states[1:], dstates[1:]))
    dscores = (douts @ f.writes.mT).mul_(masks.scores)
    dreads = (douts @ before).baddbmm_(dscores, f.keys)
    dkeys = (f.writes @ dafter).mul_(f.total).baddbmm_(dscores.mT, f.reads)
    dv = (f.ends[:, :Q] @ dafter.mT).baddbmm_(f.scores[:, :, :Q].mT, douts)

    at_reads = (f.reads * dreads).unflatten(1, (2, Q))
    at_keys = (f.keys * dkeys).unflatten(1, (2, Q))
    dg = at_reads.sum(1).sub_(at_keys.sum(1))
    dg[:, -1] += (dafter * after).sum(1)
    dlog_w = dg.flip(1).cumsum(1).flip(1).sub_(at_reads[:, 1])

    dr, dminus = dreads.unflatten(1, (2, Q)).mul_(f.growth).unbind(1)
    dk, derase = dkeys.unflatten(1, (2, Q)).mul_(f.shrink).unbind(1)
    dr, dlog_w, dk, dv, dminus, derase = (
        x.unflatten(0, r.shape[:3]) for x in (dr, dlog_w, dk, dv, dminus, derase)
    )
    return [dr, dlog_w, dk, dv, a * derase - dminus, kappa * derase], dstates[0]
