// Gradients of the six inputs and of the first state; one block per sequence, head and direction.
//
// Segments are walked from the last to the first. A segment's states are found again from the one saved
// before it; then its chunks are walked backwards with G, the gradient of the state after the chunk, and
//   P = G exp(c)
//   G <- (P + dY^T R + dz^T A) exp(c)
#include "gradients.cuh"

constexpr int SPAN = SEGMENT * Q;
constexpr int MAKERS = 4, THREADS = 64 * WARPS;  // on the way back two warps share 16 values, or 16 keys

// What finding the states again leaves of a chunk.
struct Found {
  f16 S0[N * N];            // STATE; later the running sums of the chunk before
  f16 minus_f[N * Q];       // SQUARE [values, tokens]
  Squares squares;
};
struct Back {
  f16 P[N * N];             // STATE
  f16 dz[N * Q];            // SQUARE [values, tokens]
  Squares dscores;          // drk, dre, dak, dae
};
struct Shared {
  IO inputs[SEGMENT][LOADS][Q * N];  // once chunks are made of them, room for more: see E_rest, exchange
  Chunk chunk;
  union {
    Chunk other;            // while states are found again
    Back back;
  };
  Found found[SEGMENT];
  f16 dY[Q * ROW], K_rest[Q * ROW];
  float running[SUMS], decay[SEGMENT][N], scratch[Q * Q], largest[2 * WARPS];
};
static_assert(sizeof(float) * SUMS <= sizeof(f16) * N * N && 2 * WARPS * Q * 16 * sizeof(float) <= 4 * Q * N * sizeof(IO), "");

