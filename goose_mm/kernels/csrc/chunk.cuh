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

// Matrices in shared memory, such that the 8 rows of a piece of 8 x 8 lie in different banks.
// TOKENS [16, N]: rows with a gap. SQUARE [16, 16] or [N, 16]: halves of rows exchanged. STATE [N values, N keys]:
// SQUARES of 16 keys; DENSE [16, N] likewise. The place of a constant row or column is a constant, so one register points
// to a whole matrix. RAW [16, N]: inputs, whose rows are read whole.
constexpr int ROW = N + 8;
DEVICE int tokens_at(int row, int col) { return row * ROW + col; }
DEVICE int square_at(int row, int col) { return row * 16 + (col ^ (row & 4) << 1); }
DEVICE int state_at(int row, int col) { return (col >> 4) * 16 * N + square_at(row, col & 15); }
DEVICE int dense_at(int row, int col) { return (col >> 4) * 16 * Q + square_at(row, col & 15); }
DEVICE int raw_at(int row, int col) { return row * N + (col ^ (row & 7) << 3); }

// Of 16 keys or values, 4 q + 2 h + e (e 0 or 1) stands at 8 h + 2 q + e in all but the inputs: then the numbers of
// two products that a lane holds of a row are four neighbours. `store_split` puts them there, and returns what f16 holds.
DEVICE int place(int channel) { return (channel & ~15) + (channel >> 1 & 6); }  // of the first of four
template <int (*at)(int, int)> DEVICE float4 store_split(f16* to, int row, int channel, float4 x) {
  u32 first = pack_f16(x.x, x.y), second = pack_f16(x.z, x.w);
  *(u32*)(to + at(row, place(channel))) = first;
  *(u32*)(to + at(row, place(channel) + 8)) = second;
  float2 low = unpack_f16(first), high = unpack_f16(second);
  return {low.x, low.y, high.x, high.y};
}
DEVICE float4 load_split(const f16* p) {
  float2 low = load_pair(p), high = load_pair(p + 8);
  return {low.x, low.y, high.x, high.y};
}

// Where a lane points for a 16 x 16 block at (row, col): four 8 x 8 matrices, down first or right first.
struct Lane {
  // a lane's place in a product's result: rows group, group + 8; columns pair, pair + 1, and the `four` of two products
  int warp, lane, group, pair, four;
  int down_row, down_col, right_row, right_col;
  int value, key;  // where this warp's part of a state begins, which `split` warps share
  int row;         // the value in the first of this lane's rows, which is two before that in the other
  METHOD Lane(int first_warp = 0, int split = 1, int thread_ = thread()) {
    warp = shuffle(thread_ >> 5, 0) - first_warp;  // so the compiler sees that it is one for all
    lane = thread_ & 31;
    value = warp / split * 16;
    key = warp % split * (N / split);
    group = lane >> 2;
    pair = 2 * (lane & 3);
    four = 2 * pair;
    row = value + (group >> 1) * 4 + (group & 1);
    down_row = lane & 15;
    down_col = lane >> 4 << 3;
    right_row = (lane & 7) + (lane >> 4 << 3);
    right_col = lane & 8;
  }
};

// Operands: `left` and `right` of a product, from a matrix stored as it is read or transposed.
// left: [m 16, k 16]. right: [k 16, n 16] as two of n 8: {b[0], b[1]} and {b[2], b[3]}.
template <int (*at)(int, int)> DEVICE void left(u32 (&r)[4], const f16* x, const Lane& l, int m, int k) {
  load_matrices(r, x + at(m + l.down_row, k + l.down_col));
}
template <int (*at)(int, int)> DEVICE void left_of_transposed(u32 (&r)[4], const f16* x, const Lane& l, int m, int k) {
  load_transposed(r, x + at(k + l.right_row, m + l.right_col));
}
template <int (*at)(int, int)> DEVICE void right_of_transposed(u32 (&r)[4], const f16* x, const Lane& l, int n, int k) {
  load_matrices(r, x + at(n + l.right_row, k + l.right_col));
}
template <int (*at)(int, int)> DEVICE void right(u32 (&r)[4], const f16* x, const Lane& l, int k, int n) {
  load_transposed(r, x + at(k + l.down_row, n + l.down_col));
}

