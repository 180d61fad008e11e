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
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST_LOG_W = -0.7f;
enum { r_, log_w_, k_, v_, kappa_, a_, INPUTS };

// Shared matrices are stored in pieces of 8, exchanged within a row such that the 8 rows of a
// piece lie in different banks. TOKENS: [16, N] or [N, N]. SQUARE: [16, 16] or [N, 16].
DEVICE int tokens_at(int row, int col) { return row * N + (col ^ (row & 7) << 3); }
DEVICE int square_at(int row, int col) { return row * 16 + (col ^ (row & 4) << 1); }

// Where a lane points for a 16 x 16 block at (row, col): four 8 x 8 matrices, down first or right first.
struct Lane {
  int warp, lane, group, pair;  // a lane's place in a product's result: rows group, group + 8; columns pair, pair + 1
  int down_row, down_col, right_row, right_col;
  int value, key;  // where this warp's part of a state begins, which `split` warps share
  METHOD Lane(int first_warp = 0, int split = 1) {
    warp = (thread() >> 5) - first_warp;
    lane = thread() & 31;
    value = warp / split * 16;
    key = warp % split * (N / split);
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

// The same with n 8: of 32 rows, two operands {r[0], r[1]} and {r[2], r[3]} for k and k + 16; of 16 rows of two matrices.
template <int (*at)(int, int)> DEVICE void right_tall(u32 (&r)[4], const f16* x, const Lane& l, int k, int n) {
  load_transposed(r, x + at(k + l.lane, n));
}
template <int (*at)(int, int)> DEVICE void right_two(u32 (&r)[4], const f16* x, const f16* y, const Lane& l, int n) {
  load_transposed(r, (l.lane < 16 ? x : y) + at(l.lane & 15, n));
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

// Rows of the running sums: 8 of them in different banks.
constexpr int RUNNING = N + 8;

// Bring chunk `chunk` of some tensors into shared memory (TOKENS), by some warps; zeros behind the end.
template <int warps, int count> DEVICE void fetch(IO (&tiles)[count][Q * N], const IO* const (&from)[count], const Sequence& s, int chunk, const Lane& l) {
  constexpr int PIECE = 16 / sizeof(IO), PIECES = N / PIECE;
#pragma unroll
  for (int first = 0; first < Q * PIECES; first += 32 * warps) {
    int p = first + 32 * l.warp + l.lane, token = chunk * Q + p / PIECES;
    bool valid = token < s.length;
    i64 at = s.token(valid ? token : 0) + p % PIECES * PIECE;
    int to = tokens_at(p / PIECES, p % PIECES * PIECE);
#pragma unroll
    for (int i = 0; i < count; i++) copy_async(tiles[i] + to, from[i] + at, valid);
  }
  copy_commit();
}

// Sums of log_w over 4 tokens each, [4, N]: what `prepare` starts from. Four warps do 64 channels.
template <bool check> DEVICE void sum_decay(float* sums, const IO* log_w, int col, const Lane& l) {
  int four = l.warp & 3;
  float2 sum = {0, 0};
  float lowest = 0;
  col += l.lane * 2;
#pragma unroll
  for (int i = 4 * four; i < 4 * four + 4; i++) {
    float2 w = load_pair(log_w + tokens_at(i, col));
    sum.x += w.x, sum.y += w.y;
    if (check) lowest = smallest(lowest, smallest(w.x, w.y));
  }
  require(lowest >= LOWEST_LOG_W, "log_w below -0.7, the lowest that kernel 'cuda' takes");
  store_pair(sums + four * N + col, sum.x, sum.y);
}

// R, A, K, E, V and the decay exp(c) [N] from the six inputs [16, N]; with `running`, g - c from before the first
// token on [17, RUNNING]; with `rest`, what f16 cannot hold of K and E, which would add up in the state: it is
// never removed there. This warp does some tokens from `token` on, of 64 channels.
template <int tokens, int tensors>
DEVICE void prepare(Chunk& chunk, const IO (&inputs)[tensors][Q * N], const float* sums, float* decay, float* running, f16 (*rest)[Q * N], int token, int col, const Lane& l) {
  col += l.lane * 2;
  float2 g = {0, 0}, total = {0, 0};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    float2 sum = load_pair(sums + i * N + col);
    total.x += sum.x, total.y += sum.y;
    if (4 * i + 4 <= token) g.x += sum.x, g.y += sum.y;
  }
  for (int i = token & ~3; i < token; i++) {
    float2 w = load_pair(inputs[log_w_] + tokens_at(i, col));
    g.x += w.x, g.y += w.y;
  }
  g.x -= total.x * .5f, g.y -= total.y * .5f;
  if (token == 0) store_pair(decay + col, exp2_fast(total.x * .5f * LOG2E), exp2_fast(total.y * .5f * LOG2E));
  if (running && token == 0) store_pair(running + col, g.x, g.y);
  float2 grown = {exp2_fast(g.x * LOG2E), exp2_fast(g.y * LOG2E)};
#pragma unroll
  for (int i = token; i < token + tokens; i++) {
    int at = tokens_at(i, col);
    float2 w = load_pair(inputs[log_w_] + at), r = load_pair(inputs[r_] + at);
    float2 k = load_pair(inputs[k_] + at), v = load_pair(inputs[v_] + at);
    float2 kappa = load_pair(inputs[kappa_] + at), a = load_pair(inputs[a_] + at);
    g.x += w.x, g.y += w.y;
    if (running) store_pair(running + (i + 1) * RUNNING + col, g.x, g.y);
    store_pair(chunk.A + at, kappa.x * grown.x, kappa.y * grown.y);
    grown = {exp2_fast(g.x * LOG2E), exp2_fast(g.y * LOG2E)};
    float2 shrunk = {exp2_fast(-g.x * LOG2E), exp2_fast(-g.y * LOG2E)};
    store_pair(chunk.R + at, r.x * grown.x, r.y * grown.y);
    store_pair(chunk.V + at, v.x, v.y);
    float2 K = {k.x * shrunk.x, k.y * shrunk.y}, E = {kappa.x * a.x * shrunk.x, kappa.y * a.y * shrunk.y};
    float2 K_rest = store_rounded(chunk.K + at, K), E_rest = store_rounded(chunk.E + at, E);
    if (!rest) continue;
    store_pair(rest[0] + at, K_rest.x, K_rest.y);
    store_pair(rest[1] + at, E_rest.x, E_rest.y);
  }
}

// sign * x [16, 8 from `first`], what lies at least `below` rows below the diagonal; zeros above.
DEVICE void store_lower(f16* to, const float (&x)[4], int first, int below, float sign, const Lane& l) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = l.group + 8 * half, col = first + l.pair, edge = row - below;
    const float* two = x + 2 * half;
    store_pair(to + square_at(row, col), col <= edge ? sign * two[0] : 0, col < edge ? sign * two[1] : 0);
  }
}

