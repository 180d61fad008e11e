// Reading a chunk and taking the state over it, by warps that hold 16 rows of the state each.
#pragma once
#include "chunk.cuh"

// y of chunk `at`; S0 and -f^T, as operands, are left behind. S is kept from just before the decay that ends a chunk: then it is
// scaled once a chunk, by `old`, of the chunk before, and `now`. The rests are what f16 cannot hold of K and E.
DEVICE void read(float (&S)[N / 8][4], u32 (&s0)[N / 16][4], u32 (&minus_f)[4], const Chunk& chunk, const f16* K_rest, const f16* E_rest, const Squares& squares, const float* old, const float* now, IO* y, const Sequence& s, int at, const Lane& l) {
  scale(S, old, now, 1, l);
  as_operand(s0, S);
  u32 v_t[4], x[4];
  left_of_transposed<tokens_at>(v_t, chunk.V, l, l.value, 0);
  float z[2][4] = {}, f[2][4] = {}, out[2][4] = {};
  find(z, s0, v_t, chunk, squares, l);
#pragma unroll
  for (int key = 0; key < N; key += 16) {
    left<tokens_at>(x, chunk.R, l, 0, key);
    multiply_add_flipped(out, x, s0[key / 16]);
  }
  left<square_at>(x, squares[rk_], l, 0, 0);
  multiply_add_flipped(out, x, v_t);
  add_product(S, v_t, chunk.K, l);
  add_product(S, v_t, K_rest, l);
  solve(f, z, squares, l);
  as_operand(minus_f, f, -1);
  left<square_at>(x, squares[re_], l, 0, 0);
  multiply_add_flipped(out, x, minus_f);
  store_tokens(y, out, s, at, l.value, l);
  add_product(S, minus_f, chunk.E, l);
  add_product(S, minus_f, E_rest, l);
}