KERNEL(THREADS, N == 64 && sizeof(IO) == 2 && AMPLE ? 2 : 1) wkv7_backward(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* kappa, const IO* a,
    const float* state,     // [D, S, H, N, N] or null
    const int* cu_seqlens,  // [S + 1] or null
    const f16* saved,       // [D, slots, rows, H, N, N]
    const IO* dy,           // [D, rows, T, H, N]
    const float* dlast,     // [D, S, H, N, N] or null
    OUT* dr, OUT* dlog_w, OUT* dk, OUT* dv, OUT* dkappa, OUT* da,  // [D, rows, T, H, N]
    float* dstate,          // [D, S, H, N, N]
    i64 T, int heads, int rows, i64 slots, int reverse) {
  Shared& shared = *(Shared*)shared_memory();
  const Lane l(0, 2);
  int head = block_x() % heads, s = block_x() / heads, warp = l.warp, half = warp & 1;
  i64 d = block_y(), here = (d * blocks_x() + block_x()) * N * N, whole = d * rows * T * heads * N;
  const Sequence sequence(cu_seqlens, s, head, heads, T, d + reverse == 1);
  int chunks = (sequence.length + Q - 1) / Q, segments = (chunks + SEGMENT - 1) / SEGMENT;
  i64 row = cu_seqlens ? 0 : s;
  bool maker = warp >= WARPS;

  float G[N / 16][4] = {};
  if (dlast) load_state(G, dlast + here, l);

  // Chunk i of a segment lies in slot i or, in every second segment, SEGMENT - 1 - i: so a segment moves
  // in as the one after it is done with. Four warps fetch, and make the chunks while states are found again.
  const IO* inputs[LOADS] = {r, log_w, k, v, kappa, a, dy + whole};
  const Outputs to{dr, dlog_w, dk, dv, dkappa, da, whole};
  int requested = 0, arrived = 0;
  auto slot_of = [](int segment, int i) { return segment & 1 ? SEGMENT - 1 - i : i; };
  auto request = [&](int segment, int i) {
    int c = segment * SEGMENT + i;
    if (!maker || warp >= WARPS + MAKERS || segment < 0 || c >= chunks) return;
    fetch<MAKERS>(shared.inputs[slot_of(segment, i)], inputs, sequence, c, Lane(WARPS));
    requested++;
  };
  auto await = [&] {
    int later = requested - ++arrived;
    if (later == 0) copy_wait<0>();
    else if (later == 1) copy_wait<1>();
    else copy_wait<2>();
  };
  for (int i = 0; i < SEGMENT; i++) request(segments - 1, i);
  for (int i = 0; i < SEGMENT - (chunks - (segments - 1) * SEGMENT); i++) request(segments - 2, i);

  auto saved_before = [&](int segment) {
    i64 slot = (sequence.first + segment * SPAN) / SPAN - 1;
    return saved + (((d * slots + slot) * rows + row) * heads + head) * N * N;
  };

  // How large the gradients are at the end of a chunk: of its tokens, and of the state after it.
  const int my_token = 8 * half + l.turn, channel = 16 * (warp >> 1) + l.four;
  auto measure = [&](const IO* dY) {
    float top = 0;
    auto reach = [&](float x) { top = largest(top, magnitude(x)); return x; };
    each(load_four(dY + raw_at(my_token, channel)), reach);
    each_four(G, l, [&](int, int, float4& x) { each(x, reach); });
    top = bits_float(largest_of_warp(float_bits(top)));  // what is not negative sorts as its bits do
    if (l.lane == 0) shared.largest[warp] = top;
  };

  for (int segment = segments - 1; segment >= 0; segment--) {
    int count = chunks - segment * SEGMENT < SEGMENT ? chunks - segment * SEGMENT : SEGMENT;
    // The last chunk is made into shared.chunk, where the way back begins.
    auto chunk_of = [&](int i) -> Chunk& { return (count - 1 - i) & 1 ? shared.other : shared.chunk; };
    sync_threads();  // the last slot of the segment after this one is free
    if (segment < segments - 1) request(segment, SEGMENT - 1);
    const Lane again(0, 1, thread_anew()), making(WARPS, 1, thread_anew());
    auto sum = [&](int i) {
      if (!maker || making.warp >= MAKERS || i >= count) return;
#pragma unroll 1
      for (int first = 0; first < N; first += 64)
        sum_decay<false>(shared.running, shared.decay[i], shared.inputs[slot_of(segment, i)][log_w_], {first + 16 * making.warp}, making);
    };
    float S[N / 8][4] = {};
    if (maker) {
      if (making.warp < MAKERS) await();
    } else if (segment > 0) {
      load_state(S, saved_before(segment), again);
    } else if (state) {
      load_state(S, state + here, again);
    }
    sync_threads();
    sum(0);
    sync_threads();
    // As in the forward pass: the states before each chunk, and what was found there.
    for (int i = 0; i <= count; i++) {
      const Lane again(0, 1, thread_anew());
      if (i < count) {
        auto& raw = shared.inputs[slot_of(segment, i)];
        prepare<dense_at>(chunk_of(i), raw, shared.running, i == count - 1 ? shared.K_rest : nullptr, (f16*)raw[log_w_],
                             8 * (again.warp & 1), 16 * (again.warp >> 1), again);
      }
      if (maker && making.warp < MAKERS && i + 1 < count) await();
      sync_threads();  // the chunk is here, and the inputs of the next
      if (maker) {
        sum(i + 1);
        if (i < count) relate(chunk_of(i), shared.found[i].squares, shared.scratch, making);
      } else if (i > 0) {
        const Chunk& chunk = chunk_of(i - 1);
        Found& found = shared.found[i - 1];
        if (i == 1) scale(S, shared.decay[0], 1, again);
        else scale(S, shared.decay[i - 2], shared.decay[i - 1], 1, again);
        u32 s0[4], v_t[4], x[4], b[4];
        float z[2][4] = {}, f[2][4] = {};
#pragma unroll
        for (int key = 0; key < N; key += 16) {  // as `find`, but with fewer registers
          s0[0] = pack_f16(S[key / 8][0], S[key / 8][1]), s0[1] = pack_f16(S[key / 8][2], S[key / 8][3]);
          s0[2] = pack_f16(S[key / 8 + 1][0], S[key / 8 + 1][1]), s0[3] = pack_f16(S[key / 8 + 1][2], S[key / 8 + 1][3]);
          store_operand<state_at>(found.S0, s0, again.value, key, again);
          right_of_transposed<tokens_at>(b, chunk.A, again, 0, key);
          multiply_add(z, s0, b);
        }
        left_of_transposed<tokens_at>(v_t, chunk.V, again, again.value, 0);
        right_of_transposed<square_at>(b, found.squares[ak_], again, 0, 0);
        multiply_add(z, v_t, b);
        if (i < count) add_product(S, v_t, chunk.K, again);
        solve(f, z, found.squares, again);
        as_operand(x, f, -1);
        store_operand<square_at>(found.minus_f, x, again.value, 0, again);
        if (i < count) add_product(S, x, chunk.E, again);
      }
      if (i < count) sync_threads();  // this chunk is made, and the one before it is read
    }
    if (segment > 1 && thread() < N * N / 64) prefetch(saved_before(segment - 1) + 64 * thread());
    measure(shared.inputs[slot_of(segment, count - 1)][dY_]);
    sync_threads();  // all is there for the way back

    for (int i = count - 1; i >= 0; i--) {
      const Chunk& chunk = shared.chunk;
      const Found& found = shared.found[i];
      Back& back = shared.back;
      auto& raw = shared.inputs[slot_of(segment, i)];
      f16* E_rest = (f16*)raw[log_w_];
      const float *decay = shared.decay[i], *running = i == count - 1 ? shared.running : (float*)shared.found[i + 1].S0;
      int c = segment * SEGMENT + i;
      float top = 0;
#pragma unroll
      for (int w = 0; w < 2 * WARPS; w++) top = largest(top, shared.largest[w]);
      const Unit unit(top);
      float up = unit.up(), down = unit.down();
      float4 dout = load_four(raw[dY_] + raw_at(my_token, channel));
      scale(G, decay, up, l);  // now P
      if (i < count - 1) prepare<dense_at>(shared.chunk, raw, running, shared.K_rest, E_rest, 8 * half, 16 * (warp >> 1), l);
      store_split<tokens_at>(shared.dY, my_token, channel, dout * up);
      u32 p[N / 32][4];
      as_operand(p, G);
#pragma unroll
      for (int k = 0; k < N / 32; k++) store_operand<state_at>(back.P, p[k], l.value, l.key + 16 * k, l);
      sync_threads();  // the inputs as f16, dY and P are here
      if (i < count - 1) request(segment - 1, SEGMENT - 2 - i);

      // One of the two warps finds dz of their values, the other dV.
      const Known known{chunk, found.S0, found.minus_f, back.P, back.dz, shared.dY};
      const Lane l(0, 2, thread_anew());
      u32 dy_t[4], dz_t[4], x[4], b[4];
      float dV[2][4] = {};
      left_of_transposed<tokens_at>(dy_t, shared.dY, l, l.value, 0);
      if (half) {
        begin_dV(dV, known, shared.K_rest, found.squares, l);
      } else {
        float minus[2][4] = {};
#pragma unroll
        for (int key = 0; key < N; key += 16) {
          left<state_at>(x, back.P, l, l.value, key);
          right_of_transposed<tokens_at>(b, chunk.E, l, 0, key);
          multiply_add(minus, x, b);
          right_of_transposed<dense_at>(b, E_rest, l, 0, key);
          multiply_add(minus, x, b);
        }
        solve_back(dz_t, minus, dy_t, found.squares, l);
        store_operand<square_at>(back.dz, dz_t, l.value, 0, l);
      }
      sync_threads();  // dz is here
      left<square_at>(dz_t, back.dz, l, l.value, 0);
      add_product(G, dy_t, chunk.R, l);
      add_product(G, dz_t, chunk.A, l);
      scale(G, decay, down, l);
      if (half) {
        finish_dV(dV, known, found.squares, l);
#pragma unroll
        for (int j = 0; j < 8; j++) dV[j >> 2][j & 3] *= down;
        store_tokens(dv + whole, dV, sequence, c, l.value, l);
      } else if (warp < 8) {  // the gradients of the products of reads and keys
        float product[2][4] = {};
        score_gradients(product, known, warp >> 1, l);
        store_scores(back.dscores, product, warp >> 1, l);
      }

      const Lane e(0, 2, thread_anew());
      Share share(warp & 1, warp);
      share.from_states(known, e);
      float4 carry = share.carry(chunk, e);
      sync_threads();  // the gradients of the products are here
      share.from_scores(chunk, back.dscores, e);
      share.give(raw, carry, running, unit, e);
      share.store(to, raw, running, unit, sequence, c, e);
      if (i > 0) {
        const auto& next = shared.inputs[slot_of(segment, i - 1)];
        if (warp < N / 16) sum_decay<false>((float*)shared.found[i].S0, shared.decay[i - 1], next[log_w_], {16 * warp}, e);
        measure(next[dY_]);
      }
      sync_threads();  // the other warp's part is here, nobody reads the chunk any more, and the next can begin
      share.settle(to, raw, down, sequence, c, e);
    }
  }
  each_four(G, l, [&](int value, int key, float4& x) { store_four(dstate + here + value * N + key, x); });
}

SIZES(THREADS, sizeof(Shared));