// The four products of reads and keys, one by each of four warps, and X; `ae` is room for 16 x 16.
DEVICE void relate(const Chunk& chunk, Squares& squares, float* ae, const Lane& l) {
  int warp = l.warp;
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
  if (warp < 3) {
    store_lower(squares[warp], product[0], 0, warp < 2 ? 0 : 1, 1, l);
    store_lower(squares[warp], product[1], 8, warp < 2 ? 0 : 1, 1, l);
    return;
  }
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

// A state [N values, N keys] in registers: a warp holds 16 values from l.value on, S[j] the keys
// l.key + 8 j to l.key + 8 j + 7.
template <int J, class F> DEVICE void each_pair(float (&S)[J][4], const Lane& l, F f) {
  int value = l.value + l.group, key = l.key + l.pair;
#pragma unroll
  for (int j = 0; j < J; j++) {
    f(value, key + 8 * j, S[j][0], S[j][1]);
    f(value + 8, key + 8 * j, S[j][2], S[j][3]);
  }
}
template <int J, class Type> DEVICE void load_state(float (&S)[J][4], const Type* from, const Lane& l) {
  each_pair(S, l, [&](int value, int key, float& x, float& y) {
    float2 given = load_pair(from + value * N + key);
    x = given.x, y = given.y;
  });
}

// S times a factor for each key.
template <int J> DEVICE void scale(float (&S)[J][4], const float* factor, float all, const Lane& l) {
  each_pair(S, l, [&](int, int key, float& x, float& y) {
    float2 by = load_pair(factor + key);
    x *= by.x * all, y *= by.y * all;
  });
}
// The same with two factors for each key.
template <int J> DEVICE void scale(float (&S)[J][4], const float* factor, const float* other, const Lane& l) {
  each_pair(S, l, [&](int, int key, float& x, float& y) {
    float2 a = load_pair(factor + key), b = load_pair(other + key);
    x *= a.x * b.x, y *= a.y * b.y;
  });
}

// S as an operand of products: on the left [16 values, keys], on the right transposed
// [keys, 16 values], there {s[k][0], s[k][2]} for its first 8 values and {s[k][1], s[k][3]}.
template <int J> DEVICE void as_operand(u32 (&s)[J / 2][4], const float (&S)[J][4]) {
#pragma unroll
  for (int j = 0; j < J; j++) {
    s[j / 2][j % 2 * 2] = pack_f16(S[j][0], S[j][1]);
    s[j / 2][j % 2 * 2 + 1] = pack_f16(S[j][2], S[j][3]);
  }
}
// The same for a result [16, 16], and for its negative.
DEVICE void as_operand(u32 (&s)[4], const float (&x)[2][4], float sign = 1) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    s[i] = pack_f16(sign * x[i >> 1][2 * (i & 1)], sign * x[i >> 1][2 * (i & 1) + 1]);
}

