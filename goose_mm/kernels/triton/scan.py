"""The WKV-7 recurrence, forward and backward, as Triton programs: `chunk.py` says what of.

`prepare` works on all chunks at once. Then one program walks over the chunks of a sequence, head,
direction and block of values (rows of the state): `scan` forward, `scan_back` backward.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from goose_mm.kernels.triton.chunk import (
    SIZES,
    dot,
    exp,
    inverse,
    matrix,
    owned,
    places,
    powers,
    read,
    row_of,
    running,
    sequence,
    size_of_chunk,
    square,
    tile,
)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def prepare(
    r,
    log_w,
    k,
    kappa,
    a,
    cu_seqlens,
    owner,
    chunks,
    decays,
    fits,
    T,
    H,
    rows,
    slots,
    LOWEST: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
    BACK: tl.constexpr,
):
    """One chunk as the scans want it, and exp(h); 0 in `fits` if a decay is below LOWEST.

    Grid: slots * H, rows, directions. `triton.prepared` says which chunk lies in which slot, and
    `owner` the sequence of a slot.
    """
    TYPE: tl.constexpr = chunks.dtype.element_ty
    head = tl.program_id(0) % H
    d = tl.program_id(2).to(tl.int64)
    _, row, first, length, chunk, slot = owned(cu_seqlens, owner, T, H, Q)
    if chunk * Q < length:
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        at += tl.arange(0, N)[None, :]
        R = read(r, at, inside)
        K = read(k, at, inside)
        rate = read(a, at, inside)
        found = read(kappa, at, inside).to(tl.float32)
        decay = read(log_w, at, inside).to(tl.float32)
        if tl.min(decay) < LOWEST:
            tl.store(fits, 0)
        g = running(decay, Q, tl.float32 if log_w.dtype.element_ty == tl.float32 else tl.float16)
        grow = exp(g)
        shrink = exp(-g)
        R = (R.to(tl.float32) * grow).to(TYPE)
        A = (found * -exp(g - decay)).to(TYPE)
        K = (K.to(tl.float32) * shrink).to(TYPE)
        E = (found * shrink * rate.to(tl.float32)).to(TYPE)

        i = tl.arange(0, Q)[:, None]
        j = tl.arange(0, Q)[None, :]
        ae_t = tl.where(i < j, dot(E, tl.trans(A), TYPE), 0.0)
        ak_t = tl.where(i < j, dot(K, tl.trans(A), TYPE), 0.0)
        re = tl.where(i >= j, dot(R, tl.trans(E), TYPE), 0.0)
        rk = tl.where(i >= j, dot(R, tl.trans(K), TYPE), 0.0)
        X, X_t = inverse(ae_t, Q, TYPE)
        reX = dot(re, tl.trans(X_t), TYPE)

        slot = ((d * slots + slot) * rows + row) * H + head
        to = chunks + slot * size_of_chunk(N, Q)
        tl.store(tile(to, 0, N, Q), dot(X, A, TYPE).to(TYPE))
        tl.store(tile(to, 1, N, Q), (R + dot(reX, A, TYPE)).to(TYPE))
        tl.store(tile(to, 2, N, Q), E)
        tl.store(square(to, 0, N, Q), dot(X, tl.trans(ak_t), TYPE).to(TYPE))
        tl.store(square(to, 1, N, Q), (rk + dot(reX, tl.trans(ak_t), TYPE)).to(TYPE))
        if BACK:
            tl.store(square(to, 2, N, Q), X.to(TYPE))
            tl.store(square(to, 3, N, Q), reX.to(TYPE))
        else:
            tl.store(tile(to, 3, N, Q), K)
        tl.store(decays + slot * N + tl.arange(0, N), row_of(grow, Q - 1, Q))


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def scan(
    v,
    chunks,
    decays,
    cu_seqlens,
    y,
    state,
    saved,
    T,
    H,
    rows,
    slots,
    N: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y, and `state` from the first to the last; with SAVE S0 of each chunk but the first.

    Grid: sequences * H * N / M, directions.
    """
    TYPE: tl.constexpr = chunks.dtype.element_ty
    block = tl.program_id(0) % (N // M) * M
    program = tl.program_id(0) // (N // M)
    s = (program // H).to(tl.int64)
    head = program % H
    d = tl.program_id(1).to(tl.int64)
    row, first, length = sequence(s, cu_seqlens, T)
    values = block + tl.arange(0, M)[None, :]
    keys = tl.arange(0, N)
    part = block * N + matrix(M, N)
    here = state + (d * tl.num_programs(0) * M // N + program) * N * N + part
    S = tl.load(here)  # from the second chunk on: before the decay that ends a chunk
    ended = tl.full([N], 1.0, tl.float32)
    y += d * rows * T * H * N
    for chunk in tl.range(0, tl.cdiv(length, Q), num_stages=STAGES):
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        slot = ((d * slots + first // Q + chunk + s - row) * rows + row) * H + head
        of = chunks + slot * size_of_chunk(N, Q)
        decay = tl.load(decays + slot * N + keys)
        S *= (ended * decay)[None, :]
        ended = decay
        S0 = S.to(TYPE)
        if SAVE:
            before = (d * ((T - 1) // Q + 2) + (first + chunk * Q) // Q - 1) * rows + row
            tl.store(saved + (before * H + head) * N * N + part, S0, mask=chunk > 0)
        V = tl.trans(tl.load(v + at + values, mask=inside, other=0.0))
        F = tl.load(tile(of, 1, N, Q))
        XY = tl.load(square(of, 1, N, Q))
        Y = dot(S0, tl.trans(F), TYPE) + dot(V, tl.trans(XY), TYPE)
        tl.store(y + at + values, tl.trans(Y), mask=inside)
        W = tl.load(tile(of, 0, N, Q))
        XU = tl.load(square(of, 0, N, Q))
        U = dot(S0, tl.trans(W), TYPE) + dot(V, tl.trans(XU), TYPE)
        K = tl.load(tile(of, 3, N, Q))
        S += dot(V, K, TYPE)
        E = tl.load(tile(of, 2, N, Q))
        S += dot(U, E, TYPE)
    tl.store(here, S * ended[None, :])


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def scan_back(
    dy,
    chunks,
    decays,
    cu_seqlens,
    dstate,
    dsaved,
    scales,
    T,
    H,
    rows,
    slots,
    N: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """`dstate` from the gradient of the last state to that of the first; P of each chunk.

    Gradients may be too small or too large for float16: a row of P and of dY^T is divided by a
    power of two, which goes to `scales`, so that none of its numbers is larger than 2.
    Grid: sequences * H * N / M, directions.
    """
    TYPE: tl.constexpr = chunks.dtype.element_ty
    block = tl.program_id(0) % (N // M) * M
    program = tl.program_id(0) // (N // M)
    s = (program // H).to(tl.int64)
    head = program % H
    d = tl.program_id(1).to(tl.int64)
    row, first, length = sequence(s, cu_seqlens, T)
    values = block + tl.arange(0, M)
    keys = tl.arange(0, N)
    part = block * N + matrix(M, N)
    here = dstate + (d * tl.num_programs(0) * M // N + program) * N * N + part
    G = tl.load(here)  # before the decay, as S above; divided by `scale`
    ended = tl.full([N], 1.0, tl.float32)
    scale = tl.full([M], 1.0, tl.float32)
    dy += d * rows * T * H * N
    count = tl.cdiv(length, Q)
    for back in tl.range(0, count, num_stages=STAGES):
        chunk = count - 1 - back
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        slot = ((d * slots + first // Q + chunk + s - row) * rows + row) * H + head
        of = chunks + slot * size_of_chunk(N, Q)
        dY = tl.trans(tl.load(dy + at + values[None, :], mask=inside, other=0.0)).to(tl.float32)
        decay = tl.load(decays + slot * N + keys)
        G *= (ended * decay)[None, :]
        ended = decay
        largest = tl.maximum(tl.max(tl.abs(G), 1) * scale, tl.max(tl.abs(dY), 1))
        old = scale
        scale, down = powers(largest)
        G *= (old * down)[:, None]
        P = G.to(TYPE)
        tl.store(dsaved + slot * N * N + part, P)
        tl.store(scales + slot * N + values, scale)
        F = tl.load(tile(of, 1, N, Q))
        G += dot(dY * down[:, None], F, TYPE)
        E = tl.load(tile(of, 2, N, Q))
        W = tl.load(tile(of, 0, N, Q))
        G += dot(dot(P, tl.trans(E), TYPE), W, TYPE)
    tl.store(here, G * scale[:, None] * ended[None, :])
