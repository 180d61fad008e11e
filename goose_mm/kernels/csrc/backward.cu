// Gradients of the six inputs and of the first state; one block per sequence, head and direction.
//
// Segments are walked from the last to the first. A segment's states are found again from the one saved
// before it; then its chunks are walked backwards with G, the gradient of the state after the chunk, and
//   P = G exp(c)
//   dz = -X^T (E P^T + re^T dY)                      of the right-hand side of the system for f
//   dV = K P^T + rk^T dY + ak^T dz
//   drk, dre = dY V^T, -dY f^T    dak, dae = dz V^T, -dz f^T                  below the diagonal
//   dR = dY S0 + drk K + dre E                  dA = dz S0 + dak K + dae E
//   dK = V P + drk^T R + dak^T A                dE = -f P + dre^T R + dae^T A
//   G <- (P + dY^T R + dz^T A) exp(c)
// dY and P are scaled by a power of two to be at most 1, as gradients may be too small for f16.
#include "chunk.cuh"

enum { dY_ = INPUTS, LOADS };
enum { drk_, dre_, dak_, dae_ };
constexpr int SPAN = SEGMENT * Q;
constexpr int MAKERS = 4, THREADS = 64 * WARPS;  // on the way back two warps share 16 values, or 16 keys

struct Shared {
  IO inputs[SEGMENT][LOADS][Q * N];
  Chunk chunk;
  f16 rest[2][Q * N];              // of K and E
  Squares squares[SEGMENT];
  f16 S0[SEGMENT][N * N];          // TOKENS [values, keys]
  f16 f_t[SEGMENT][N * Q];         // SQUARE [values, tokens]
  f16 P[N * N], dz_t[N * Q];       // while states are found again, room for a second chunk
  f16 dY[Q * N];
  Squares dscores;                 // drk, dre, dak, dae
  float running[(Q + 1) * RUNNING];      // g - c, from before the first token on
  float decay[3][N], carry[WARPS][N], largest[2][2 * WARPS];
};

template <int (*at)(int, int)> DEVICE void store_operand(f16* to, const u32 (&x)[4], int row, int col, const Lane& l) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    *(u32*)(to + at(row + l.group + 8 * (i & 1), (col ^ 8 * (i >> 1)) + l.pair)) = x[i];
}

template <int half> DEVICE void halve(float* x, bool upper, int mask) {
#pragma unroll
  for (int i = 0; i < half; i++) {
    float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
    x[i] = kept + shuffle_xor(sent, mask);
  }
}

