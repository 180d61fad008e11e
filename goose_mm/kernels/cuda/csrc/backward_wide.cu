// The gradients of backward.cu where a block has a multiprocessor for itself: the forward pass has kept
// S0, f and the squares of every chunk, and 16 warps work on three chunks at once.
//
// Four makers make a chunk. Four walkers, a chunk behind, take G, the gradient of the state, in registers,
// from its end to its beginning. Eight finishers, one more behind, find the gradients of its inputs. All meet between
// steps, and within a step makers and walkers at a barrier of their own.
#include "gradients.cuh"

constexpr int MAKERS = 4, WALKERS = WARPS, FINISHERS = 2 * WARPS, THREADS = 32 * (MAKERS + WALKERS + FINISHERS);
enum { MAKING = 1, WALKING };  // barriers
constexpr int AHEAD = 5;  // chunks from the one that is requested to the last in work

// What is loaded of a chunk, what the makers make of it, and what the walkers add.
struct Loaded {
  IO inputs[LOADS][Q * N];  // log_w gives way to what f16 cannot hold of E, the first four to the finishers' exchange
  f16 saved[PARTS][Q * N];  // STATE, SQUARE [values, tokens], squares
  METHOD const f16* S0() const { return saved[S0_]; }
  METHOD const f16* minus_f() const { return saved[minus_f_]; }
  METHOD const Squares& squares() const { return *(const Squares*)saved[squares_]; }
};
struct Made {
  Chunk chunk;
  f16 K_rest[Q * ROW];
};
struct alignas(16) Walked {
  f16 P[N * N];             // STATE
  f16 dz[N * Q];            // SQUARE [values, tokens]
  f16 dY[Q * ROW];
  Squares dscores;          // drk, dre, dak, dae
  u32 exponent;             // of the unit
};
struct Shared {
  Loaded loaded[AHEAD];
  Made made[3];
  Walked walked[2];
  float running[4][SUMS], decay[4][N], largest[WALKERS];
};
DEVICE Loaded& loaded_of(Shared& shared, int c) { return shared.loaded[(c + AHEAD) % AHEAD]; }
DEVICE Made& made_of(Shared& shared, int c) { return shared.made[(c + 3) % 3]; }
DEVICE Walked& walked_of(Shared& shared, int c) { return shared.walked[c & 1]; }
DEVICE Known known_of(const Loaded& loaded, const Made& made, const Walked& walked) {
  return {made.chunk, loaded.S0(), loaded.minus_f(), walked.P, walked.dz, walked.dY};
}

DEVICE void make(Shared& shared, const Sequence& s, int chunks, const IO* const (&inputs)[LOADS], f16* saved, i64 whole, OUT* dv) {
  const Lane l(FINISHERS + WALKERS);
  auto request = [&](int c) {
    if (c < 0) return copy_commit();
    Loaded& to = loaded_of(shared, c);
    const Room room(saved, s, c, whole);
    int mine = 8 * (32 * l.warp + l.lane);
    const f16* from = room.row(0, mine / N) + mine % N;
#pragma unroll
    for (int part = 0; part < PARTS; part++, from += room.apart) copy_async(to.saved[part] + mine, from, true);
    fetch<MAKERS>(to.inputs, inputs, s, c, l);
  };
  auto sum = [&](int c) {
    if (c >= 0) sum_decay<false>(shared.running[c & 3], shared.decay[c & 3], loaded_of(shared, c).inputs[log_w_], {16 * l.warp}, l);
  };
  request(chunks - 1);
  copy_wait<0>();
  sync_threads();
  sum(chunks - 1);
  sync_threads();
  for (int c = chunks - 1; c >= -2; c--) {
    request(c - 1);
    auto& inputs = loaded_of(shared, c).inputs;
    Made& made = made_of(shared, c);
    if (c >= 0)
#pragma unroll
      for (int part = 0; part < 2; part++)
        prepare<dense_at>(made.chunk, inputs, shared.running[c & 3], made.K_rest, (f16*)inputs[log_w_], 8 * part, 16 * l.warp, l);
    if (c + 2 < chunks) {
      const Loaded& loaded = loaded_of(shared, c + 2);
      const Made& made = made_of(shared, c + 2);
      const Walked& walked = walked_of(shared, c);  // that of c + 2: there are two
      const Known known = known_of(loaded, made, walked);
      float dV[2][4] = {};
      begin_dV(dV, known, made.K_rest, loaded.squares(), l);
      finish_dV(dV, known, loaded.squares(), l);
      float down = Unit(walked.exponent).down();
#pragma unroll
      for (int j = 0; j < 8; j++) dV[j >> 2][j & 3] *= down;
      store_tokens(dv, dV, s, c + 2, l.value, l);
    }
    copy_wait<0>();
    sync_group(MAKING, 32 * MAKERS);  // the next chunk is here
    sum(c - 1);
    sync_threads();
  }
}

