"""WKV-7 in chunks, as Triton programs: the device side of `triton.py`. Imports triton.

The algebra is that of `chunked.py`: with `g` the running sum of `log_w` in a chunk of Q tokens,

    R = r exp(g - h)    A = -kappa exp(g - log_w - h)       read the state, for y and for u
    K = k exp(h - g)    E = kappa a exp(h - g)              write to it, v and u

where `h` is half of the chunk's whole decay, so that no factor is larger than exp(|h|), and the
state is multiplied by exp(h) once before the chunk and once after it:

    U = X (A S^T + ak V)      X = (I - ae)^-1; ak, ae: A K^T and A E^T below the diagonal
    Y = R S^T + re U + rk V   re, rk: R E^T and R K^T with the diagonal
    S <- S + U^T E + V^T K

Every X is computed first, all chunks at once, by substitution in float32. Then one program walks
over the chunks of a sequence, head, direction and block of values (rows of the state). Backwards
one such walk finds the gradient of the states, and the rest is again done for all chunks at once.
No product has 64 rows: those would run on Hopper's wgmma, which Triton 3.4 to 3.7 miscompiles in
kernels like these (fla-org/flash-linear-attention#826, #984, #988).
"""

from __future__ import annotations

from typing import no_type_check  # Triton reads the bare functions: tests may not wrap them

import triton
import triton.language as tl

SIZES = ("T", "H", "rows", "slots", "sequences")  # rows of the batch; slots for chunks, per row

# tiles are [Q, N], tokens in the order of the scan; states [value, key], or a block of M values


@triton.jit
@no_type_check
def tf32(x):
    """`x` rounded to the 11 bits of a tf32 product, which would otherwise cut the rest off."""
    big = x * 8193.0
    return big - (big - x)


@triton.jit
@no_type_check
def dot(x, y, EXACT: tl.constexpr):
    """x @ y, to the accuracy of float32 or of tf32."""
    if EXACT:
        return tl.dot(x, y, input_precision="tf32x3")
    else:
        return tl.dot(tf32(x), tf32(y), input_precision="tf32")


@triton.jit
@no_type_check
def sequence(s, cu_seqlens, T):
    """Where sequence `s` lies: its row of the batch, first token and length."""
    row = s
    first = s * 0
    length = first + T
    if cu_seqlens is not None:
        row = s * 0
        first = tl.load(cu_seqlens + s).to(tl.int64)
        length = tl.load(cu_seqlens + s + 1).to(tl.int64) - first
    return row, first, length


