// Matrices in shared memory and in registers: layouts, operands, products, and the state.
#pragma once
#include "device.cuh"

// Given by the compiler's options: IO, the type of inputs and outputs (float, f16, bf16); OUT, that of
// gradients; N, the head size (64, 128); SEGMENT, chunks between saved states.
constexpr int Q = 16;             // tokens of a chunk
constexpr int WARPS = N / 16;     // each owns 16 rows of the state, or 16 columns

// Matrices in shared memory, such that the 8 rows of a piece of 8 x 8 lie in different banks.
// TOKENS [16, N]: rows with a gap. SQUARE [16, 16] or [N, 16]: pieces one after the other. STATE [N values, N keys]:
// SQUARES of 16 keys; DENSE [16, N] likewise. In all of these the place of a sum of multiples of 8 and a rest is the sum of their
// places, so one register points to a whole matrix. RAW [16, N]: inputs, whose rows are read whole.
constexpr int ROW = N + 8;
DEVICE int tokens_at(int row, int col) { return row * ROW + col; }
DEVICE int square_at(int row, int col) { return (row >> 3) * 128 + (col >> 3) * 64 + (row & 7) * 8 + (col & 7); }
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
DEVICE float4 unpack_split(u32 first, u32 second) {
  float2 low = unpack_f16(first), high = unpack_f16(second);
  return {low.x, low.y, high.x, high.y};
}

// Where a lane points for a 16 x 16 block at (row, col): four 8 x 8 matrices, down first or right first.
struct Lane {
  // a lane's place in a product's result: rows group, group + 8; columns pair, pair + 1, and the `four` of two products
  int warp, lane, group, pair, four;
  int down_row, down_col, right_row, right_col;
  int value, key;  // where this warp's part of a state begins, which `split` warps share
  int row;         // the value in the first of this lane's rows, which is two before that in the other
  int turn;        // of 8 tokens this lane's, where four lanes share one: in such an order that neighbours lie in different banks
  METHOD Lane(int first_warp = 0, int split = 1, int thread_ = thread()) {
    warp = shuffle(thread_ >> 5, 0) - first_warp;  // so the compiler sees that it is one for all
    lane = thread_ & 31;
    value = warp / split * 16;
    key = warp % split * (N / split);
    group = lane >> 2;
    pair = 2 * (lane & 3);
    four = 2 * pair;
    row = value + (group >> 1) * 4 + (group & 1);
    turn = 2 * (group & 3) + ((group ^ group >> 2) & 1);
    down_row = lane & 15;
    down_col = lane >> 4 << 3;
    right_row = (lane & 7) + (lane >> 4 << 3);
    right_col = lane & 8;
  }
};

// Operands: `left` and `right` of a product, from a matrix stored as it is read or transposed.
// left: [m 16, k 16]. right: [k 16, n 16] as two of n 8: {b[0], b[1]} and {b[2], b[3]}.
template <int (*at)(int, int)> DEVICE void left(u32 (&r)[4], const f16* x, const Lane& l, int m, int k) {
  load_matrices(r, x + at(l.down_row, l.down_col) + at(m, k));
}
template <int (*at)(int, int)> DEVICE void left_of_transposed(u32 (&r)[4], const f16* x, const Lane& l, int m, int k) {
  load_transposed(r, x + at(l.right_row, l.right_col) + at(k, m));
}
template <int (*at)(int, int)> DEVICE void right_of_transposed(u32 (&r)[4], const f16* x, const Lane& l, int n, int k) {
  load_matrices(r, x + at(l.right_row, l.right_col) + at(n, k));
}
template <int (*at)(int, int)> DEVICE void right(u32 (&r)[4], const f16* x, const Lane& l, int k, int n) {
  load_transposed(r, x + at(l.down_row, l.down_col) + at(k, n));
}

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

// Of a result [16, 16] the four neighbours in a lane's first or second row.
DEVICE float4 four_of(const float (&x)[2][4], int second) {
  return {x[0][2 * second], x[0][2 * second + 1], x[1][2 * second], x[1][2 * second + 1]};
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
template <int J> DEVICE void scale(float (&S)[J][4], const float* factor, const float* other, float all, const Lane& l) {
  each_four(S, l, [&](int, int key, float4& x) { x = x * (load_four(factor + key) * load_four(other + key) * all); });
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

// A left operand, written down as a matrix.
template <int (*at)(int, int)> DEVICE void store_operand(f16* to, const u32 (&x)[4], int row, int col, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    *(u32*)(to + at(row, col) + at(l.group, l.pair) + at(8 * (i & 1), 8 * (i >> 1))) = x[i];
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
