// What a chunk of 16 tokens is made into, before any state is known; for both directions of time.
//
// The algebra is that of chunks.py, centred: with g the running sum of log_w and c half of its total,
//   R = r exp(g - c)   A = kappa exp(g - log_w - c)   K = k exp(c - g)   E = kappa a exp(c - g)
//   rk, re, ak, ae = R K^T, R E^T, A K^T, A E^T below the diagonal (rk, re: and on it)
//   X = (I + ae)^-1
// so that no factor exceeds exp(8 * 0.7) and all fit f16; the state S0 = S exp(c) is read, then
//   f = X (A S0^T + ak V)     y = R S0^T + rk V - re f     S <- (S0 + V^T K - f^T E) exp(c)
#pragma once
#include "device.cuh"

// Given by the compiler's options: IO, the type of inputs and outputs (float, f16, bf16); OUT, that of
// gradients; N, the head size (64, 128); SEGMENT, chunks between saved states.
constexpr int Q = 16;             // tokens of a chunk
constexpr int WARPS = N / 16;     // each owns 16 rows of the state, or 16 columns
constexpr int THREADS = 32 * WARPS;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST_LOG_W = -0.7f;
enum { r_, log_w_, k_, v_, kappa_, a_, INPUTS };

// Shared matrices of f16 are stored in pieces of 8, exchanged within a row such that the 8 rows of a
// piece lie in different banks. TOKENS: [16, N] or [N, N]. SQUARE: [16, 16] or [N, 16].
DEVICE int tokens_at(int row, int col) { return row * N + (col ^ (row & 7) << 3); }
DEVICE int square_at(int row, int col) { return row * 16 + (col ^ (row & 4) << 1); }

// Where a lane points for a 16 x 16 block at (row, col): four 8 x 8 matrices, down first or right first.
struct Lane {
  int lane, group, pair;  // a lane's place in a product's result: rows group, group + 8; columns pair, pair + 1
  int down_row, down_col, right_row, right_col;
  METHOD Lane() {
    lane = thread() & 31;
    group = lane >> 2;
    pair = 2 * (lane & 3);
    down_row = lane & 15;
    down_col = lane >> 4 << 3;
    right_row = (lane & 7) + (lane >> 4 << 3);
    right_col = lane & 8;
  }
};

// Operands: `left` and `right` of a product, from a matrix stored as it is read or transposed.
// left: [m 16, k 16]. right: [k 16, n 16] as two of n 8: {b[0], b[1]} and {b[2], b[3]}.
template <int (*at)(int, int)> DEVICE void left(u32 (&r)[4], const f16* x, const Lane& l, int m, int k) {
  load_matrices(r, x + at(m + l.down_row, k ^ l.down_col));
}
template <int (*at)(int, int)> DEVICE void left_of_transposed(u32 (&r)[4], const f16* x, const Lane& l, int m, int k) {
  load_transposed(r, x + at(k + l.right_row, m ^ l.right_col));
}
template <int (*at)(int, int)> DEVICE void right_of_transposed(u32 (&r)[4], const f16* x, const Lane& l, int n, int k) {
  load_matrices(r, x + at(n + l.right_row, k ^ l.right_col));
}
template <int (*at)(int, int)> DEVICE void right(u32 (&r)[4], const f16* x, const Lane& l, int k, int n) {
  load_transposed(r, x + at(k + l.down_row, n ^ l.down_col));
}

// Shared memory of one chunk.
struct Chunk {
  f16 R[Q * N], A[Q * N], K[Q * N], E[Q * N], V[Q * N];  // TOKENS
};
enum { rk_, re_, ak_, X_ };
typedef f16 Squares[4][Q * Q];  // SQUARE

// x [16, 16] += left [16, 16] right [16, 16]
DEVICE void multiply_add(float (&x)[2][4], const u32 (&left)[4], const u32 (&right)[4]) {
  multiply_add(x[0], left, right[0], right[1]);
  multiply_add(x[1], left, right[2], right[3]);
}
// The same with a right operand that was made as a left one, and so stands transposed.
DEVICE void multiply_add_flipped(float (&x)[2][4], const u32 (&left)[4], const u32 (&right)[4]) {
  multiply_add(x[0], left, right[0], right[2]);
  multiply_add(x[1], left, right[1], right[3]);
}

// Which tokens of which tensor a block works on.
struct Sequence {
  i64 at;  // of its first token in the order of the scan, at this head
  i64 step;
  int first, length;
  METHOD Sequence(const int* cu_seqlens, int s, int head, int heads, i64 T, bool reverse) {
    i64 row = s;
    first = 0;
    length = (int)T;
    if (cu_seqlens) {
      row = 0;
      first = cu_seqlens[s];
      length = cu_seqlens[s + 1] - first;
    }
    step = (i64)heads * N;
    at = (row * T + first + (reverse ? length - 1 : 0)) * step + head * N;
    step = reverse ? -step : step;
  }
  METHOD i64 token(int i) const { return at + i * step; }
};

