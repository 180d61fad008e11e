// What a chunk of 16 tokens is made into, before any state is known; for both directions of time.
//
// The algebra is that of chunks.py, centred: with g the running sum of log_w and c half of its total,
//   R = r exp(g - c)   A = kappa exp(g - log_w - c)   K = k exp(c - g)   E = kappa a exp(c - g)
//   rk, re, ak, ae = R K^T, R E^T, A K^T, A E^T below the diagonal (rk, re: and on it)
//   X = (I + ae)^-1
// so that no factor exceeds exp(8 * 0.7) and all fit f16; the state S0 = S exp(c) is read, then
//   f = X (A S0^T + ak V)     y = R S0^T + rk V - re f     S <- (S0 + V^T K - f^T E) exp(c)
#pragma once
#include "tiles.cuh"

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LOWEST_LOG_W = -0.7f;
enum { r_, log_w_, k_, v_, kappa_, a_, INPUTS };

// Shared memory of one chunk.
struct Chunk {
  f16 R[Q * ROW], A[Q * ROW], K[Q * ROW], E[Q * ROW], V[Q * ROW];  // TOKENS
};
enum { rk_, re_, ak_, X_ };
typedef f16 Squares[4][Q * Q];  // SQUARE

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

// Where the forward pass leaves what the backward pass needs of a chunk, if it is to find nothing again: S0, -f and the
// squares, in parts of Q rows of N. They lie where gradients will: those of the inputs, six tensors [rows, T, H, N], at
// the tokens of the chunk before, which is a whole one; for the first chunk that of the state, in `saved` before the others.
enum { S0_, minus_f_ = N / Q, squares_, PARTS };
struct Room {
  f16* at;
  i64 apart, step;  // between parts, rows
  METHOD Room(f16* saved, const Sequence& s, int chunk, i64 whole) {
    if (chunk == 0) at = saved + (i64)block_x() * 2 * N * N, apart = Q * N, step = N;
    else at = saved + (i64)blocks_x() * 2 * N * N + s.token((chunk - 1) * Q), apart = whole, step = s.step;
  }
  METHOD f16* row(int part, int row) const { return at + part * apart + row * step; }
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

// g - c as a power of two: [17, N], from before the first token on, in blocks of 16 channels.
constexpr int SUMS = (Q + 1) * N;
DEVICE int sums_at(int row, int col) { return (col >> 4) * (Q + 1) * 16 + row * 16 + (col & 15); }

// These running sums, and the decay exp(c) [N], of 16 channels from `col` on. Which of its two tokens a lane takes first
// alternates, so that rows of different banks are taken together.
template <bool check, int some> DEVICE void sum_decay(float* running, float* decay, const IO* log_w, const int (&columns)[some], const Lane& l) {
  bool odd = l.group & 1;
  int token = 2 * l.group;
  float4 one[some], other[some], sum[some];
#pragma unroll
  for (int i = 0; i < some; i++) {
    one[i] = load_four(log_w + raw_at(token + odd, columns[i] + l.four)) * LOG2E;
    other[i] = load_four(log_w + raw_at(token + !odd, columns[i] + l.four)) * LOG2E;
    sum[i] = one[i] + other[i];
    if (check) {
      auto lowest = [](float4 x) { return smallest(smallest(x.x, x.y), smallest(x.z, x.w)); };
      require(smallest(lowest(one[i]), lowest(other[i])) >= LOWEST_LOG_W * LOG2E, "log_w below -0.7, the lowest that kernel 'cuda' takes");
    }
  }
#pragma unroll
  for (int by = 1; by < 8; by *= 2)
#pragma unroll
    for (int i = 0; i < some; i++)
      sum[i] = each(sum[i], [&](float x) {
        float before = shuffle(x, l.lane - 4 * by);
        return l.group >= by ? x + before : x;
      });
#pragma unroll
  for (int i = 0; i < some; i++) {
    int col = columns[i] + l.four;
    float4 half = each(sum[i], [&](float x) { return shuffle(x, l.lane | 28) * .5f; });
    float4 second = sum[i] - half, first = second - (odd ? one[i] : other[i]);  // up to the first and the second of its tokens
    store_four(running + sums_at(token + 1 + odd, col), odd ? second : first);
    store_four(running + sums_at(token + 1 + !odd, col), odd ? first : second);
    if (l.group > 0) continue;
    store_four(running + sums_at(0, col), half * -1);
    store_four(decay + col, each(half, exp2_fast));
  }
}
// The same by three of four warps: the fourth has enough to do in `relate`. Two at once, where there are registers for that.
template <bool check> DEVICE void sum_decay(float* running, float* decay, const IO* log_w, const Lane& l) {
  if (l.warp > 2) return;
  if (N == 64 && l.warp == 0) return sum_decay<check>(running, decay, log_w, {0, 48}, l);
#pragma unroll 1
  for (int col = 16 * l.warp; col < N; col += 48) sum_decay<check>(running, decay, log_w, {col}, l);
}

// R, A, K, E, V from the six inputs [16, N], and, where there is room for it, what f16 cannot hold of K and E:
// it would add up in the state, as it is never removed there. This warp does 8 tokens from `token` on, of 16 channels. All
// is read before anything is stored: what the compiler cannot tell apart it keeps in order, and waits.
template <int (*E_rest_at)(int, int), int tensors>
DEVICE void prepare(Chunk& chunk, const IO (&inputs)[tensors][Q * N], const float* running, f16* K_rest, f16* E_rest, int token, int col, const Lane& l) {
  token += l.turn, col += l.four;
  int from = raw_at(token, col);
  float4 before = load_four(running + sums_at(token, col)), g = load_four(running + sums_at(token + 1, col));
  float4 kappa = load_four(inputs[kappa_] + from), a = load_four(inputs[a_] + from);
  float4 k = load_four(inputs[k_] + from), r = load_four(inputs[r_] + from), v = load_four(inputs[v_] + from);
  float4 shrunk = each(g * -1, exp2_fast), K = k * shrunk, E = kappa * a * shrunk;
  store_split<tokens_at>(chunk.R, token, col, r * each(g, exp2_fast));
  store_split<tokens_at>(chunk.A, token, col, kappa * each(before, exp2_fast));
  float4 K_held = store_split<tokens_at>(chunk.K, token, col, K), E_held = store_split<tokens_at>(chunk.E, token, col, E);
  store_split<tokens_at>(chunk.V, token, col, v);
  if (!K_rest) return;
  store_split<tokens_at>(K_rest, token, col, K - K_held);
  store_split<E_rest_at>(E_rest, token, col, E - E_held);
}

// x [16, 8 from `first`], what lies at least `below` rows below the diagonal; zeros above.
DEVICE void store_lower(f16* to, const float (&x)[4], int first, int below, const Lane& l) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int row = l.group + 8 * half, col = first + l.pair, edge = row - below;
    const float* two = x + 2 * half;
    store_pair(to + square_at(row, col), col <= edge ? two[0] : 0, col < edge ? two[1] : 0);
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
    store_lower(squares[warp], product[0], 0, warp < 2 ? 0 : 1, l);
    store_lower(squares[warp], product[1], 8, warp < 2 ? 0 : 1, l);
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
  bool upper = l.lane >= Q;  // both halves of the warp have found the same, and each stores a half of it
  f16* half = squares[X_] + square_at(8 * upper, l.lane & 15);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    u32 two = pack_f16(upper ? x[i + 8] : x[i], upper ? x[i + 9] : x[i + 1]);
    half[square_at(i, 0)].bits = (u16)two;
    half[square_at(i + 1, 0)].bits = (u16)(two >> 16);
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

// Store a result [16 tokens, 16 channels from `col`] of chunk `at`, those tokens that exist.
template <class Type> DEVICE void store_tokens(Type* to, const float (&x)[2][4], const Sequence& s, int at, int col, const Lane& l) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int token = at * Q + l.group + 8 * half;
    if (token < s.length)
      store_four(to + s.token(token) + col + l.four, four_of(x, half));
  }
}
