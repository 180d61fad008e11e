// y, the last state and the states between segments; one block per sequence, head and direction.
#include "chunk.cuh"

constexpr int STAGES = 3;

struct Shared {
  IO inputs[STAGES][INPUTS][Q * N];
  Chunk chunk;
  f16 rest[2][Q * N];  // of K and E
  Squares squares;
  float decay[2][N];  // exp(c) of this chunk and of the one before
  float ae[Q * Q];
};

KERNEL(THREADS, N == 64 ? 2 : 1) wkv7_forward(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* kappa, const IO* a,
    const float* state,     // [D, S, H, N, N] or null
    const int* cu_seqlens,  // [S + 1] or null
    IO* y,                  // [D, rows, T, H, N]
    float* last,            // [D, S, H, N, N]
    f16* saved,             // [D, slots, rows, H, N, N] or null
    i64 T, int heads, int rows, i64 slots, int reverse) {
  Shared& shared = *(Shared*)shared_memory();
  const IO* inputs[INPUTS] = {r, log_w, k, v, kappa, a};
  const Lane l;
  int head = block_x() % heads, s = block_x() / heads, warp = thread() >> 5;
  i64 d = block_y(), here = (d * blocks_x() + block_x()) * N * N;
  const Sequence sequence(cu_seqlens, s, head, heads, T, d + reverse == 1);
  int chunks = (sequence.length + Q - 1) / Q;
  i64 row = cu_seqlens ? 0 : s;

  State S = {};
  if (state)
    each_pair(S, l, [&](int value, int key, float& x, float& y) {
      float2 given = load_pair(state + here + value * N + key);
      x = given.x, y = given.y;
    });
  for (int i = thread(); i < N; i += THREADS) shared.decay[1][i] = 1;

  auto request = [&](int chunk) {
    if (chunk < chunks)
      for (int i = 0; i < INPUTS; i++) fetch(shared.inputs[chunk % STAGES][i], inputs[i], sequence, chunk);
    copy_commit();
  };
  for (int i = 0; i < STAGES - 1; i++) request(i);
  for (int c = 0; c < chunks; c++) {
    copy_wait<STAGES - 2>();
    sync_threads();  // the inputs are here, and nobody reads the last chunk any more
    request(c + STAGES - 1);
    prepare(shared.chunk, shared.inputs[c % STAGES], shared.decay[c & 1], nullptr, shared.rest);
    sync_threads();
    relate(shared.chunk, shared.squares, shared.ae, l);
    if (saved && c > 0 && c % SEGMENT == 0) {
      i64 slot = (sequence.first + c * Q) / (SEGMENT * Q) - 1;
      f16* to = saved + (((d * slots + slot) * rows + row) * heads + head) * N * N;
      each_pair(S, l, [&](int value, int key, float& x, float& y) {
        float2 by = load_pair(shared.decay[~c & 1] + key);
        store_pair(to + value * N + key, x * by.x, y * by.y);
      });
    }
    // S is kept from just before the decay that ends a chunk: then it is scaled once a chunk.
    each_pair(S, l, [&](int, int key, float& x, float& y) {
      float2 old = load_pair(shared.decay[~c & 1] + key), now = load_pair(shared.decay[c & 1] + key);
      x *= old.x * now.x, y *= old.y * now.y;
    });
    Operand s0;
    as_operand(s0, S);
    u32 v_t[4];
    left_of_transposed<tokens_at>(v_t, shared.chunk.V, l, warp * 16, 0);
    add_product(S, v_t, shared.chunk.K, l);
    add_product(S, v_t, shared.rest[0], l);
    sync_threads();  // the products are here
    float f[2][4], out[2][4] = {};
    u32 minus_f[4], x[4];
    find(f, s0, v_t, shared.chunk, shared.squares, l);
    as_operand(minus_f, f, -1);
    add_product(S, minus_f, shared.chunk.E, l);
    add_product(S, minus_f, shared.rest[1], l);
#pragma unroll
    for (int key = 0; key < N; key += 16) {
      left<tokens_at>(x, shared.chunk.R, l, 0, key);
      multiply_add_flipped(out, x, s0[key / 16]);
    }
    left<square_at>(x, shared.squares[rk_], l, 0, 0);
    multiply_add_flipped(out, x, v_t);
    left<square_at>(x, shared.squares[re_], l, 0, 0);
    multiply_add_flipped(out, x, minus_f);
    store_tokens(y + d * rows * T * heads * N, out, sequence, c, warp * 16, l);
  }
  copy_wait<0>();
  sync_threads();
  each_pair(S, l, [&](int value, int key, float& x, float& y) {
    float2 by = load_pair(shared.decay[(chunks - 1) & 1] + key);
    store_pair(last + here + value * N + key, x * by.x, y * by.y);
  });
}

SHARED_SIZE(sizeof(Shared));
