"""Gradients of the inputs of WKV-7, all chunks at once, as a Triton program.

Each line is the transpose of one in `chunk.py`, given S0 before a chunk and P after it. With
`dZ` the gradient of the right-hand side of the system that X solves,

    dZ = X^T E P^T + (re X)^T dY         dV = K P^T + XU^T E P^T + XY^T dY
    dre, drk, dae, dak = dY U^T, dY V^T, dZ U^T, dZ V^T                     below the diagonal
    dR = dY S0 + dre E + drk K           dA = dZ S0 + dae E + dak K
    dK = V P + drk^T R + dak^T A         dE = U P + dre^T R + dae^T A
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from goose_mm.kernels.triton.chunk import (
    SIZES,
    dot,
    exp,
    matrix,
    owned,
    places,
    powers,
    read,
    running,
    size_of_chunk,
    square,
    tile,
    total,
)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def gradients(
    r,
    log_w,
    k,
    v,
    kappa,
    a,
    chunks,
    decays,
    cu_seqlens,
    owner,
    state,
    saved,
    dsaved,
    scales,
    dy,
    dr,
    dlog_w,
    dk,
    dv,
    dkappa,
    da,
    T,
    H,
    rows,
    slots,
    sequences,
    N: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Gradients in one chunk. Grid: slots * H, rows, directions.

    dY and P, and what is made of them, are divided by a power of two until they are stored.
    """
    TYPE: tl.constexpr = chunks.dtype.element_ty
    head = tl.program_id(0) % H
    d = tl.program_id(2).to(tl.int64)
    s, row, first, length, chunk, slot = owned(cu_seqlens, owner, T, H, Q)
    if chunk * Q < length:
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        at += tl.arange(0, N)[None, :]
        of = d * rows * T * H * N + at
        slot = ((d * slots + slot) * rows + row) * H + head
        before = (d * ((T - 1) // Q + 2) + (first + chunk * Q) // Q - 1) * rows + row
        made = chunks + slot * size_of_chunk(N, Q)
        keys = tl.arange(0, N)

        P = tl.load(dsaved + slot * N * N + matrix(N, N))
        scale = tl.load(scales + slot * N + keys)
        dY = read(dy, of, inside)
        found = read(kappa, at, inside)
        rate = read(a, at, inside)
        R = read(r, at, inside)
        K = read(k, at, inside)
        # undefined outside until `where`: with zeros from the start their layouts would change here
        V = tl.load(v + at, mask=inside)
        decay = tl.load(log_w + at, mask=inside)
        W = tl.load(tile(made, 0, N, Q))
        XU = tl.load(square(made, 0, N, Q))
        # transposed: to load them so, and one of them twice, is less than to exchange them later
        XU_t = tl.load(tl.trans(square(made, 0, N, Q)))
        XY_t = tl.load(tl.trans(square(made, 1, N, Q)))
        X_t = tl.load(tl.trans(square(made, 2, N, Q)))
        reX_t = tl.load(tl.trans(square(made, 3, N, Q)))
        S0 = tl.load(saved + (before * H + head) * N * N + matrix(N, N), mask=chunk > 0, other=0.0)

        if state is not None and chunk == 0:
            start = tl.load(state + ((d * sequences + s) * H + head) * N * N + matrix(N, N))
            S0 = (start * tl.load(decays + slot * N + keys)[None, :]).to(TYPE)
        up, down = powers(tl.max(scale))
        P *= (scale * down).to(TYPE)[:, None]
        dY = (dY.to(tl.float32) * down).to(TYPE)
        V = tl.where(inside, V, 0.0).to(TYPE)
        decay = tl.where(inside, decay, 0.0).to(tl.float32)
        found, rate = found.to(tl.float32), rate.to(tl.float32)
        g = running(decay, Q, tl.float32 if log_w.dtype.element_ty == tl.float32 else tl.float16)
        grow = exp(g)
        shrink = exp(-g)
        removal = exp(g - decay)
        R = (R.to(tl.float32) * grow).to(TYPE)
        A = (found * -removal).to(TYPE)
        K = (K.to(tl.float32) * shrink).to(TYPE)
        E = (found * shrink * rate).to(TYPE)

        U = (dot(W, tl.trans(S0), TYPE) + dot(XU, V, TYPE)).to(TYPE)
        dU = dot(E, tl.trans(P), TYPE).to(TYPE)  # from the state alone
        dZ = (dot(X_t, dU, TYPE) + dot(reX_t, dY, TYPE)).to(TYPE)
        dV = dot(K, tl.trans(P), TYPE) + dot(XU_t, dU, TYPE) + dot(XY_t, dY, TYPE)
        tl.store(dv + of, dV * up, mask=inside)

        i = tl.arange(0, Q)[:, None]
        j = tl.arange(0, Q)[None, :]
        dre = tl.where(i >= j, dot(dY, tl.trans(U), TYPE), 0.0).to(TYPE)
        drk = tl.where(i >= j, dot(dY, tl.trans(V), TYPE), 0.0).to(TYPE)
        dae = tl.where(i > j, dot(dZ, tl.trans(U), TYPE), 0.0).to(TYPE)
        dak = tl.where(i > j, dot(dZ, tl.trans(V), TYPE), 0.0).to(TYPE)
        dK = dot(V, P, TYPE)
        dE = dot(U, P, TYPE)
        kept = K * dK + E * dE
        dK += dot(tl.trans(drk), R, TYPE) + dot(tl.trans(dak), A, TYPE)
        dE += dot(tl.trans(dre), R, TYPE) + dot(tl.trans(dae), A, TYPE)
        dR = dot(dY, S0, TYPE) + dot(dre, E, TYPE) + dot(drk, K, TYPE)
        dA = dot(dZ, S0, TYPE) + dot(dae, E, TYPE) + dot(dak, K, TYPE)

        own = R * dR - K * dK - E * dE
        dg = own + total(tl.where(i < j, 1.0, 0.0), own + A * dA)  # by this token and later ones
        dg += tl.sum(kept, 0)[None, :]  # by the state's end
        dg += dot(tl.full([Q, N], 2.0, TYPE), S0 * (P * 0.5), TYPE)  # P is below 2: this fits
        tl.store(dlog_w + of, dg * up, mask=inside)
        tl.store(dr + of, dR * grow * up, mask=inside)
        shrink *= up
        tl.store(dk + of, dK * shrink, mask=inside)
        dE *= shrink
        tl.store(dkappa + of, rate * dE - dA * removal * up, mask=inside)
        tl.store(da + of, found * dE, mask=inside)
