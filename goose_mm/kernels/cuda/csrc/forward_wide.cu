// y, the last state, and what gradients need of every chunk, where a block has a multiprocessor for itself.
//
// Two groups of four makers make a chunk each, while four readers, each with 16 rows of the state, read the two before.
#include "reading.cuh"

constexpr int READERS = WARPS, MAKERS = 4, GROUPS = 2, THREADS = 32 * (READERS + GROUPS * MAKERS);
constexpr int STAGES = 3;  // of a group's inputs

struct Made {
  Chunk chunk;
  f16 K_rest[Q * ROW], E_rest[Q * ROW];
  Squares squares;
};
struct Shared {
  IO inputs[GROUPS][STAGES][INPUTS][Q * N];
  Made made[2 * GROUPS];
  float decay[8][N];  // exp(c), and 1 before the first chunk
  float running[GROUPS][SUMS], scratch[GROUPS][Q * Q];
};

// Every second chunk, from that of the group's number on.
DEVICE void make(Shared& shared, const Sequence& s, int chunks, int group, const IO* const (&inputs)[INPUTS]) {
  const Lane l(READERS + group * MAKERS);
  auto inputs_of = [&](int c) -> IO(&)[INPUTS][Q * N] { return shared.inputs[group][c / GROUPS % STAGES]; };
  auto request = [&](int c) {
    if (c < chunks) fetch<MAKERS>(inputs_of(c), inputs, s, c, l);
    else copy_commit();
  };
  auto sum = [&](int c) {
    if (c < chunks) sum_decay<true>(shared.running[group], shared.decay[c & 7], inputs_of(c)[log_w_], l);
  };
  request(group), request(group + GROUPS);
  copy_wait<1>();
  sync_threads();
  sum(group);
  sync_threads();
  for (int c = group; c < chunks + group + GROUPS; c += GROUPS) {
    Made& made = shared.made[c % (2 * GROUPS)];
    request(c + 2 * GROUPS);
    if (c < chunks)
#pragma unroll
      for (int part = 0; part < 2; part++)
        prepare<tokens_at>(made.chunk, inputs_of(c), shared.running[group], made.K_rest, made.E_rest, 8 * part, 16 * l.warp, l);
    copy_wait<1>();
    sync_group(1 + group, 32 * MAKERS);  // the operands are here, and the inputs of the next chunk
    sum(c + GROUPS);
    if (c < chunks) relate(made.chunk, made.squares, shared.scratch[group], l);
    sync_threads();
  }
  copy_wait<0>();
}

// The part of a room that this warp's values have, a square each for 16 keys or tokens: a piece of 8 x 8 is a row.
DEVICE void save(const Room& room, int part, const u32 (&x)[4], const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++) *(u32*)(room.row(part, l.value / 4 + 2 * (i & 1) + (i >> 1)) + 8 * l.group + l.pair) = x[i];
}

KERNEL(THREADS, 1) wkv7_forward_wide(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* kappa, const IO* a,
    const float* state,     // [D, S, H, N, N] or null
    const int* cu_seqlens,  // [S + 1] or null
    IO* y,                  // [D, rows, T, H, N]
    float* last,            // [D, S, H, N, N]
    f16* saved,             // [D, room], or null
    i64 T, int heads, int rows, i64 room, int reverse) {
  Shared& shared = *(Shared*)shared_memory();
  int head = block_x() % heads, s = block_x() / heads, warp = Lane().warp;
  i64 d = block_y(), here = (d * blocks_x() + block_x()) * N * N;
  const Sequence sequence(cu_seqlens, s, head, heads, T, d + reverse == 1);
  int chunks = (sequence.length + Q - 1) / Q;
  if (warp >= READERS) {
    const IO* inputs[INPUTS] = {r, log_w, k, v, kappa, a};
    make(shared, sequence, chunks, (warp - READERS) / MAKERS, inputs);
    return;
  }

  const Lane l;
  float S[N / 8][4] = {};
  if (state) load_state(S, state + here, l);
  for (int i = thread(); i < N; i += 32 * READERS) shared.decay[-1 & 7][i] = 1;
  i64 whole = rows * T * heads * N;
  y += d * whole;
  if (saved) saved += d * room;
  sync_threads();
  sync_threads();
  for (int first = -GROUPS; first < chunks; first += GROUPS) {
    for (int c = first < 0 ? 0 : first; c < first + GROUPS && c < chunks; c++) {
      const Made& made = shared.made[c % (2 * GROUPS)];
      u32 s0[N / 16][4], minus_f[4];
      read(S, s0, minus_f, made.chunk, made.K_rest, made.E_rest, made.squares, shared.decay[c - 1 & 7], shared.decay[c & 7], y, sequence, c, l);
      if (!saved) continue;
      const Room room(saved, sequence, c, whole);
#pragma unroll
      for (int k = 0; k < N / 16; k++) save(room, S0_ + k, s0[k], l);
      save(room, minus_f_, minus_f, l);
      int at = Q * Q * l.warp + 8 * l.lane;
      *(float4*)(room.row(squares_, at / N) + at % N) = *(const float4*)(made.squares[0] + at);
    }
    sync_threads();
  }
  const float* old = shared.decay[chunks - 1 & 7];
  each_four(S, l, [&](int value, int key, float4& x) { store_four(last + here + value * N + key, x * load_four(old + key)); });
}

SIZES(THREADS, sizeof(Shared));