// G is `dlast` at the end, if that is given, and goes to `dstate`. It is kept from before the decay that begins the chunk
// behind it, and in the unit of that chunk: then it is scaled once a chunk.
DEVICE void walk(Shared& shared, const Sequence& s, int chunks, const float* dlast, float* dstate) {
  const Lane l(FINISHERS);
  i64 here = ((i64)block_y() * blocks_x() + block_x()) * N * N;
  float G[N / 8][4] = {};
  if (dlast) load_state(G, dlast + here, l);
  float down = 1;
  int token = l.turn, channel = 16 * l.warp + l.four;  // and eight tokens later
  if (l.warp < N / 32) shared.decay[chunks & 3][32 * l.warp + l.lane] = 1;
  sync_threads();
  sync_threads();
  for (int c = chunks; c >= -1; c--) {
    bool there = c >= 0 && c < chunks;
    Walked& walked = walked_of(shared, c);
    const Loaded& loaded = loaded_of(shared, c);
    const Made& made = made_of(shared, c);
    const Known known = known_of(loaded, made, walked);
    float minus[2][4] = {};
    u32 p[N / 16][4], dy_t[4], dz_t[4], b[4];
    float top = 0;
#pragma unroll
    for (int w = 0; w < WALKERS; w++) top = largest(top, shared.largest[w]);
    const Unit unit(top);
    if (there) {
      if (l.warp == 0 && l.lane == 0) walked.exponent = unit.exponent;
#pragma unroll
      for (int part = 0; part < 2; part++)
        store_split<tokens_at>(walked.dY, token + 8 * part, channel, load_four(loaded.inputs[dY_] + raw_at(token + 8 * part, channel)) * unit.up());
      scale(G, shared.decay[c + 1 & 3], shared.decay[c & 3], down * unit.up(), l);  // now P
      down = unit.down();
      as_operand(p, G);
      const f16* E_rest = (const f16*)loaded.inputs[log_w_];
#pragma unroll
      for (int key = 0; key < N; key += 16) {
        right_of_transposed<tokens_at>(b, made.chunk.E, l, 0, key);
        multiply_add(minus, p[key / 16], b);
        right_of_transposed<dense_at>(b, E_rest, l, 0, key);
        multiply_add(minus, p[key / 16], b);
      }
#pragma unroll
      for (int key = 0; key < N; key += 16) store_operand<state_at>(walked.P, p[key / 16], l.value, key, l);
    }
    sync_group(WALKING, 32 * WALKERS);  // dY is here
    if (there) {
      left_of_transposed<tokens_at>(dy_t, walked.dY, l, l.value, 0);
      solve_back(dz_t, minus, dy_t, loaded.squares(), l);
      add_product(G, dy_t, made.chunk.R, l);
      add_product(G, dz_t, made.chunk.A, l);
      store_operand<square_at>(walked.dz, dz_t, l.value, 0, l);
    }
    sync_group(WALKING, 32 * WALKERS);  // dz is here
    if (c > 0) {  // how large the gradients are at the end of the next chunk: of its tokens, and of the state after it
      const IO* dY = loaded_of(shared, c - 1).inputs[dY_];
      float top = 0;
      auto reach = [&](float x) { top = largest(top, magnitude(x)); return x; };
      each_four(G, l, [&](int, int, float4& x) { each(x, reach); });
      top *= down;
      each(load_four(dY + raw_at(token, channel)), reach);
      each(load_four(dY + raw_at(token + 8, channel)), reach);
      top = bits_float(largest_of_warp(float_bits(top)));  // what is not negative sorts as its bits do
      if (l.lane == 0) shared.largest[l.warp] = top;
    }
    if (there) {
      float product[2][4] = {};
      score_gradients(product, known, l.warp, l);
      store_scores(walked.dscores, product, l.warp, l);
    }
    sync_threads();
  }
  scale(G, shared.decay[0], down, l);
  each_four(G, l, [&](int value, int key, float4& x) { store_four(dstate + here + value * N + key, x); });
}