@triton.jit
@no_type_check
def owned(cu_seqlens, owner, T, H, rows, Q: tl.constexpr):
    """The chunk of a program in a grid of slots * rows * H: its sequence, number and slot."""
    slot = (tl.program_id(0) // (rows * H)).to(tl.int64)
    s = ((tl.program_id(0) // H) % rows).to(tl.int64)
    if cu_seqlens is not None:
        s = tl.load(owner + slot).to(tl.int64)
    row, first, length = sequence(s, cu_seqlens, T)
    chunk = slot - first // Q - (s - row)
    return s, row, first, length, chunk, slot


@triton.jit
@no_type_check
def places(row, first, length, chunk, head, reverse, T, H, N: tl.constexpr, Q: tl.constexpr):
    """Offsets of a chunk's tokens in a tensor [B, T, H, N], and which of them exist."""
    order = chunk * Q + tl.arange(0, Q)
    token = tl.where(reverse, first + length - 1 - order, first + order)
    return (((row * T + token) * H + head) * N)[:, None], (order < length)[:, None]


@triton.jit
@no_type_check
def read(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets in a matrix."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def invert(
    log_w,
    kappa,
    a,
    cu_seqlens,
    owner,
    inverse,
    fits,
    T,
    H,
    rows,
    slots,
    LOWEST: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """X of one chunk; stores 0 in `fits` if a decay is below LOWEST.

    Grid: slots * rows * H, directions. `triton.inverses` says which chunk lies in which slot, and
    `owner` the sequence of a slot.
    """
    head = tl.program_id(0) % H
    d = tl.program_id(1).to(tl.int64)
    _, row, first, length, chunk, slot = owned(cu_seqlens, owner, T, H, rows, Q)
    if chunk * Q < length:
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        at += tl.arange(0, N)[None, :]
        decay = read(log_w, at, inside)
        found = read(kappa, at, inside)
        rate = read(a, at, inside)
        if tl.min(decay) < LOWEST:
            tl.store(fits, 0)
        g = tl.cumsum(decay, 0)
        half = (tl.sum(decay, 0) * 0.5)[None, :]
        A = -found * tl.exp(g - decay - half)
        E = found * rate * tl.exp(half - g)
        i = tl.arange(0, Q)[:, None]
        j = tl.arange(0, Q)[None, :]
        ae = tl.where(i > j, dot(A, tl.trans(E), True), 0.0)
        X = tl.where(i == j, 1.0, 0.0)
        for step in tl.static_range(Q - 1):  # row `step` of X is final: eliminate its column
            column = tl.sum(tl.where(j == step, ae, 0.0), 1)
            done = tl.sum(tl.where(i == step, X, 0.0), 0)
            X += column[:, None] * done[None, :]
        target = ((d * slots + slot) * rows + row) * H + head
        tl.store(inverse + target * Q * Q + matrix(Q, Q), X)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def scan(
    r,
    log_w,
    k,
    v,
    kappa,
    a,
    inverse,
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
    EXACT: tl.constexpr,
):
    """y, and `state` from the first to the last; with SAVE the states between chunks too.

    Grid: sequences * H, directions, N / M.
    """
    s = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    d = tl.program_id(1).to(tl.int64)
    row, first, length = sequence(s, cu_seqlens, T)
    keys = tl.arange(0, N)[None, :]
    values = tl.program_id(2) * M + tl.arange(0, M)[None, :]
    block = tl.program_id(2) * M * N + matrix(M, N)
    here = state + (d * tl.num_programs(0) + tl.program_id(0)) * N * N + block
    S = tl.load(here)
    y += d * rows * T * H * N
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    for chunk in tl.range(0, tl.cdiv(length, Q), num_stages=2):
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        slot = ((d * slots + first // Q + chunk + s - row) * rows + row) * H + head
        between = ((d * ((T - 1) // Q) + (first + chunk * Q) // Q - 1) * rows + row) * H + head
        if SAVE:
            tl.store(saved + between * N * N + block, S, mask=chunk > 0)
        X = tl.load(inverse + slot * Q * Q + matrix(Q, Q))
        V = read(v, at + values, inside)
        decay = read(log_w, at + keys, inside)
        found = read(kappa, at + keys, inside)
        g = tl.cumsum(decay, 0)
        half = (tl.sum(decay, 0) * 0.5)[None, :]
        R = read(r, at + keys, inside) * tl.exp(g - half)
        A = -found * tl.exp(g - decay - half)
        K = read(k, at + keys, inside) * tl.exp(half - g)
        E = found * read(a, at + keys, inside) * tl.exp(half - g)

        S *= tl.exp(half)
        ak = tl.where(i > j, dot(A, tl.trans(K), EXACT), 0.0)
        U = dot(X, dot(A, tl.trans(S), EXACT) + dot(ak, V, EXACT), EXACT)
        re = tl.where(i >= j, dot(R, tl.trans(E), EXACT), 0.0)
        rk = tl.where(i >= j, dot(R, tl.trans(K), EXACT), 0.0)
        Y = dot(R, tl.trans(S), EXACT) + dot(re, U, EXACT) + dot(rk, V, EXACT)
        tl.store(y + at + values, Y, mask=inside)
        S += dot(tl.trans(U), E, EXACT) + dot(tl.trans(V), K, EXACT)
        S *= tl.exp(half)
    tl.store(here, S)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def scan_back(
    r,
    log_w,
    kappa,
    a,
    inverse,
    cu_seqlens,
    dy,
    dstate,
    dsaved,
    T,
    H,
    rows,
    slots,
    N: tl.constexpr,
    M: tl.constexpr,
    Q: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """`dstate` from the gradient of the last state to that of the first; `dsaved` after each chunk.

    Grid: sequences * H, directions, N / M.
    """
    s = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    d = tl.program_id(1).to(tl.int64)
    row, first, length = sequence(s, cu_seqlens, T)
    keys = tl.arange(0, N)[None, :]
    values = tl.program_id(2) * M + tl.arange(0, M)[None, :]
    block = tl.program_id(2) * M * N + matrix(M, N)
    here = dstate + (d * tl.num_programs(0) + tl.program_id(0)) * N * N + block
    dS = tl.load(here)
    dy += d * rows * T * H * N
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    chunks = tl.cdiv(length, Q)
    for back in tl.range(0, chunks, num_stages=2):
        chunk = chunks - 1 - back
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        slot = ((d * slots + first // Q + chunk + s - row) * rows + row) * H + head
        tl.store(dsaved + slot * N * N + block, dS)
        X = tl.load(inverse + slot * Q * Q + matrix(Q, Q))
        dY = read(dy, at + values, inside)
        decay = read(log_w, at + keys, inside)
        found = read(kappa, at + keys, inside)
        g = tl.cumsum(decay, 0)
        half = (tl.sum(decay, 0) * 0.5)[None, :]
        R = read(r, at + keys, inside) * tl.exp(g - half)
        A = -found * tl.exp(g - decay - half)
        E = found * read(a, at + keys, inside) * tl.exp(half - g)

        dS *= tl.exp(half)
        re = tl.where(i >= j, dot(R, tl.trans(E), EXACT), 0.0)
        dU = dot(E, tl.trans(dS), EXACT) + dot(tl.trans(re), dY, EXACT)
        dZ = dot(tl.trans(X), dU, EXACT)
        dS += dot(tl.trans(dY), R, EXACT) + dot(tl.trans(dZ), A, EXACT)
        dS *= tl.exp(half)
    tl.store(here, dS)


@triton.jit(do_not_specialize=SIZES)
@no_type_check
def gradients(
    r,
    log_w,
    k,
    v,
    kappa,
    a,
    inverse,
    cu_seqlens,
    owner,
    state,
    saved,
    dsaved,
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
    EXACT: tl.constexpr,
):
    """Gradients of the inputs in one chunk, from the state before it and the gradient after it.

    Grid: slots * rows * H, directions. Each line is the transpose of one in `scan`; dZ is the
    gradient of the right-hand side of the system that X solves.
    """
    head = tl.program_id(0) % H
    d = tl.program_id(1).to(tl.int64)
    s, row, first, length, chunk, slot = owned(cu_seqlens, owner, T, H, rows, Q)
    if chunk * Q < length:
        at, inside = places(row, first, length, chunk, head, d + REVERSE == 1, T, H, N, Q)
        at += tl.arange(0, N)[None, :]
        of = d * rows * T * H * N + at
        slot = ((d * slots + slot) * rows + row) * H + head
        between = ((d * ((T - 1) // Q) + (first + chunk * Q) // Q - 1) * rows + row) * H + head
        S = tl.load(saved + between * N * N + matrix(N, N), mask=chunk > 0, other=0.0)
        if state is not None:
            here = ((d * sequences + s) * H + head) * N * N
            S += tl.load(state + here + matrix(N, N), mask=chunk == 0, other=0.0)
        dS = tl.load(dsaved + slot * N * N + matrix(N, N))
        X = tl.load(inverse + slot * Q * Q + matrix(Q, Q))
        V = read(v, at, inside)
        dY = read(dy, of, inside)
        decay = read(log_w, at, inside)
        found = read(kappa, at, inside)
        rate = read(a, at, inside)
        g = tl.cumsum(decay, 0)
        half = (tl.sum(decay, 0) * 0.5)[None, :]
        grow = tl.exp(g - half)
        shrink = tl.exp(half - g)
        removal = tl.exp(g - decay - half)
        R = read(r, at, inside) * grow
        A = -found * removal
        K = read(k, at, inside) * shrink
        E = found * rate * shrink

        i = tl.arange(0, Q)[:, None]
        j = tl.arange(0, Q)[None, :]
        S *= tl.exp(half)
        dS *= tl.exp(half)
        ak = tl.where(i > j, dot(A, tl.trans(K), EXACT), 0.0)
        re = tl.where(i >= j, dot(R, tl.trans(E), EXACT), 0.0)
        rk = tl.where(i >= j, dot(R, tl.trans(K), EXACT), 0.0)
        U = dot(X, dot(A, tl.trans(S), EXACT) + dot(ak, V, EXACT), EXACT)
        dU = dot(E, tl.trans(dS), EXACT) + dot(tl.trans(re), dY, EXACT)
        dZ = dot(tl.trans(X), dU, EXACT)
        dV = dot(K, tl.trans(dS), EXACT) + dot(tl.trans(rk), dY, EXACT)
        dV += dot(tl.trans(ak), dZ, EXACT)
        tl.store(dv + of, dV, mask=inside)

        dre = tl.where(i >= j, dot(dY, tl.trans(U), EXACT), 0.0)
        drk = tl.where(i >= j, dot(dY, tl.trans(V), EXACT), 0.0)
        dae = tl.where(i > j, dot(dZ, tl.trans(U), EXACT), 0.0)
        dak = tl.where(i > j, dot(dZ, tl.trans(V), EXACT), 0.0)
        dK = dot(V, dS, EXACT)
        dE = dot(U, dS, EXACT)
        carry = (tl.sum(S * dS, 0) + tl.sum(K * dK + E * dE, 0))[None, :]  # state after * gradient
        dK += dot(tl.trans(drk), R, EXACT) + dot(tl.trans(dak), A, EXACT)
        dE += dot(tl.trans(dre), R, EXACT) + dot(tl.trans(dae), A, EXACT)
        dR = dot(dY, S, EXACT) + dot(dre, E, EXACT) + dot(drk, K, EXACT)
        dA = dot(dZ, S, EXACT) + dot(dae, E, EXACT) + dot(dak, K, EXACT)

        own = R * dR - K * dK - E * dE
        both = own + A * dA
        dg = tl.sum(both, 0)[None, :] - tl.cumsum(both, 0) + own + carry
        tl.store(dlog_w + of, dg, mask=inside)
        tl.store(dr + of, dR * grow, mask=inside)
        tl.store(dk + of, dK * shrink, mask=inside)
        tl.store(dkappa + of, rate * dE * shrink - dA * removal, mask=inside)
        tl.store(da + of, found * dE * shrink, mask=inside)