// S [16 values, keys] += x [16 values, 16 tokens] y [16 tokens, N keys].
template <int J> DEVICE void add_product(float (&S)[J][4], const u32 (&x)[4], const f16* y, const Lane& l) {
#pragma unroll
  for (int j = 0; j < J; j += 2) {
    u32 b[4];
    right<tokens_at>(b, y, l, 0, l.key + 8 * j);
    multiply_add(S[j], x, b[0], b[1]);
    multiply_add(S[j + 1], x, b[2], b[3]);
  }
}

// z^T [16 values, 16 tokens] += S0 A^T + V^T ak^T, of this warp's values.
DEVICE void find(float (&z)[2][4], const u32 (&s)[N / 16][4], const u32 (&v)[4], const Chunk& chunk, const Squares& squares, const Lane& l) {
  u32 b[4];
#pragma unroll
  for (int k = 0; k < N; k += 16) {
    right_of_transposed<tokens_at>(b, chunk.A, l, 0, k);
    multiply_add(z, s[k / 16], b);
  }
  right_of_transposed<square_at>(b, squares[ak_], l, 0, 0);
  multiply_add(z, v, b);
}
// f^T += z^T X^T
DEVICE void solve(float (&f)[2][4], const float (&z)[2][4], const Squares& squares, const Lane& l) {
  u32 b[4], left[4];
  as_operand(left, z);
  right_of_transposed<square_at>(b, squares[X_], l, 0, 0);
  multiply_add(f, left, b);
}

// Store a result [16 tokens, 8 J channels from `col`] of chunk `at`, those tokens that exist.
template <class Type, int J> DEVICE void store_tokens(Type* to, const float (&x)[J][4], const Sequence& s, int at, int col, const Lane& l) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int token = at * Q + l.group + 8 * half;
    if (token >= s.length) continue;
    Type* row = to + s.token(token) + col + l.pair;
#pragma unroll
    for (int j = 0; j < J; j++) store_pair(row + 8 * j, x[j][2 * half], x[j][2 * half + 1]);
  }
}
