"""The algebra of `chunked.py`, for one span of chunks and its gradients.

A token reads twice from the state, `y` with `r` and `f`, what is found, with `kappa`, and writes to
it twice, `v` under the key `k` and `-f` under the key `kappa * a`. So a chunk of Q tokens is linear
attention with two entries per token. With `g` the running sum of `log_w` in the chunk,

    reads = [r exp(g); kappa exp(g - log_w)]         keys = [k exp(-g); kappa a exp(-g)]
    [y; f] = reads S^T + scores [v; -f]              scores = mask * (reads keys^T)
    S_next = (S + [v; -f]^T keys) diag(exp(g_Q))

where y sees the writes of its own token and f only earlier ones, so that f solves a unit lower
triangular system. What does not depend on S is computed for all chunks of a span at once, and two
products per chunk remain serial. The backward pass transposes each line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from goose_mm.kernels.chunked.spans import CHUNK

# N head size; in a span: C chunks of Q tokens, b rows, H heads, G = b * H, P = C * G


class Masks(NamedTuple):
    """Constant matrices of a chunk of Q tokens."""

    scores: Float[Tensor, "2*Q 2*Q"]  # rows y then f, columns v then f
    eye: Float[Tensor, "Q Q"]
    joins: Float[Tensor, "n 1 Q Q"]  # for 1, 2, 4 ...: below each second diagonal block

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
        eye = torch.eye(chunk, dtype=like.dtype, device=like.device)
        return Masks(scores, eye, torch.stack(joins)[:, None])


def unit_lower_inverse(lower: Float[Tensor, "P Q Q"], masks: Masks) -> Float[Tensor, "P Q Q"]:
    """`(I + lower)^-1` for strictly lower triangular matrices, by substitution in blocks.

    Two inverted diagonal blocks are joined by `X21 = -X22 lower21 X11`, for blocks of 1, 2, 4 ...
    No powers of `lower` are formed, as a Neumann series would: with nearly parallel keys those grow
    beyond any precision before they cancel.
    """
    first, *others = (lower * masks.joins).unbind()
    inverse = masks.eye - first
    for below in others:
        inverse = torch.baddbmm(inverse, inverse @ below, inverse, alpha=-1)
    return inverse


class Work(NamedTuple):
    """Room for one span, used by all of them: on CPU fresh memory costs more than the products."""

    growth: Float[Tensor, "P Q N"]  # of the reads: exp(g)
    shrink: Float[Tensor, "P Q N"]  # of the keys: exp(-g)
    reads: Float[Tensor, "P 2 Q N"]
    keys: Float[Tensor, "P 2 Q N"]
    ends: Float[Tensor, "P 2 Q N"]  # keys as the end of the chunk sees them
    scores: Float[Tensor, "P 2*Q 2*Q"]
    inverse: Float[Tensor, "P Q Q"]
    removal: Float[Tensor, "P Q N"]
    v: Float[Tensor, "P Q N"]
    found: Float[Tensor, "P Q N"]
    states: Float[Tensor, "C+1 G N N"]  # before, between and after the chunks
    y: Float[Tensor, "P Q N"]

    @staticmethod
    def empty(C: int, G: int, Q: int, N: int, like: Tensor) -> Work:
        P = C * G
        one, pair, square = (P, Q, N), (P, 2, Q, N), (P, Q, Q)
        shapes = [one, one, pair, pair, pair, (P, 2 * Q, 2 * Q), square]
        shapes += [one, one, one, (C + 1, G, N, N), one]
        return Work(*map(like.new_empty, shapes))

    @property
    def total(self) -> Float[Tensor, "P 1 N"]:
        """How the state decays over a chunk: exp(g_Q)."""
        return self.growth[:, -1:]


def run(
    tiles: Sequence[Float[Tensor, "C b H Q N"]],
    state: Float[Tensor, "b H N N"],
    masks: Masks,
    f: Work,
) -> None:
    """The scan over one span, all of `f` but y; `tiles` are r, log_w, k, v, kappa, a."""
    r, log_w, k, v, kappa, a = tiles
    C, Q = len(r), r.shape[-2]
    grow, shrink = f.growth.view_as(r), f.shrink.view_as(r)
    read, find = (x.view_as(r) for x in f.reads.unbind(1))
    key, erase = (x.view_as(r) for x in f.keys.unbind(1))
    torch.cumsum(log_w, 3, out=grow).exp_()
    torch.reciprocal(grow, out=shrink)
    torch.mul(r, grow, out=read)
    find[..., 0, :] = kappa[..., 0, :]  # g - log_w is g of the token before
    torch.mul(kappa[..., 1:, :], grow[..., :-1, :], out=find[..., 1:, :])
    torch.mul(k, shrink, out=key)
    torch.mul(kappa, a, out=erase).mul_(shrink)
    torch.mul(f.keys, f.total[:, None], out=f.ends)
    f.v.view_as(v).copy_(v)

    torch.bmm(f.reads.flatten(1, 2), f.keys.flatten(1, 2).mT, out=f.scores).mul_(masks.scores)
    f.inverse.copy_(unit_lower_inverse(f.scores[:, Q:, Q:], masks))
    torch.bmm(
        f.inverse, f.reads[:, 1], out=f.removal
    )  # found = removal S^T + what the chunk itself
    written = torch.bmm(f.scores[:, Q:, :Q], f.v, out=f.y)  # (in borrowed room)
    torch.bmm(f.inverse, written, out=f.found)  # wrote before

    f.states[0] = state.flatten(0, 1)
    torch.bmm(f.v.mT, f.ends[:, 0], out=f.states[1:].flatten(0, 1))
    steps = by_chunk(C, f.total, f.removal, f.found, f.found.mT, f.ends[:, 1])
    states = f.states.unbind(), f.states.mT.unbind(), f.states[1:].unbind()
    for old, old_t, new, grow, removal, found, found_t, end in zip(*states, *steps, strict=False):
        found.baddbmm_(removal, old_t)
        new.addcmul_(old, grow).baddbmm_(found_t, end, alpha=-1)


def by_chunk(C: int, *tensors: Float[Tensor, "P ..."]) -> list[tuple[Tensor, ...]]:
    """The views [G, ...] of each tensor, one per chunk."""
    return [x.unflatten(0, (C, -1)).unbind() for x in tensors]


def outputs(f: Work) -> Float[Tensor, "P Q N"]:
    """y of a span that has run."""
    Q = f.inverse.shape[-1]
    torch.bmm(f.reads[:, 0], f.states[:-1].flatten(0, 1).mT, out=f.y)
    f.y.baddbmm_(f.scores[:, :Q, :Q], f.v)
    return f.y.baddbmm_(f.scores[:, :Q, Q:], f.found, alpha=-1)


class BackWork(NamedTuple):
    """Room for the gradients of a span."""

    dy: Float[Tensor, "P Q N"]
    dz: Float[Tensor, "P Q N"]  # of the right-hand side of the system that `found` solves
    returned: Float[Tensor, "P Q N"]
    douts: Float[Tensor, "P 2*Q N"]  # dy, dz
    writes: Float[Tensor, "P 2*Q N"]  # v, -found
    dscores: Float[Tensor, "P 2*Q 2*Q"]
    dreads: Float[Tensor, "P 2*Q N"]
    dkeys: Float[Tensor, "P 2*Q N"]
    dv: Float[Tensor, "P Q N"]
    at_reads: Float[Tensor, "P 2*Q N"]
    at_keys: Float[Tensor, "P 2*Q N"]
    dstates: Float[Tensor, "C+1 G N N"]

    @staticmethod
    def empty(C: int, G: int, Q: int, N: int, like: Tensor) -> BackWork:
        P = C * G
        one, pair = (P, Q, N), (P, 2 * Q, N)
        shapes = [one, one, one, pair, pair, (P, 2 * Q, 2 * Q), pair, pair, one, pair, pair]
        return BackWork(*map(like.new_empty, [*shapes, (C + 1, G, N, N)]))


def run_back(
    tiles: Sequence[Float[Tensor, "C b H Q N"]],
    state: Float[Tensor, "b H N N"],
    dy: Float[Tensor, "C b H Q N"],
    dstate: Float[Tensor, "b H N N"],
    masks: Masks,
    f: Work,
    b: BackWork,
) -> tuple[list[Float[Tensor, "C b H Q N"]], Float[Tensor, "G N N"]]:
    """Gradients of a span's six tiles and of the state before it."""
    r, _, _, _, kappa, a = tiles
    C, Q = len(r), r.shape[-2]
    run(tiles, state, masks, f)
    b.dy.view_as(dy).copy_(dy)

    torch.bmm(f.inverse.mT, f.ends[:, 1], out=b.returned)
    torch.bmm(f.inverse.mT, f.scores[:, :Q, Q:].mT @ b.dy, out=b.dz)
    b.dstates[C] = dstate.flatten(0, 1)
    torch.bmm(b.dy.mT, f.reads[:, 0], out=b.dstates[:C].flatten(0, 1))
    steps = zip(
        b.dstates[:-1],
        b.dstates[1:],
        *by_chunk(C, f.total, b.returned, b.dz, f.reads[:, 1]),
        strict=True,
    )
    for before, after, grow, returned, dz, read in reversed(list(steps)):
        dz.baddbmm_(returned, after.mT, beta=-1, alpha=-1)
        before.addcmul_(after, grow).baddbmm_(dz.mT, read)

    torch.cat([b.dy, b.dz], 1, out=b.douts)
    torch.cat([f.v, f.found], 1, out=b.writes)[:, Q:].neg_()
    reads, keys = f.reads.flatten(1, 2), f.keys.flatten(1, 2)
    before, after, dafter = (x.flatten(0, 1) for x in (f.states[:-1], f.states[1:], b.dstates[1:]))
    torch.bmm(b.douts, b.writes.mT, out=b.dscores).mul_(masks.scores)
    torch.bmm(b.douts, before, out=b.dreads).baddbmm_(b.dscores, keys)
    torch.bmm(b.writes, dafter, out=b.dkeys).mul_(f.total).baddbmm_(b.dscores.mT, reads)
    torch.bmm(f.ends[:, 0], dafter.mT, out=b.dv).baddbmm_(f.scores[:, :, :Q].mT, b.douts)

    at_reads = torch.mul(reads, b.dreads, out=b.at_reads).unflatten(1, (2, Q))
    at_keys = torch.mul(keys, b.dkeys, out=b.at_keys).unflatten(1, (2, Q))
    dg = at_reads.sum(1).sub_(at_keys.sum(1))
    dg[:, -1] += torch.einsum("pvk,pvk->pk", dafter, after)
    dlog_w = dg.flip(1).cumsum(1).flip(1).sub_(at_reads[:, 1])

    dr, dfind = b.dreads.unflatten(1, (2, Q)).unbind(1)
    dr.mul_(f.growth)
    dfind[:, 1:].mul_(f.growth[:, :-1])
    dk, derase = b.dkeys.unflatten(1, (2, Q)).mul_(f.shrink[:, None]).unbind(1)
    dr, dlog_w, dk, dv, dfind, derase = (
        x.unflatten(0, r.shape[:3]) for x in (dr, dlog_w, dk, b.dv, dfind, derase)
    )
    return [dr, dlog_w, dk, dv, dfind.addcmul_(derase, a), derase * kappa], b.dstates[0]
