// y, the last state and the states between segments; one block per sequence, head and direction.
//
// All warps write down a chunk as operands. Then four of them relate its tokens to each other, while the others,
// each with 16 rows of the state, read the chunk before.
#include "reading.cuh"

constexpr int MAKERS = 4, THREADS = 32 * (WARPS + MAKERS);
constexpr int STAGES = sizeof(IO) == 2 ? 3 : 2;

struct Shared {
  IO inputs[STAGES][INPUTS][Q * N];
  Chunk chunk[2];
  f16 rest[2][2][Q * ROW];  // of K and E
  Squares squares[2];
  float decay[4][N];  // exp(c) of the chunk that is made, of the two before it, and 1 before the first
  float running[SUMS], scratch[Q * Q];
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

  const IO* inputs[INPUTS] = {r, log_w, k, v, kappa, a};
  const Lane l, maker(WARPS);
  bool making = maker.warp >= 0;
  auto request = [&](int chunk) {
    if (chunk < chunks) fetch<MAKERS>(shared.inputs[chunk % STAGES], inputs, sequence, chunk, maker);
    else copy_commit();
  };
  auto sum = [&](int chunk) {
    if (chunk < chunks)
      sum_decay<true>(shared.running, shared.decay[chunk & 3], shared.inputs[chunk % STAGES][log_w_], maker);
  };

  i64 row = cu_seqlens ? 0 : s;
  float S[N / 8][4] = {};
  if (making) {
    for (int i = 0; i < STAGES - 1; i++) request(i);
    copy_wait<STAGES - 2>();
  } else if (state) {
    load_state(S, state + here, l);
  }
  for (int i = thread(); i < N; i += THREADS) shared.decay[3][i] = 1;
  sync_threads();  // the first inputs are here
  if (making) sum(0);
  sync_threads();

  for (int c = 0; c <= chunks; c++) {
    if (c < chunks)
      for (int i = l.warp; i < 8 * (N / 64); i += THREADS / 32)
        prepare<tokens_at>(shared.chunk[c & 1], shared.inputs[c % STAGES], shared.running, shared.rest[c & 1][0],
                              shared.rest[c & 1][1], 8 * (i & 1), 16 * (i >> 1), Lane(0, 1, thread_anew()));
    if (making) request(c + STAGES - 1), copy_wait<STAGES - 2>();
    sync_threads();  // the chunk is here, and the inputs of the next
    if (making) {
      sum(c + 1);
      if (c < chunks) relate(shared.chunk[c & 1], shared.squares[c & 1], shared.scratch, Lane(WARPS, 1, thread_anew()));
    } else if (c > 0) {
      int before = c - 1;
      const Chunk& chunk = shared.chunk[before & 1];
      const Squares& squares = shared.squares[before & 1];
      const float *old = shared.decay[before - 1 & 3], *now = shared.decay[before & 3];
      if (saved && before > 0 && before % SEGMENT == 0) {
        i64 slot = (sequence.first + before * Q) / (SEGMENT * Q) - 1;
        f16* to = saved + (((d * slots + slot) * rows + row) * heads + head) * N * N;
        each_four(S, l, [&](int value, int key, float4& x) { store_four(to + value * N + key, x * load_four(old + key)); });
      }
      u32 s0[N / 16][4], minus_f[4];
      const auto& rest = shared.rest[before & 1];
      read(S, s0, minus_f, chunk, rest[0], rest[1], squares, old, now, y + d * rows * T * heads * N, sequence, before, l);
    }
    sync_threads();  // this chunk is made, and the one before it is read
  }
  copy_wait<0>();
  if (making) return;
  const float* old = shared.decay[chunks - 1 & 3];
  each_four(S, l, [&](int value, int key, float4& x) { store_four(last + here + value * N + key, x * load_four(old + key)); });
}

SIZES(THREADS, sizeof(Shared));