// Bring tile [16, N] of chunk `chunk` into shared memory; zeros behind the end of the sequence.
DEVICE void fetch(IO* tile, const IO* x, const Sequence& s, int chunk) {
  constexpr int PIECE = 16 / sizeof(IO), PIECES = N / PIECE;
#pragma unroll
  for (int p = thread(); p < Q * PIECES; p += THREADS) {
    int token = chunk * Q + p / PIECES;
    bool valid = token < s.length;
    copy_async(tile + p * PIECE, x + s.token(valid ? token : 0) + p % PIECES * PIECE, valid);
  }
}

// R, A, K, E, V and the decay exp(c) [N] from the six inputs [16, N]; with `running`, g - c from before the first
// token on [17, N]; with `rest`, what f16 cannot hold of K and E, which would add up in the state: it is
// never removed there. A warp does 4 tokens of 64 channels.
DEVICE void prepare(Chunk& chunk, const IO (*inputs)[Q * N], float* decay, float* running, f16 (*rest)[Q * N]) {
  int warp = thread() >> 5, token = (warp & 3) * 4, col = (warp >> 2) * 64 + (thread() & 31) * 2;
  float2 before = {0, 0}, total = {0, 0};
  float lowest = 0;
#pragma unroll
  for (int i = 0; i < Q; i++) {
    float2 w = load_pair(inputs[log_w_] + i * N + col);
    lowest = smallest(lowest, smallest(w.x, w.y));
    total.x += w.x, total.y += w.y;
    if (i < token) before.x += w.x, before.y += w.y;
  }
  require(lowest >= LOWEST_LOG_W, "log_w below -0.7, the lowest that kernel 'cuda' takes");
  float2 g = {before.x - total.x * .5f, before.y - total.y * .5f};
  if (token == 0) store_pair(decay + col, exp2_fast(-g.x * LOG2E), exp2_fast(-g.y * LOG2E));
  if (running && token == 0) store_pair(running + col, g.x, g.y);
  float2 grown = {exp2_fast(g.x * LOG2E), exp2_fast(g.y * LOG2E)};
#pragma unroll
  for (int i = token; i < token + 4; i++) {
    int raw = i * N + col, at = tokens_at(i, col);
    float2 w = load_pair(inputs[log_w_] + raw), r = load_pair(inputs[r_] + raw);
    float2 k = load_pair(inputs[k_] + raw), v = load_pair(inputs[v_] + raw);
    float2 kappa = load_pair(inputs[kappa_] + raw), a = load_pair(inputs[a_] + raw);
    g.x += w.x, g.y += w.y;
    if (running) store_pair(running + raw + N, g.x, g.y);
    store_pair(chunk.A + at, kappa.x * grown.x, kappa.y * grown.y);
    grown = {exp2_fast(g.x * LOG2E), exp2_fast(g.y * LOG2E)};
    float2 shrunk = {exp2_fast(-g.x * LOG2E), exp2_fast(-g.y * LOG2E)};
    store_pair(chunk.R + at, r.x * grown.x, r.y * grown.y);
    float2 K = {k.x * shrunk.x, k.y * shrunk.y}, E = {kappa.x * a.x * shrunk.x, kappa.y * a.y * shrunk.y};
    store_pair(chunk.K + at, K.x, K.y);
    store_pair(chunk.E + at, E.x, E.y);
    store_pair(chunk.V + at, v.x, v.y);
    if (!rest) continue;
    float2 K16 = load_pair(chunk.K + at), E16 = load_pair(chunk.E + at);
    store_pair(rest[0] + at, K.x - K16.x, K.y - K16.y);
    store_pair(rest[1] + at, E.x - E16.x, E.y - E16.y);
  }
}

// sign * x [16, 16], what lies at least `below` rows below the diagonal; zeros above.
DEVICE void store_lower(f16* to, const float (&x)[2][4], int below, float sign, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    int row = l.group + 8 * (i & 1), col = 8 * (i >> 1) + l.pair, edge = row - below;
    const float* two = x[i >> 1] + 2 * (i & 1);
    store_pair(to + square_at(row, col), col <= edge ? sign * two[0] : 0, col < edge ? sign * two[1] : 0);
  }
}

// The four products of reads and keys, one by each of four warps, and X; `ae` is room for 16 x 16.
DEVICE void relate(const Chunk& chunk, Squares& squares, float* ae, const Lane& l) {
  int warp = thread() >> 5;
  if (warp > 3) return;
  const f16* reads = warp < 2 ? chunk.R : chunk.A;
  const f16* keys = warp & 1 ? chunk.E : chunk.K;
  float product[2][4] = {};
#pragma unroll
  for (int k = 0; k < N; k += 16) {
    u32 a[4], b[4];
    left<tokens_at>(a, reads, l, 0, k);
    right_of_transposed<tokens_at>(b, keys, l, 0, k);
    multiply_add(product, a, b);
  }
  if (warp < 3) return store_lower(squares[warp], product, warp < 2 ? 0 : 1, 1, l);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    int row = l.group + 8 * (i >> 1 & 1), col = 8 * (i >> 2) + l.pair + (i & 1);
    ae[col * Q + row] = col < row ? product[i >> 2][i & 3] : 0;
  }
  sync_warp();
  // Substitution: once row j of X is final, its column of ae is eliminated from the rows below.
  float x[Q];
