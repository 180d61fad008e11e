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

struct Shared {
  IO inputs[SEGMENT][LOADS][Q * N];
  Chunk chunk;
  f16 rest[2][Q * N];              // of K and E
  Squares squares[SEGMENT];
  f16 S0[SEGMENT][N * N];          // TOKENS [values, keys]
  f16 f_t[SEGMENT][N * Q];         // SQUARE [values, tokens]
  f16 P[N * N], dz_t[N * Q], dY[Q * N];
  Squares dscores;                 // drk, dre, dak, dae
  float running[(Q + 1) * N];      // g - c, from before the first token on
  float decay[2][N], carry[WARPS][N], ae[Q * Q], largest[2][WARPS];
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

// Sum over the 16 values of a warp of x [16 values, N keys], for each key.
DEVICE void sum_values(float* to, const State& P, const f16* S0, const Lane& l) {
  constexpr int KEEP = N / 32;
  float x[N / 4];
  int value = (thread() >> 5) * 16 + l.group;
#pragma unroll
  for (int j = 0; j < N / 8; j++) {
    float2 a = load_pair(S0 + tokens_at(value, 8 * j + l.pair));
    float2 b = load_pair(S0 + tokens_at(value + 8, 8 * j + l.pair));
    x[2 * j] = P[j][0] * a.x + P[j][2] * b.x;
    x[2 * j + 1] = P[j][1] * a.y + P[j][3] * b.y;
  }
  // Each step halves the keys a lane is in charge of: group g keeps those from 4 * KEEP * g on.
  halve<N / 8>(x, l.lane & 16, 16);
  halve<N / 16>(x, l.lane & 8, 8);
  halve<N / 32>(x, l.lane & 4, 4);
#pragma unroll
  for (int j = 0; j < KEEP / 2; j++) store_pair(to + 8 * (KEEP / 2 * l.group + j) + l.pair, x[2 * j], x[2 * j + 1]);
}

KERNEL(THREADS, N == 64 && sizeof(IO) == 2 ? 2 : 1) wkv7_backward(
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
  const Lane l;
  int head = block_x() % heads, s = block_x() / heads, warp = thread() >> 5;
  i64 d = block_y(), here = (d * blocks_x() + block_x()) * N * N, whole = d * rows * T * heads * N;
  const IO* inputs[LOADS] = {r, log_w, k, v, kappa, a, dy + whole};
  const Sequence sequence(cu_seqlens, s, head, heads, T, d + reverse == 1);
  int chunks = (sequence.length + Q - 1) / Q, segments = (chunks + SEGMENT - 1) / SEGMENT;
  i64 row = cu_seqlens ? 0 : s;

  State G = {};
  if (dlast)
    each_pair(G, l, [&](int value, int key, float& x, float& y) {
      float2 given = load_pair(dlast + here + value * N + key);
      x = given.x, y = given.y;
    });

  // Chunk i of a segment lies in slot i or, in every second segment, SEGMENT - 1 - i: so a segment moves
  // in as the one after it is done with.
  int requested = 0, arrived = 0;
  auto slot_of = [](int segment, int i) { return segment & 1 ? SEGMENT - 1 - i : i; };
  auto request = [&](int segment, int i) {
    int c = segment * SEGMENT + i;
    if (segment < 0 || c >= chunks) return;
#pragma unroll
    for (int t = 0; t < LOADS; t++) fetch(shared.inputs[slot_of(segment, i)][t], inputs[t], sequence, c);
    copy_commit();
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
    sync_threads();  // the last slot of the segment after this one is free
    if (segment < segments - 1) request(segment, SEGMENT - 1);
    {  // the states before each chunk, and what was found there
      State S = {};
      if (segment > 0) {
        i64 slot = (sequence.first + segment * SPAN) / SPAN - 1;
        const f16* from = saved + (((d * slots + slot) * rows + row) * heads + head) * N * N;
        each_pair(S, l, [&](int value, int key, float& x, float& y) {
          float2 given = load_pair(from + value * N + key);
          x = given.x, y = given.y;
        });
      } else if (state) {
        each_pair(S, l, [&](int value, int key, float& x, float& y) {
          float2 given = load_pair(state + here + value * N + key);
          x = given.x, y = given.y;
        });
      }
      for (int i = 0; i < count; i++) {
        await();
        sync_threads();
        prepare(shared.chunk, shared.inputs[slot_of(segment, i)], shared.decay[i & 1], nullptr, nullptr);
        sync_threads();
        relate(shared.chunk, shared.squares[i], shared.ae, l);
        each_pair(S, l, [&](int, int key, float& x, float& y) {
          float2 old = i ? load_pair(shared.decay[~i & 1] + key) : float2{1, 1};
          float2 now = load_pair(shared.decay[i & 1] + key);
          x *= old.x * now.x, y *= old.y * now.y;
        });
        Operand s0;
        as_operand(s0, S);
#pragma unroll
        for (int key = 0; key < N; key += 16) store_operand<tokens_at>(shared.S0[i], s0[key / 16], warp * 16, key, l);
        sync_threads();
        float f[2][4];
        u32 v_t[4], x[4];
        left_of_transposed<tokens_at>(v_t, shared.chunk.V, l, warp * 16, 0);
        find(f, s0, v_t, shared.chunk, shared.squares[i], l);
        as_operand(x, f);
        store_operand<square_at>(shared.f_t[i], x, warp * 16, 0, l);
        if (i == count - 1) continue;
        as_operand(x, f, -1);
        add_product(S, v_t, shared.chunk.K, l);
        add_product(S, x, shared.chunk.E, l);
      }
    }
    for (int i = count - 1; i >= 0; i--) {
      const Squares& squares = shared.squares[i];
      const f16 *S0 = shared.S0[i], *f_t = shared.f_t[i];
      const auto& raw = shared.inputs[slot_of(segment, i)];
      int c = segment * SEGMENT + i;
      sync_threads();  // nobody reads the last chunk any more
      if (i < count - 1) request(segment - 1, SEGMENT - 2 - i);
      prepare(shared.chunk, raw, shared.decay[0], shared.running, shared.rest);
      int token = (warp & 3) * 4, channel = (warp >> 2) * 64 + l.lane * 2;
      float2 dout[4];
      float top = 0;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        dout[j] = load_pair(raw[dY_] + (token + j) * N + channel);
        top = largest(top, largest(magnitude(dout[j].x), magnitude(dout[j].y)));
      }
      each_pair(G, l, [&](int, int, float& x, float& y) { top = largest(top, largest(magnitude(x), magnitude(y))); });
#pragma unroll
      for (int mask = 16; mask; mask /= 2) top = largest(top, shuffle_xor(top, mask));
      if (l.lane == 0) shared.largest[i & 1][warp] = top;
      sync_threads();  // the inputs as f16, and how large the gradients are
#pragma unroll
      for (int w = 0; w < WARPS; w++) top = largest(top, shared.largest[i & 1][w]);
      u32 exponent = float_bits(top) >> 23;
      exponent = exponent < 32 ? 32 : exponent > 222 ? 222 : exponent;
      float up = bits_float((254 - exponent) << 23), down = bits_float(exponent << 23);
#pragma unroll
      for (int j = 0; j < 4; j++)
        store_pair(shared.dY + tokens_at(token + j, channel), dout[j].x * up, dout[j].y * up);
      scale(G, shared.decay[0], up, l);  // now P
      Operand p;
      as_operand(p, G);
#pragma unroll
      for (int key = 0; key < N; key += 16) store_operand<tokens_at>(shared.P, p[key / 16], warp * 16, key, l);
      sum_values(shared.carry[warp], G, S0, l);
      sync_threads();  // dY and P are here

      u32 dy_t[4], dz_t[4], x[4], b[4];
      left_of_transposed<tokens_at>(dy_t, shared.dY, l, warp * 16, 0);
      {
        float minus[2][4] = {}, dz[2][4] = {}, out[2][4] = {};
#pragma unroll
        for (int key = 0; key < N; key += 16) {
          right_of_transposed<tokens_at>(b, shared.chunk.E, l, 0, key);
          multiply_add(minus, p[key / 16], b);
          right_of_transposed<tokens_at>(b, shared.rest[1], l, 0, key);
          multiply_add(minus, p[key / 16], b);
        }
        right<square_at>(b, squares[re_], l, 0, 0);
        multiply_add(minus, dy_t, b);
        as_operand(x, minus, -1);
        right<square_at>(b, squares[X_], l, 0, 0);
        multiply_add(dz, x, b);
        as_operand(dz_t, dz);
        store_operand<square_at>(shared.dz_t, dz_t, warp * 16, 0, l);
#pragma unroll
        for (int key = 0; key < N; key += 16) {
          left<tokens_at>(x, shared.chunk.K, l, 0, key);
          multiply_add_flipped(out, x, p[key / 16]);
          left<tokens_at>(x, shared.rest[0], l, 0, key);
          multiply_add_flipped(out, x, p[key / 16]);
        }
        left_of_transposed<square_at>(x, squares[rk_], l, 0, 0);
        multiply_add_flipped(out, x, dy_t);
        left_of_transposed<square_at>(x, squares[ak_], l, 0, 0);
        multiply_add_flipped(out, x, dz_t);
#pragma unroll
        for (int j = 0; j < 8; j++) out[j >> 2][j & 3] *= down;
        store_tokens(dv + whole, out, sequence, c, warp * 16, l);
      }
      add_product(G, dy_t, shared.chunk.R, l);
      add_product(G, dz_t, shared.chunk.A, l);
      scale(G, shared.decay[0], down, l);
      sync_threads();  // dz is here

      // From here on a warp is in charge of 16 keys instead of 16 values.
      if (warp < 4) {
        float product[2][4] = {};
#pragma unroll
        for (int value = 0; value < N; value += 16) {
          if (warp < 2) left<tokens_at>(x, shared.dY, l, 0, value);
          else left_of_transposed<square_at>(x, shared.dz_t, l, 0, value);
          if (warp & 1) right<square_at>(b, f_t, l, value, 0);
          else right_of_transposed<tokens_at>(b, shared.chunk.V, l, 0, value);
          multiply_add(product, x, b);
        }
        store_lower(shared.dscores[warp], product, warp < 2 ? 0 : 1, warp & 1 ? -1 : 1, l);
      }
      int first = warp * 16;
      float dR[2][4] = {}, dA[2][4] = {}, dK[2][4] = {}, dE[2][4] = {};
#pragma unroll
      for (int value = 0; value < N; value += 16) {
        right<tokens_at>(b, S0, l, value, first);
        left<tokens_at>(x, shared.dY, l, 0, value);
        multiply_add(dR, x, b);
        left_of_transposed<square_at>(x, shared.dz_t, l, 0, value);
        multiply_add(dA, x, b);
        right<tokens_at>(b, shared.P, l, value, first);
        left<tokens_at>(x, shared.chunk.V, l, 0, value);
        multiply_add(dK, x, b);
        left_of_transposed<square_at>(x, f_t, l, 0, value);
        multiply_add(dE, x, b);
      }
      // What the end of the chunk passes on to every decay in it: sum over values of P and the state.
      float carry[2][2] = {};
#pragma unroll
      for (int n = 0; n < 2; n++) {
        int key = first + 8 * n + l.pair;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int at = tokens_at(l.group + 8 * half, key);
          float2 k = load_pair(shared.chunk.K + at), e = load_pair(shared.chunk.E + at);
          dE[n][2 * half] = -dE[n][2 * half], dE[n][2 * half + 1] = -dE[n][2 * half + 1];
          carry[n][0] += k.x * dK[n][2 * half] + e.x * dE[n][2 * half];
          carry[n][1] += k.y * dK[n][2 * half + 1] + e.y * dE[n][2 * half + 1];
        }
#pragma unroll
        for (int mask = 4; mask < 32; mask *= 2) {
          carry[n][0] += shuffle_xor(carry[n][0], mask);
          carry[n][1] += shuffle_xor(carry[n][1], mask);
        }
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
          float2 part = load_pair(shared.carry[w] + key);
          carry[n][0] += part.x, carry[n][1] += part.y;
        }
      }
      sync_threads();  // the gradients of the products are here
      {
        u32 drk[4], dre[4];
        right<tokens_at>(b, shared.chunk.K, l, 0, first);
        left<square_at>(drk, shared.dscores[drk_], l, 0, 0);
        multiply_add(dR, drk, b);
        left<square_at>(x, shared.dscores[dak_], l, 0, 0);
        multiply_add(dA, x, b);
        right<tokens_at>(b, shared.chunk.E, l, 0, first);
        left<square_at>(dre, shared.dscores[dre_], l, 0, 0);
        multiply_add(dR, dre, b);
        left<square_at>(x, shared.dscores[dae_], l, 0, 0);
        multiply_add(dA, x, b);
        right<tokens_at>(b, shared.chunk.R, l, 0, first);
        left_of_transposed<square_at>(x, shared.dscores[drk_], l, 0, 0);
        multiply_add(dK, x, b);
        left_of_transposed<square_at>(x, shared.dscores[dre_], l, 0, 0);
        multiply_add(dE, x, b);
        right<tokens_at>(b, shared.chunk.A, l, 0, first);
        left_of_transposed<square_at>(x, shared.dscores[dak_], l, 0, 0);
        multiply_add(dK, x, b);
        left_of_transposed<square_at>(x, shared.dscores[dae_], l, 0, 0);
        multiply_add(dE, x, b);
      }
#pragma unroll
      for (int n = 0; n < 2; n++) {
        int key = first + 8 * n + l.pair;
        float2 both[2], own[2];  // what reaches the decay of a token from it and later ones; from its A
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int at = tokens_at(l.group + 8 * half, key), j = 2 * half;
          float2 R = load_pair(shared.chunk.R + at), A = load_pair(shared.chunk.A + at);
          float2 K = load_pair(shared.chunk.K + at), E = load_pair(shared.chunk.E + at);
          own[half] = {A.x * dA[n][j], A.y * dA[n][j + 1]};
          both[half] = {R.x * dR[n][j] + own[half].x - K.x * dK[n][j] - E.x * dE[n][j],
                        R.y * dR[n][j + 1] + own[half].y - K.y * dK[n][j + 1] - E.y * dE[n][j + 1]};
#pragma unroll
          for (int by = 1; by < 8; by *= 2) {
            float2 later = {shuffle_down(both[half].x, 4 * by), shuffle_down(both[half].y, 4 * by)};
            if (l.group + by < 8) both[half].x += later.x, both[half].y += later.y;
          }
        }
        float2 rest = {shuffle(both[1].x, l.lane & 3), shuffle(both[1].y, l.lane & 3)};
        both[0].x += rest.x, both[0].y += rest.y;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          int t = l.group + 8 * half, j = 2 * half;
          if (c * Q + t >= sequence.length) continue;
          float2 g = load_pair(shared.running + (t + 1) * N + key), g_before = load_pair(shared.running + t * N + key);
          float2 grown = {exp2_fast(g.x * LOG2E) * down, exp2_fast(g.y * LOG2E) * down};
          float2 before = {exp2_fast(g_before.x * LOG2E) * down, exp2_fast(g_before.y * LOG2E) * down};
          float2 shrunk = {exp2_fast(-g.x * LOG2E) * down, exp2_fast(-g.y * LOG2E) * down};
          float2 found = load_pair(raw[kappa_] + t * N + key), rate = load_pair(raw[a_] + t * N + key);
          float2 erased = {dE[n][j] * shrunk.x, dE[n][j + 1] * shrunk.y};
          i64 to = whole + sequence.token(c * Q + t) + key;
          store_pair(dr + to, dR[n][j] * grown.x, dR[n][j + 1] * grown.y);
          store_pair(dlog_w + to, (both[half].x - own[half].x + carry[n][0]) * down,
                     (both[half].y - own[half].y + carry[n][1]) * down);
          store_pair(dk + to, dK[n][j] * shrunk.x, dK[n][j + 1] * shrunk.y);
          store_pair(dkappa + to, dA[n][j] * before.x + rate.x * erased.x, dA[n][j + 1] * before.y + rate.y * erased.y);
          store_pair(da + to, found.x * erased.x, found.y * erased.y);
        }
      }
    }
  }
  each_pair(G, l, [&](int value, int key, float& x, float& y) { store_pair(dstate + here + value * N + key, x, y); });
}

SHARED_SIZE(sizeof(Shared));
