"""What the Triton programs of WKV-7 share: the algebra of a chunk, and where it lies in memory.

The algebra is that of `chunks.py`, centred: with `g` the running sum of `log_w` in a chunk of Q
tokens and `h` half of its total,

    R = r exp(g - h)    A = -kappa exp(g - log_w - h)       read the state, for y and for u
    K = k exp(h - g)    E = kappa a exp(h - g)              write to it, v and u

so that no factor is larger than exp(|h|), and the state is scaled to S0 = S exp(h) before it is
read, and by exp(h) again at the end of the chunk. With ak, ae = A K^T, A E^T below the diagonal,
rk, re = R K^T, R E^T with the diagonal, and X = (I - ae)^-1,

    U = X (A S0^T + ak V)      Y = R S0^T + re U + rk V      S <- (S0 + U^T E + V^T K) exp(h)

Whatever does not depend on the state is folded, for all chunks at once:

    [W  XU] = X [A  ak]          U = W S0^T + XU V
    [F  XY] = [R  rk] + re [W  XU]           Y = F S0^T + XY V

so that a walk over the chunks has little left to do. Its transpose finds the gradient of the
states, where P = G exp(h), and G is the gradient of the state after the chunk:

    G <- (P + dY^T F + (P E^T) W) exp(h)

For 16-bit tensors all of these are kept in float16, and products sum in float32; for float32
tensors everything has the accuracy of float32. No product has 64 rows and four warps: those would
run on Hopper's wgmma, which Triton 3.4 to 3.7 miscompiles in kernels like these
(fla-org/flash-linear-attention#826, #984, #988).
"""

from __future__ import annotations

from typing import no_type_check  # Triton reads the bare functions: tests may not wrap them

import triton
import triton.language as tl

SIZES = ("T", "H", "rows", "slots", "sequences")  # rows of the batch; slots for chunks, per row

# Tiles are [Q, N], tokens in the order of the scan; squares [Q, Q]; states [value, key], or a block
# of M values. TYPE is that of the operands of products.


@triton.jit
@no_type_check
def dot(x, y, TYPE: tl.constexpr):
    """x @ y in float32, of operands in float16 or float32."""
    return tl.dot(x.to(TYPE), y.to(TYPE), input_precision="tf32x3")


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
def owned(cu_seqlens, owner, T, H, Q: tl.constexpr):
    """The chunk of a program in a grid of slots * H, rows: its sequence, number and slot."""
    slot = (tl.program_id(0) // H).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
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
    """Numbers as they are stored. All loads come first, and `.to(tl.float32)` where one is used:

    Triton puts a change of layout at the `.to`, or else at the load, behind a barrier that any
    later load would have to wait for.
    """
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
@no_type_check
def matrix(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets in a matrix."""
    return tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
@no_type_check
def running(log_w, Q: tl.constexpr, TYPE: tl.constexpr):
    """g - h: running sums of [Q, N], less half of the total."""
    later = tl.arange(0, Q)[:, None] < tl.arange(0, Q)[None, :]
    return dot(tl.where(later, -0.5, 0.5), log_w, TYPE)


@triton.jit
@no_type_check
def total(which, x):
    """which @ x, of zeros and ones and of float32: x in two parts, as tf32 cuts off 13 bits."""
    coarse = (x.to(tl.int32, bitcast=True) >> 13 << 13).to(tl.float32, bitcast=True)
    sums = tl.dot(which, coarse, input_precision="tf32")
    return tl.dot(which, x - coarse, sums, input_precision="tf32")


@triton.jit
@no_type_check
def exp(x):
    """As the hardware has it."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
@no_type_check
def row_of(x, i, Q: tl.constexpr):
    """Row `i` of a tile, [N]."""
    return tl.sum(tl.where(tl.arange(0, Q)[:, None] == i, x, 0.0), 0)


@triton.jit
@no_type_check
def inverse(ae_t, Q: tl.constexpr, TYPE: tl.constexpr):
    """X = (I - ae)^-1 and X^T, for ae below the diagonal, by substitution in blocks of rows.

    No powers of `ae` are formed, as a Neumann series would: with nearly parallel keys those grow
    beyond any precision before they cancel. Substitution in float16 is followed by a Newton step.
    Every right operand is a result, transposed: that is how the registers of a warp have it.
    """
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    one = tl.where(i == j, 1.0, 0.0)
    X_t = one + tl.where((i ^ j) == 1, ae_t, 0.0)
    X = tl.trans(X_t)
    for block in tl.static_range(1, 4):
        joins = tl.where(((i ^ j) >> block) == 1, ae_t, 0.0)  # two blocks of 2^block rows
        half = dot(X, tl.trans(joins), TYPE)
        X, X_t = X + dot(half, tl.trans(X_t), TYPE), X_t + dot(X_t, tl.trans(half), TYPE)
    if TYPE.primitive_bitwidth == 16:
        X = X.to(TYPE).to(tl.float32)
        coarse = ae_t.to(TYPE)
        fine = ae_t - coarse.to(tl.float32)
        left = one - X + dot(X, tl.trans(coarse), TYPE) + dot(X, tl.trans(fine), TYPE)
        X, X_t = X + dot(left, tl.trans(X_t), TYPE), X_t + dot(X_t, tl.trans(left), TYPE)
    return X, X_t


@triton.jit
@no_type_check
def powers(x):
    """The power of two below each x >= 0, and its inverse.

    From 2^-63 to 2^63, so that one of them times the inverse of another is finite.
    """
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 64), 190)
    inverse = (254 - exponent) << 23
    return (exponent << 23).to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


# What is made of a chunk: tiles W, F, E and, for the way forward, K; then squares XU, XY and, for
# the way back, X and re X.
TILES = tl.constexpr(4)
SQUARES = tl.constexpr(4)


@triton.jit
@no_type_check
def tile(chunk, i: tl.constexpr, N: tl.constexpr, Q: tl.constexpr):
    return chunk + i * Q * N + matrix(Q, N)


@triton.jit
@no_type_check
def square(chunk, i: tl.constexpr, N: tl.constexpr, Q: tl.constexpr):
    return chunk + TILES * Q * N + i * Q * Q + matrix(Q, Q)


@triton.jit
@no_type_check
def size_of_chunk(N: tl.constexpr, Q: tl.constexpr):
    return TILES * Q * N + SQUARES * Q * Q