// Sum over the 16 values of a warp of P S0, for each of its keys.
template <int J> DEVICE void sum_values(float* to, const float (&P)[J][4], const f16* S0, const Lane& l) {
  float x[2 * J];
#pragma unroll
  for (int j = 0; j < J; j++) {
    int key = l.key + 8 * j + l.pair;
    float2 a = load_pair(S0 + tokens_at(l.value + l.group, key));
    float2 b = load_pair(S0 + tokens_at(l.value + l.group + 8, key));
    x[2 * j] = P[j][0] * a.x + P[j][2] * b.x;
    x[2 * j + 1] = P[j][1] * a.y + P[j][3] * b.y;
  }
  // Each step halves what a lane is in charge of: group g keeps x[g * J / 4] and on.
  halve<J>(x, l.lane & 16, 16);
  halve<J / 2>(x, l.lane & 8, 8);
  halve<J / 4>(x, l.lane & 4, 4);
#pragma unroll
  for (int i = 0; i < J / 4; i++) {
    int j = l.group * (J / 4) + i;
    to[l.key + 8 * (j >> 1) + l.pair + (j & 1)] = x[i];
  }
}

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

  for (int segment = segments - 1; segment >= 0; segment--) {
    int count = chunks - segment * SEGMENT < SEGMENT ? chunks - segment * SEGMENT : SEGMENT;
    // The last chunk is made into shared.chunk, where the way back begins; the one before it into P and dz.
    auto chunk_of = [&](int i) -> Chunk& { return (count - 1 - i) & 1 ? *(Chunk*)shared.P : shared.chunk; };
    sync_threads();  // the last slot of the segment after this one is free
    if (segment < segments - 1) request(segment, SEGMENT - 1);
    if (maker) {
      const Lane making(WARPS);
      for (int i = 0; i < count; i++) {
        if (making.warp < MAKERS) {
          const auto& raw = shared.inputs[slot_of(segment, i)];
          bool end = i == count - 1;
          await();
          sync_some<1, 32 * MAKERS>();  // the inputs are here
          for (int col = 0; col < N; col += 64) sum_decay<false>(shared.carry[0], raw[log_w_], col, making);
          sync_some<1, 32 * MAKERS>();
          for (int col = 0; col < N; col += 64)
            prepare<4>(chunk_of(i), raw, shared.carry[0], shared.decay[i % 3], end ? shared.running : nullptr,
                       end ? shared.rest : nullptr, 4 * making.warp, col, making);
          sync_some<1, 32 * MAKERS>();
          relate(chunk_of(i), shared.squares[i], shared.carry[0], making);
        }
        sync_threads();  // this chunk is made, and the one before it is read
      }
    } else {  // the states before each chunk, and what was found there
      const Lane l;
      float S[N / 8][4] = {};
      if (segment > 0) {
        i64 slot = (sequence.first + segment * SPAN) / SPAN - 1;
        load_state(S, saved + (((d * slots + slot) * rows + row) * heads + head) * N * N, l);
      } else if (state) {
        load_state(S, state + here, l);
      }
      for (int i = 0; i < count; i++) {
        sync_threads();
        const Chunk& chunk = chunk_of(i);
        if (i == 0) scale(S, shared.decay[0], 1, l);
        else scale(S, shared.decay[(i - 1) % 3], shared.decay[i % 3], l);
        u32 s0[N / 16][4], v_t[4], x[4];
        as_operand(s0, S);
#pragma unroll
        for (int key = 0; key < N; key += 16) store_operand<tokens_at>(shared.S0[i], s0[key / 16], l.value, key, l);
        float z[2][4] = {}, f[2][4] = {};
        left_of_transposed<tokens_at>(v_t, chunk.V, l, l.value, 0);
        find(z, s0, v_t, chunk, shared.squares[i], l);
        if (i < count - 1) add_product(S, v_t, chunk.K, l);
        solve(f, z, shared.squares[i], l);
        as_operand(x, f);
        store_operand<square_at>(shared.f_t[i], x, l.value, 0, l);
        as_operand(x, f, -1);
        if (i < count - 1) add_product(S, x, chunk.E, l);
      }
    }
    for (int i = count - 1; i >= 0; i--) {
      const Chunk& chunk = shared.chunk;
      const Squares& squares = shared.squares[i];
      const f16 *S0 = shared.S0[i], *f_t = shared.f_t[i];
      const auto& raw = shared.inputs[slot_of(segment, i)];
      float* decay = shared.decay[i % 3];
      int c = segment * SEGMENT + i, token = 2 * (warp & 7), col = warp / 8 * 64, channel = col + l.lane * 2;
      bool made = i == count - 1;
      if (!made && warp < N / 16) sum_decay<false>(shared.carry[0], raw[log_w_], warp / 4 * 64, l);
      sync_threads();  // nobody reads the last chunk any more
      if (!made) {
        request(segment - 1, SEGMENT - 2 - i);
        prepare<2>(shared.chunk, raw, shared.carry[0], decay, shared.running, shared.rest, token, col, l);
      }
      float2 dout[2];
      float top = 0;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        dout[j] = load_pair(raw[dY_] + tokens_at(token + j, channel));
        top = largest(top, largest(magnitude(dout[j].x), magnitude(dout[j].y)));
      }
      each_pair(G, l, [&](int, int, float& x, float& y) { top = largest(top, largest(magnitude(x), magnitude(y))); });
#pragma unroll
      for (int mask = 16; mask; mask /= 2) top = largest(top, shuffle_xor(top, mask));
      if (l.lane == 0) shared.largest[i & 1][warp] = top;
      sync_threads();  // the inputs as f16, and how large the gradients are
#pragma unroll
      for (int w = 0; w < 2 * WARPS; w++) top = largest(top, shared.largest[i & 1][w]);
      u32 exponent = float_bits(top) >> 23;
      exponent = exponent < 32 ? 32 : exponent > 222 ? 222 : exponent;
      float up = bits_float((254 - exponent) << 23), down = bits_float(exponent << 23), shift = (int)exponent - 127;
#pragma unroll
      for (int j = 0; j < 2; j++)
        store_pair(shared.dY + tokens_at(token + j, channel), dout[j].x * up, dout[j].y * up);
      scale(G, decay, up, l);  // now P
      {
        u32 p[N / 32][4];
        as_operand(p, G);
#pragma unroll
        for (int k = 0; k < N / 32; k++) store_operand<tokens_at>(shared.P, p[k], l.value, l.key + 16 * k, l);
      }
      sum_values(shared.carry[l.value / 16], G, S0, l);
      sync_threads();  // dY and P are here

      // One of the two warps finds dz of their values, the other dV.
      u32 dy_t[4], dz_t[4], x[4], b[4];
      float dV[2][4] = {};
      left_of_transposed<tokens_at>(dy_t, shared.dY, l, l.value, 0);
      if (half) {
#pragma unroll
        for (int key = 0; key < N; key += 16) {
          u32 p[4];
          left<tokens_at>(p, shared.P, l, l.value, key);
          left<tokens_at>(x, chunk.K, l, 0, key);
          multiply_add_flipped(dV, x, p);
          left<tokens_at>(x, shared.rest[0], l, 0, key);
          multiply_add_flipped(dV, x, p);
        }
        left_of_transposed<square_at>(x, squares[rk_], l, 0, 0);
        multiply_add_flipped(dV, x, dy_t);
      } else {
        float minus[2][4] = {}, dz[2][4] = {};
#pragma unroll
        for (int key = 0; key < N; key += 16) {
          u32 p[4];
          left<tokens_at>(p, shared.P, l, l.value, key);
          right_of_transposed<tokens_at>(b, chunk.E, l, 0, key);
          multiply_add(minus, p, b);
          right_of_transposed<tokens_at>(b, shared.rest[1], l, 0, key);
          multiply_add(minus, p, b);
        }
        right<square_at>(b, squares[re_], l, 0, 0);
        multiply_add(minus, dy_t, b);
        as_operand(x, minus, -1);
        right<square_at>(b, squares[X_], l, 0, 0);
        multiply_add(dz, x, b);
        as_operand(dz_t, dz);
        store_operand<square_at>(shared.dz_t, dz_t, l.value, 0, l);
      }
      sync_threads();  // dz is here
      left<square_at>(dz_t, shared.dz_t, l, l.value, 0);
      add_product(G, dy_t, chunk.R, l);
      add_product(G, dz_t, chunk.A, l);
      scale(G, decay, down, l);
      if (half) {
        left_of_transposed<square_at>(x, squares[ak_], l, 0, 0);
        multiply_add_flipped(dV, x, dz_t);
#pragma unroll
        for (int j = 0; j < 8; j++) dV[j >> 2][j & 3] *= down;
        store_tokens(dv + whole, dV, sequence, c, l.value, l);
      }

      // From here on a warp is in charge of 8 keys.
      if (warp < 8) {
        int which = warp >> 1;
        float product[4] = {};
#pragma unroll
        for (int value = 0; value < N; value += 16) {
          if (which < 2) left<tokens_at>(x, shared.dY, l, 0, value);
          else left_of_transposed<square_at>(x, shared.dz_t, l, 0, value);
          if (which & 1) right<square_at>(b, f_t, l, value, 0);
          else right_of_transposed<tokens_at>(b, chunk.V, l, 0, value);
          multiply_add(product, x, half ? b[2] : b[0], half ? b[3] : b[1]);
        }
        store_lower(shared.dscores[which], product, 8 * half, which < 2 ? 0 : 1, which & 1 ? -1 : 1, l);
      }
      int first = warp * 8, key = first + l.pair;
      float dR[4] = {}, dA[4] = {}, dK[4] = {}, dE[4] = {};
#pragma unroll
      for (int value = 0; value < N; value += 32) {
        u32 s0[4], p[4];
        right_tall<tokens_at>(s0, S0, l, value, first);
        right_tall<tokens_at>(p, shared.P, l, value, first);
#pragma unroll
        for (int two = 0; two < 2; two++) {
          left<tokens_at>(x, shared.dY, l, 0, value + 16 * two);
          multiply_add(dR, x, s0[2 * two], s0[2 * two + 1]);
          left_of_transposed<square_at>(x, shared.dz_t, l, 0, value + 16 * two);
          multiply_add(dA, x, s0[2 * two], s0[2 * two + 1]);
          left<tokens_at>(x, chunk.V, l, 0, value + 16 * two);
          multiply_add(dK, x, p[2 * two], p[2 * two + 1]);
          left_of_transposed<square_at>(x, f_t, l, 0, value + 16 * two);
          multiply_add(dE, x, p[2 * two], p[2 * two + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) dE[j] = -dE[j];
      // What the end of the chunk passes on to every decay in it: sum over values of P and the state.
      float2 R[2], A[2], K[2], E[2], carry = {0, 0};
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int at = tokens_at(l.group + 8 * j, key);
        R[j] = load_pair(chunk.R + at), A[j] = load_pair(chunk.A + at);
        K[j] = load_pair(chunk.K + at), E[j] = load_pair(chunk.E + at);
        carry.x += K[j].x * dK[2 * j] + E[j].x * dE[2 * j];
        carry.y += K[j].y * dK[2 * j + 1] + E[j].y * dE[2 * j + 1];
      }
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) {
        carry.x += shuffle_xor(carry.x, mask);
        carry.y += shuffle_xor(carry.y, mask);
      }
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        float2 part = load_pair(shared.carry[w] + key);
        carry.x += part.x, carry.y += part.y;
      }
      sync_threads();  // the gradients of the products are here
      right_two<tokens_at>(b, chunk.K, chunk.E, l, first);
      left<square_at>(x, shared.dscores[drk_], l, 0, 0);
      multiply_add(dR, x, b[0], b[1]);
      left<square_at>(x, shared.dscores[dak_], l, 0, 0);
      multiply_add(dA, x, b[0], b[1]);
      left<square_at>(x, shared.dscores[dre_], l, 0, 0);
      multiply_add(dR, x, b[2], b[3]);
      left<square_at>(x, shared.dscores[dae_], l, 0, 0);
      multiply_add(dA, x, b[2], b[3]);
      right_two<tokens_at>(b, chunk.R, chunk.A, l, first);
      left_of_transposed<square_at>(x, shared.dscores[drk_], l, 0, 0);
      multiply_add(dK, x, b[0], b[1]);
      left_of_transposed<square_at>(x, shared.dscores[dre_], l, 0, 0);
      multiply_add(dE, x, b[0], b[1]);
      left_of_transposed<square_at>(x, shared.dscores[dak_], l, 0, 0);
      multiply_add(dK, x, b[2], b[3]);
      left_of_transposed<square_at>(x, shared.dscores[dae_], l, 0, 0);
      multiply_add(dE, x, b[2], b[3]);
      float2 both[2], own[2];  // what reaches the decay of a token from it and later ones; from its A
#pragma unroll
      for (int t = 0; t < 2; t++) {
        int j = 2 * t;
        own[t] = {A[t].x * dA[j], A[t].y * dA[j + 1]};
        both[t] = {R[t].x * dR[j] + own[t].x - K[t].x * dK[j] - E[t].x * dE[j],
                   R[t].y * dR[j + 1] + own[t].y - K[t].y * dK[j + 1] - E[t].y * dE[j + 1]};
#pragma unroll
        for (int by = 1; by < 8; by *= 2) {
          float2 later = {shuffle_down(both[t].x, 4 * by), shuffle_down(both[t].y, 4 * by)};
          if (l.group + by < 8) both[t].x += later.x, both[t].y += later.y;
        }
      }
      float2 rest = {shuffle(both[1].x, l.lane & 3), shuffle(both[1].y, l.lane & 3)};
      both[0].x += rest.x, both[0].y += rest.y;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int t = l.group + 8 * half, j = 2 * half;
        if (c * Q + t >= sequence.length) continue;
        float2 g = load_pair(shared.running + (t + 1) * RUNNING + key), g_before = load_pair(shared.running + t * RUNNING + key);
        float2 grown = {exp2_fast(g.x * LOG2E + shift), exp2_fast(g.y * LOG2E + shift)};
        float2 before = {exp2_fast(g_before.x * LOG2E + shift), exp2_fast(g_before.y * LOG2E + shift)};
        float2 shrunk = {exp2_fast(-g.x * LOG2E + shift), exp2_fast(-g.y * LOG2E + shift)};
        float2 found = load_pair(raw[kappa_] + tokens_at(t, key)), rate = load_pair(raw[a_] + tokens_at(t, key));
        float2 erased = {dE[j] * shrunk.x, dE[j + 1] * shrunk.y};
        i64 to = whole + sequence.token(c * Q + t) + key;
        store_pair(dr + to, dR[j] * grown.x, dR[j + 1] * grown.y);
        store_pair(dlog_w + to, (both[half].x - own[half].x + carry.x) * down,
                   (both[half].y - own[half].y + carry.y) * down);
        store_pair(dk + to, dK[j] * shrunk.x, dK[j + 1] * shrunk.y);
        store_pair(dkappa + to, dA[j] * before.x + rate.x * erased.x, dA[j + 1] * before.y + rate.y * erased.y);
        store_pair(da + to, found.x * erased.x, found.y * erased.y);
      }
    }
  }
  each_pair(G, l, [&](int value, int key, float& x, float& y) { store_pair(dstate + here + value * N + key, x, y); });
}

SIZES(THREADS, sizeof(Shared));