// Shared memory of one chunk.
struct Chunk {
  f16 R[Q * ROW], A[Q * ROW], K[Q * ROW], E[Q * ROW], V[Q * ROW];  // TOKENS
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
  int step, first, length;
  METHOD Sequence(const int* cu_seqlens, int s, int head, int heads, i64 T, bool reverse) {
    i64 row = s;
    first = 0;
    length = (int)T;
    if (cu_seqlens) {
      row = 0;
      first = cu_seqlens[s];
      length = cu_seqlens[s + 1] - first;
    }
    step = heads * N;
    at = (row * T + first + (reverse ? length - 1 : 0)) * step + head * N;
    step = reverse ? -step : step;
  }
  METHOD i64 token(int i) const { return at + (i64)i * step; }
};

// Bring chunk `chunk` of some tensors into shared memory (RAW), by some warps; zeros behind the end.
template <int warps, int count> DEVICE void fetch(IO (&tiles)[count][Q * N], const IO* const (&from)[count], const Sequence& s, int chunk, const Lane& l) {
  constexpr int PIECE = 16 / sizeof(IO), PIECES = N / PIECE;
#pragma unroll
  for (int first = 0; first < Q * PIECES; first += 32 * warps) {
    int p = first + 32 * l.warp + l.lane, token = chunk * Q + p / PIECES;
    bool valid = token < s.length;
    i64 at = s.token(valid ? token : 0) + p % PIECES * PIECE;
    int to = raw_at(p / PIECES, p % PIECES * PIECE);
#pragma unroll
    for (int i = 0; i < count; i++) copy_async(tiles[i] + to, from[i] + at, valid);
  }
  copy_commit();
}

// g - c as a power of two: [17, RUNNING], from before the first token on. Rows two apart lie in different banks.
constexpr int RUNNING = N + 4;

// These running sums, and the decay exp(c) [N], of 8 channels from each of some columns on. All is read before anything is
// stored, here and in `prepare`: what the compiler cannot tell apart it keeps in order, and waits.
template <bool check, int some> DEVICE void sum_decay(float* running, float* decay, const IO* log_w, const int (&columns)[some], const Lane& l) {
  int token = 2 * l.group;
  float2 sum[some], two[some];
#pragma unroll
  for (int i = 0; i < some; i++) {
    int col = columns[i] + l.pair;
    float2 one = load_pair(log_w + raw_at(token, col));
    two[i] = load_pair(log_w + raw_at(token + 1, col));
    if (check) {
      float lowest = smallest(smallest(one.x, one.y), smallest(two[i].x, two[i].y));
      require(lowest >= LOWEST_LOG_W, "log_w below -0.7, the lowest that kernel 'cuda' takes");
    }
    two[i].x *= LOG2E, two[i].y *= LOG2E;
    sum[i] = {one.x * LOG2E + two[i].x, one.y * LOG2E + two[i].y};
  }
#pragma unroll
  for (int by = 1; by < 8; by *= 2)
#pragma unroll
    for (int i = 0; i < some; i++) {
      float2 before = {shuffle(sum[i].x, l.lane - 4 * by), shuffle(sum[i].y, l.lane - 4 * by)};
      if (l.group >= by) sum[i].x += before.x, sum[i].y += before.y;
    }
#pragma unroll
  for (int i = 0; i < some; i++) {
    int col = columns[i] + l.pair;
    float2 half = {shuffle(sum[i].x, l.lane | 28) * .5f, shuffle(sum[i].y, l.lane | 28) * .5f};
    sum[i].x -= half.x, sum[i].y -= half.y;
    store_pair(running + (token + 1) * RUNNING + col, sum[i].x - two[i].x, sum[i].y - two[i].y);
    store_pair(running + (token + 2) * RUNNING + col, sum[i].x, sum[i].y);
    if (l.group > 0) continue;
    store_pair(running + col, -half.x, -half.y);
    store_pair(decay + col, exp2_fast(half.x), exp2_fast(half.y));
  }
}
// The same by three of four warps: the fourth has enough to do in `relate`.
template <bool check> DEVICE void sum_decay(float* running, float* decay, const IO* log_w, const Lane& l) {
  if (l.warp > 2) return;
#pragma unroll
  for (int first = 0; first < N; first += 64) {
    sum_decay<check>(running, decay, log_w, {first + 8 * l.warp, first + 24 + 8 * l.warp}, l);
    if (l.warp < 2) sum_decay<check>(running, decay, log_w, {first + 48 + 8 * l.warp}, l);
  }
}

