// y, the last state and the states between segments; one block per sequence, head and direction.
//
// Four warps make the next chunk while the others, each with 16 rows of the state, read the one before.
#include "chunk.cuh"

constexpr int MAKERS = 4, THREADS = 32 * (WARPS + MAKERS);
constexpr int STAGES = sizeof(IO) == 2 ? 3 : 2;

struct Shared {
  IO inputs[STAGES][INPUTS][Q * N];
  Chunk chunk[2];
  f16 rest[2][2][Q * ROW];  // of K and E
  Squares squares[2];
  float decay[4][N];  // exp(c) of the chunk that is made, of the two before it, and 1 before the first
  float running[(Q + 1) * RUNNING], scratch[Q * Q];
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
  int head = block_x() % heads, s = block_x() / heads;
  i64 d = block_y(), here = (d * blocks_x() + block_x()) * N * N;
  const Sequence sequence(cu_seqlens, s, head, heads, T, d + reverse == 1);
  int chunks = (sequence.length + Q - 1) / Q;

  if (thread() >= 32 * WARPS) {
    const IO* inputs[INPUTS] = {r, log_w, k, v, kappa, a};
    const Lane l(WARPS);
    auto request = [&](int chunk) {
      if (chunk < chunks) fetch<MAKERS>(shared.inputs[chunk % STAGES], inputs, sequence, chunk, l);
      else copy_commit();
    };
    auto sum = [&](int chunk) {
      sum_decay<true>(shared.running, shared.decay[chunk & 3], shared.inputs[chunk % STAGES][log_w_], l);
    };
    for (int i = 0; i < STAGES - 1; i++) request(i);
    copy_wait<STAGES - 2>();
    sync_some<1, 32 * MAKERS>();
    if (chunks > 0) sum(0);
    sync_some<1, 32 * MAKERS>();
    for (int c = 0; c < chunks; c++) {
      Chunk& chunk = shared.chunk[c & 1];
      auto& rest = shared.rest[c & 1];
      request(c + STAGES - 1);
      for (int col = 0; col < N; col += 64)
        prepare<4, tokens_at>(chunk, shared.inputs[c % STAGES], shared.running, rest[0], rest[1], 4 * l.warp, col, l);
      copy_wait<STAGES - 2>();
      sync_some<1, 32 * MAKERS>();  // the chunk is here, and the inputs of the next
      if (c + 1 < chunks) sum(c + 1);
      relate(chunk, shared.squares[c & 1], shared.scratch, l);
      sync_threads();  // this chunk is made, and the one before it is read
    }
    copy_wait<0>();
    return;
  }

  const Lane l;
  i64 row = cu_seqlens ? 0 : s;
  float S[N / 8][4] = {};
  if (state) load_state(S, state + here, l);
  for (int i = thread(); i < N; i += 32 * WARPS) shared.decay[3][i] = 1;
  sync_some<2, 32 * WARPS>();

  for (int c = 0; c < chunks; c++) {
    sync_threads();
    const Chunk& chunk = shared.chunk[c & 1];
    const Squares& squares = shared.squares[c & 1];
    const float *old = shared.decay[c - 1 & 3], *now = shared.decay[c & 3];
    if (saved && c > 0 && c % SEGMENT == 0) {
      i64 slot = (sequence.first + c * Q) / (SEGMENT * Q) - 1;
      f16* to = saved + (((d * slots + slot) * rows + row) * heads + head) * N * N;
      each_four(S, l, [&](int value, int key, float4& x) { store_four(to + value * N + key, x * load_four(old + key)); });
    }
    // S is kept from just before the decay that ends a chunk: then it is scaled once a chunk.
    scale(S, old, now, l);
    u32 s0[N / 16][4];
    as_operand(s0, S);
    u32 v_t[4], minus_f[4], x[4];
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
    add_product(S, v_t, shared.rest[c & 1][0], l);
    solve(f, z, squares, l);
    as_operand(minus_f, f, -1);
    left<square_at>(x, squares[re_], l, 0, 0);
    multiply_add_flipped(out, x, minus_f);
    store_tokens(y + d * rows * T * heads * N, out, sequence, c, l.value, l);
    add_product(S, minus_f, chunk.E, l);
    add_product(S, minus_f, shared.rest[c & 1][1], l);
  }
  const float* old = shared.decay[chunks - 1 & 3];
  each_four(S, l, [&](int value, int key, float4& x) { store_four(last + here + value * N + key, x * load_four(old + key)); });
}

SIZES(THREADS, sizeof(Shared));