// What one warp needs of another it has a step later: the last chunk is settled while the next one's products are made.
template <bool keys> DEVICE void finish(Shared& shared, const Sequence& s, int chunks, const Outputs& to) {
  const Lane l(0, 2);
  Share share(keys, l.warp);
  float down = 0;
  sync_threads();
  sync_threads();
  for (int c = chunks + 1; c >= 0; c--) {
    const Walked& walked = walked_of(shared, c);
    const Made& made = made_of(shared, c);
    Loaded& loaded = loaded_of(shared, c);
    const Known known = known_of(loaded, made, walked);
    const float* running = shared.running[c & 3];
    if (c < chunks) {
      const Unit unit(walked.exponent);
      share.settle(to, loaded_of(shared, c + 1).inputs, down, s, c + 1, l);
      share.from_states(known, l);
      float4 carry = share.carry(made.chunk, l);
      share.from_scores(made.chunk, walked.dscores, l);
      share.give(loaded.inputs, carry, running, unit, l);
      share.store(to, loaded.inputs, running, unit, s, c, l);
      down = unit.down();
    }
    sync_threads();
  }
  share.settle(to, loaded_of(shared, 0).inputs, down, s, 0, l);
}

KERNEL(THREADS, 1) wkv7_backward_wide(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* kappa, const IO* a,
    const float*,           // S0 is in `saved`
    const int* cu_seqlens,  // [S + 1] or null
    f16* saved,             // [D, room]
    const IO* dy,           // [D, rows, T, H, N]
    const float* dlast,     // [D, S, H, N, N] or null
    OUT* dr, OUT* dlog_w, OUT* dk, OUT* dv, OUT* dkappa, OUT* da,  // [D, rows, T, H, N]
    float* dstate,          // [D, S, H, N, N]
    i64 T, int heads, int rows, i64 room, int reverse) {
  Shared& shared = *(Shared*)shared_memory();
  int head = block_x() % heads, s = block_x() / heads, warp = Lane().warp;
  i64 d = block_y(), whole = rows * T * heads * N, at = d * whole;
  const Sequence sequence(cu_seqlens, s, head, heads, T, d + reverse == 1);
  int chunks = (sequence.length + Q - 1) / Q;
  if (warp < FINISHERS) {
    const Outputs to{dr, dlog_w, dk, dv, dkappa, da, at};
    if (warp & 1) finish<true>(shared, sequence, chunks, to);
    else finish<false>(shared, sequence, chunks, to);
  } else if (warp < FINISHERS + WALKERS) {
    walk(shared, sequence, chunks, dlast, dstate);
  } else {
    const IO* inputs[LOADS] = {r, log_w, k, v, kappa, a, dy + at};
    make(shared, sequence, chunks, inputs, saved + d * room, whole, dv + at);
  }
}

SIZES(THREADS, sizeof(Shared));