#pragma unroll
  for (int i = 0; i < Q; i++) x[i] = i == (l.lane & 15);
#pragma unroll
  for (int j = 0; j < Q - 1; j++)
#pragma unroll
    for (int i = (j + 1) & ~3; i < Q; i += 4) {
      float4 below = *(const float4*)(ae + j * Q + i);
      if (i > j) x[i] -= below.x * x[j];
      if (i + 1 > j) x[i + 1] -= below.y * x[j];
      if (i + 2 > j) x[i + 2] -= below.z * x[j];
      if (i + 3 > j) x[i + 3] -= below.w * x[j];
    }
  if (l.lane >= Q) return;
#pragma unroll
  for (int i = 0; i < Q; i += 2) {
    u32 two = pack_f16(x[i], x[i + 1]);
    squares[X_][square_at(i, l.lane)].bits = (u16)two;
    squares[X_][square_at(i + 1, l.lane)].bits = (u16)(two >> 16);
  }
}

// A state [N values, N keys] in registers: a warp holds 16 values, S[j] the keys 8 j to 8 j + 7.
typedef float State[N / 8][4];
typedef u32 Operand[N / 16][4];

template <class F> DEVICE void each_pair(State& S, const Lane& l, F f) {
  int value = (thread() >> 5) * 16 + l.group;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    f(value, 8 * j + l.pair, S[j][0], S[j][1]);
    f(value + 8, 8 * j + l.pair, S[j][2], S[j][3]);
  }
}

// S times a factor for each key.
DEVICE void scale(State& S, const float* factor, float all, const Lane& l) {
  each_pair(S, l, [&](int, int key, float& x, float& y) {
    float2 by = load_pair(factor + key);
    x *= by.x * all, y *= by.y * all;
  });
}

// S as an operand of products: on the left [16 values, N keys], on the right transposed
// [N keys, 16 values], there {s[k][0], s[k][2]} for its first 8 values and {s[k][1], s[k][3]}.
DEVICE void as_operand(Operand& s, const State& S) {
#pragma unroll
  for (int k = 0; k < N / 16; k++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      s[k][2 * half] = pack_f16(S[2 * k + half][0], S[2 * k + half][1]);
      s[k][2 * half + 1] = pack_f16(S[2 * k + half][2], S[2 * k + half][3]);
    }
}
// The same for a result [16, 16], and for its negative.
DEVICE void as_operand(u32 (&s)[4], const float (&x)[2][4], float sign = 1) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    s[i] = pack_f16(sign * x[i >> 1][2 * (i & 1)], sign * x[i >> 1][2 * (i & 1) + 1]);
}

// S [16 values, N keys] += x [16 values, 16 tokens] y [16 tokens, N keys].
DEVICE void add_product(State& S, const u32 (&x)[4], const f16* y, const Lane& l) {
#pragma unroll
  for (int key = 0; key < N; key += 16) {
    u32 b[4];
    right<tokens_at>(b, y, l, 0, key);
    multiply_add(S[key / 8], x, b[0], b[1]);
    multiply_add(S[key / 8 + 1], x, b[2], b[3]);
  }
}

// f^T [16 values, 16 tokens] = (S0 A^T + V^T ak^T) X^T, of this warp's values.
DEVICE void find(float (&f)[2][4], const Operand& s, const u32 (&v)[4], const Chunk& chunk, const Squares& squares, const Lane& l) {
  float z[2][4] = {};
  u32 b[4], left[4];
#pragma unroll
  for (int k = 0; k < N; k += 16) {
    right_of_transposed<tokens_at>(b, chunk.A, l, 0, k);
    multiply_add(z, s[k / 16], b);
  }
  right_of_transposed<square_at>(b, squares[ak_], l, 0, 0);
  multiply_add(z, v, b);
  as_operand(left, z);
  right_of_transposed<square_at>(b, squares[X_], l, 0, 0);
#pragma unroll
  for (int i = 0; i < 8; i++) f[i >> 2][i & 3] = 0;
  multiply_add(f, left, b);
}

// Store a result [16 tokens, 16 channels from `col`] of chunk `at`, those tokens that exist.
template <class Type> DEVICE void store_tokens(Type* to, const float (&x)[2][4], const Sequence& s, int at, int col, const Lane& l) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int token = at * Q + l.group + 8 * half;
    if (token >= s.length) continue;
    Type* row = to + s.token(token) + col + l.pair;
    store_pair(row, x[0][2 * half], x[0][2 * half + 1]);
    store_pair(row + 8, x[1][2 * half], x[1][2 * half + 1]);
  }
}