// R, A, K, E, V from the six inputs [16, N], and, where there is room for it, what f16 cannot hold of K and E:
// it would add up in the state, as it is never removed there. This warp does `tokens` (2 or 4) from `token` on, of 64 channels.
template <int tokens, int (*E_rest_at)(int, int), int tensors>
DEVICE void prepare(Chunk& chunk, const IO (&inputs)[tensors][Q * N], const float* running, f16* K_rest, f16* E_rest, int token, int col, const Lane& l) {
  constexpr int some = tokens / 2;
  token += l.lane >> 4;
  col += 4 * (l.lane & 15);
  float4 before[some], g[some], r[some], k[some], v[some], kappa[some], a[some];
#pragma unroll
  for (int i = 0; i < some; i++) {
    int from = raw_at(token + 2 * i, col);
    before[i] = load_four(running + (token + 2 * i) * RUNNING + col);
    g[i] = load_four(running + (token + 2 * i + 1) * RUNNING + col);
    kappa[i] = load_four(inputs[kappa_] + from), a[i] = load_four(inputs[a_] + from);
    k[i] = load_four(inputs[k_] + from), r[i] = load_four(inputs[r_] + from), v[i] = load_four(inputs[v_] + from);
  }
#pragma unroll
  for (int i = 0; i < some; i++) {
    int t = token + 2 * i;
    float4 shrunk = each(g[i] * -1, exp2_fast), K = k[i] * shrunk, E = kappa[i] * a[i] * shrunk;
    store_split<tokens_at>(chunk.R, t, col, r[i] * each(g[i], exp2_fast));
    store_split<tokens_at>(chunk.A, t, col, kappa[i] * each(before[i], exp2_fast));
    float4 K_held = store_split<tokens_at>(chunk.K, t, col, K), E_held = store_split<tokens_at>(chunk.E, t, col, E);
    store_split<tokens_at>(chunk.V, t, col, v[i]);
    if (!K_rest) continue;
    store_split<tokens_at>(K_rest, t, col, K - K_held);
    store_split<E_rest_at>(E_rest, t, col, E - E_held);
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

// A state [N values, N keys] in registers: a warp holds 16 values from l.value on, S[j] and S[j + 1] 16 keys from
// l.key + 8 j on.
template <int J, class F> DEVICE void each_four(float (&S)[J][4], const Lane& l, F f) {
#pragma unroll
  for (int j = 0; j < J; j += 2)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float4 x = {S[j][2 * half], S[j][2 * half + 1], S[j + 1][2 * half], S[j + 1][2 * half + 1]};
      f(l.row + 2 * half, l.key + 8 * j + l.four, x);
      S[j][2 * half] = x.x, S[j][2 * half + 1] = x.y, S[j + 1][2 * half] = x.z, S[j + 1][2 * half + 1] = x.w;
    }
}
template <int J, class Type> DEVICE void load_state(float (&S)[J][4], const Type* from, const Lane& l) {
  each_four(S, l, [&](int value, int key, float4& x) {
    const Type* four = from + value * N + key;
    if (sizeof(Type) == 2) {
      x = load_four(four);
    } else {  // in pairs, as products hold them: four would settle in registers side by side, to be moved for each product
      float2 low = load_pair(four), high = load_pair(four + 2);
      x = {low.x, low.y, high.x, high.y};
    }
  });
}

// S times a factor for each key.
template <int J> DEVICE void scale(float (&S)[J][4], const float* factor, float all, const Lane& l) {
  each_four(S, l, [&](int, int key, float4& x) { x = x * (load_four(factor + key) * all); });
}
// The same with two factors for each key.
template <int J> DEVICE void scale(float (&S)[J][4], const float* factor, const float* other, const Lane& l) {
  each_four(S, l, [&](int, int key, float4& x) { x = x * (load_four(factor + key) * load_four(other + key)); });
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

// Of a result [16, 16] the four neighbours in a lane's first or second row.
DEVICE float4 four_of(const float (&x)[2][4], int second) {
  return {x[0][2 * second], x[0][2 * second + 1], x[1][2 * second], x[1][2 * second + 1]};
}

// Store a result [16 tokens, 16 channels from `col`] of chunk `at`, those tokens that exist.
template <class Type> DEVICE void store_tokens(Type* to, const float (&x)[2][4], const Sequence& s, int at, int col, const Lane& l) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int token = at * Q + l.group + 8 * half;
    if (token < s.length)
      store_four(to + s.token(token) + col + l.four, four_of(x, half));
  }
}
