// Gradients of the tokens of a chunk, once P, the gradient of the state at its end, is known:
//   dz = -X^T (E P^T + re^T dY)                      of the right-hand side of the system for f
//   dV = K P^T + rk^T dY + ak^T dz
//   drk, dre = dY V^T, -dY f^T    dak, dae = dz V^T, -dz f^T                  below the diagonal
//   dR = dY S0 + drk K + dre E                  dA = dz S0 + dak K + dae E
//   dK = V P + drk^T R + dak^T A                dE = -f P + dre^T R + dae^T A
// dY and P are scaled by a power of two to be at most 1, as gradients may be too small for f16.
#pragma once
#include "chunk.cuh"

enum { dY_ = INPUTS, LOADS };
enum { drk_, dre_, dak_, dae_ };

// What is known of a chunk, in shared memory.
struct Known {
  const Chunk& chunk;
  const f16 *S0, *minus_f;  // STATE, SQUARE [values, tokens]
  const f16 *P, *dz, *dY;   // STATE, SQUARE [values, tokens], TOKENS
};

// That power of two, from the largest gradient.
struct Unit {
  u32 exponent;
  METHOD Unit(float top) {
    exponent = float_bits(top) >> 23;
    exponent = exponent < 64 ? 64 : exponent > 190 ? 190 : exponent;  // so that `down` of one times `up` of another is finite
  }
  METHOD explicit Unit(u32 known) : exponent(known) {}
  METHOD float up() const { return bits_float((254 - exponent) << 23); }
  METHOD float down() const { return bits_float(exponent << 23); }
  // exp2 of each, times `down`
  METHOD float4 power(float4 x) const {
    float shift = (int)exponent - 127;
    return each(x, [&](float y) { return exp2_fast(y + shift); });
  }
};

// Where the gradients of the inputs go, from `at` on.
struct Outputs {
  OUT *r, *log_w, *k, *v, *kappa, *a;
  i64 at;
};

// dz^T as an operand, of this warp's values; `minus` is P E^T.
DEVICE void solve_back(u32 (&dz_t)[4], float (&minus)[2][4], const u32 (&dy_t)[4], const Squares& squares, const Lane& l) {
  u32 x[4], b[4];
  float dz[2][4] = {};
  right<square_at>(b, squares[re_], l, 0, 0);
  multiply_add(minus, dy_t, b);
  as_operand(x, minus, -1);
  right<square_at>(b, squares[X_], l, 0, 0);
  multiply_add(dz, x, b);
  as_operand(dz_t, dz);
}

// dV of this warp's values: what needs no dz, and what does. K_rest is what f16 cannot hold of K.
DEVICE void begin_dV(float (&dV)[2][4], const Known& of, const f16* K_rest, const Squares& squares, const Lane& l) {
  u32 x[4], b[4];
#pragma unroll
  for (int key = 0; key < N; key += 16) {
    right_of_transposed<state_at>(b, of.P, l, l.value, key);
    left<tokens_at>(x, of.chunk.K, l, 0, key);
    multiply_add(dV, x, b);
    left<tokens_at>(x, K_rest, l, 0, key);
    multiply_add(dV, x, b);
  }
  left_of_transposed<square_at>(x, squares[rk_], l, 0, 0);
  right<tokens_at>(b, of.dY, l, 0, l.value);
  multiply_add(dV, x, b);
}
DEVICE void finish_dV(float (&dV)[2][4], const Known& of, const Squares& squares, const Lane& l) {
  u32 x[4], b[4];
  left_of_transposed<square_at>(x, squares[ak_], l, 0, 0);
  right_of_transposed<square_at>(b, of.dz, l, l.value, 0);
  multiply_add(dV, x, b);
}

// The gradients of the products of reads and keys: `which` of drk, dre, dak, dae.
DEVICE void score_gradients(float (&product)[2][4], const Known& of, int which, const Lane& l) {
  u32 given[N / 16][4], met[N / 16][4];
  if (which < 2) {
#pragma unroll
    for (int i = 0; i < N / 16; i++) left<tokens_at>(given[i], of.dY, l, 0, 16 * i);
  } else {
#pragma unroll
    for (int i = 0; i < N / 16; i++) left_of_transposed<square_at>(given[i], of.dz, l, 0, 16 * i);
  }
  if (which & 1) {
#pragma unroll
    for (int i = 0; i < N / 16; i++) right<square_at>(met[i], of.minus_f, l, 16 * i, 0);
  } else {
#pragma unroll
    for (int i = 0; i < N / 16; i++) right_of_transposed<tokens_at>(met[i], of.chunk.V, l, 0, 16 * i);
  }
#pragma unroll
  for (int i = 0; i < N / 16; i++) multiply_add(product, given[i], met[i]);
}
DEVICE void store_scores(Squares& to, const float (&product)[2][4], int which, const Lane& l) {
  store_lower(to[which], product[0], 0, which < 2 ? 0 : 1, l);
  store_lower(to[which], product[1], 8, which < 2 ? 0 : 1, l);
}

// Two warps share 16 keys: one is in charge of the reads, R and A, the other (`keys`) of the keys, K and E.
struct Share {
  bool keys;
  int warp, first;                   // of the 16 keys
  float one[2][4], two[2][4];        // dR and dA, or dK and dE
  float through[4];                  // of the keys, on the diagonals of two 8 x 8: sums over values of P S0
  u32 One[4], Two[4];                // what of R and A, or K and E, stands where they do
  float4 kept[2] = {}, own[2] = {};  // until the other warp's part is here
  METHOD Share(bool keys, int warp) : keys(keys), warp(warp), first(warp / 2 * 16) {}

  // What comes from the states.
  METHOD void from_states(const Known& of, const Lane& l) {
#pragma unroll
    for (int i = 0; i < 8; i++) one[i >> 2][i & 3] = two[i >> 2][i & 3] = through[i & 3] = 0;
    const f16 *y = keys ? of.chunk.V : of.dY, *z = keys ? of.minus_f : of.dz, *to = keys ? of.P : of.S0;
    u32 x[4], b[4];
#pragma unroll
    for (int value = 0; value < N; value += 16) {
      right<state_at>(b, to, l, value, first);
      left<tokens_at>(x, y, l, 0, value);
      multiply_add(one, x, b);
      left_of_transposed<square_at>(x, z, l, 0, value);
      multiply_add(two, x, b);
      if (!keys) continue;
      right<state_at>(x, of.S0, l, value, first);
      multiply_add(through, {b[0], 0, b[1], 0}, x[0], x[1]);
      multiply_add(through, {0, b[2], 0, b[3]}, x[2], x[3]);
    }
  }

  // What the end of the chunk passes on to every decay in it, for the last token's lanes: sums over values of P and the
  // state, and over tokens of the keys that enter it.
  METHOD float4 carry(const Chunk& chunk, const Lane& l) {
    left<tokens_at>(One, keys ? chunk.K : chunk.R, l, 0, first);
    left<tokens_at>(Two, keys ? chunk.E : chunk.A, l, 0, first);
    float4 sum = {0, 0, 0, 0};
    if (!keys) return sum;
#pragma unroll
    for (int t = 0; t < 2; t++) sum = sum + first_of(t) + second_of(t);
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) sum = sum + each(sum, [&](float x) { return shuffle_xor(x, mask); });
    bool odd = l.group & 1;
    float low = odd ? through[1] : through[0], high = odd ? through[3] : through[2];
    int from = 9 * (l.lane & 3);  // the lane of the first of this lane's pair on a diagonal; four lanes on the second
    return sum + float4{shuffle(low, from), shuffle(low, from + 4), shuffle(high, from), shuffle(high, from + 4)};
  }
  METHOD float4 first_of(int t) const { return unpack_split(One[t], One[t + 2]) * four_of(one, t); }
  METHOD float4 second_of(int t) const { return unpack_split(Two[t], Two[t + 2]) * four_of(two, t); }

  // What comes from the other tokens of the chunk: those whose keys are read, or those that read a key.
  METHOD void from_scores(const Chunk& chunk, const Squares& scores, const Lane& l) {
    u32 low[4], high[4];
    right<tokens_at>(low, keys ? chunk.R : chunk.K, l, 0, first);
    right<tokens_at>(high, keys ? chunk.A : chunk.E, l, 0, first);
    if (keys) add_scores<left_of_transposed<square_at>>(scores, dak_, dre_, low, high, l);
    else add_scores<left<square_at>>(scores, dre_, dak_, low, high, l);
  }
  template <void (*load)(u32 (&)[4], const f16*, const Lane&, int, int)>
  METHOD void add_scores(const Squares& scores, int to_one, int to_two, const u32 (&low)[4], const u32 (&high)[4], const Lane& l) {
    u32 x[4];
    load(x, scores[drk_], l, 0, 0);
    multiply_add(one, x, low);
    load(x, scores[to_one], l, 0, 0);
    multiply_add(one, x, high);
    load(x, scores[to_two], l, 0, 0);
    multiply_add(two, x, low);
    load(x, scores[dae_], l, 0, 0);
    multiply_add(two, x, high);
  }

  // What the other warp needs, to `exchange`, which has 8 KB: of the keys what reaches the decays up to their token's,
  // and the last token's what the chunk's end passes on to all; of A what kappa receives.
  METHOD void give(void* exchange, float4 carry, const float* running, const Unit& unit, const Lane& l) {
    float4 sent[2];
#pragma unroll
    for (int t = 0; t < 2; t++) {
      if (keys) {
        sent[t] = (first_of(t) + second_of(t)) * -1;
        if (t == 1 && l.group == 7) sent[t] = carry + sent[t];
      } else {
        own[t] = second_of(t), kept[t] = first_of(t) + own[t];
        sent[t] = four_of(two, t) * unit.power(load_four(running + sums_at(l.group + 8 * t, first + l.four)));
      }
    }
#pragma unroll
    for (int t = 0; t < 2; t++) place_of(exchange, warp, t, l) = sent[t];
  }
  METHOD static float4& place_of(const void* exchange, int warp, int t, const Lane& l) {
    return ((float4*)exchange)[l.lane + 32 * (2 * warp + t)];
  }

  // Those gradients of the inputs, of chunk `at`, that need nothing of the other warp's.
  METHOD void store(const Outputs& to, const IO (&inputs)[LOADS][Q * N], const float* running, const Unit& unit, const Sequence& s, int at, const Lane& l) {
#pragma unroll
    for (int t = 0; t < 2; t++) {
      int token = at * Q + l.group + 8 * t, from = raw_at(l.group + 8 * t, first + l.four);
      float4 g = load_four(running + sums_at(l.group + 8 * t + 1, first + l.four));
      float4 shrunk = unit.power(keys ? g * -1 : g), gone = four_of(two, t) * shrunk;
      i64 here = to.at + s.token(token) + first + l.four;
      if (keys) kept[t] = load_four(inputs[a_] + from) * gone;
      if (token >= s.length) continue;
      store_four((keys ? to.k : to.r) + here, four_of(one, t) * shrunk);
      if (keys) store_four(to.a + here, load_four(inputs[kappa_] + from) * gone);
    }
  }

  // The others: of kappa, and of log_w, the sum of what reaches the decay of a token: from it and all later ones, but for
  // its own A.
  METHOD void settle(const Outputs& to, const void* exchange, float down, const Sequence& s, int at, const Lane& l) {
    float4 x[2];
#pragma unroll
    for (int t = 0; t < 2; t++) x[t] = kept[t] + place_of(exchange, warp ^ 1, t, l);
    if (!keys) {
#pragma unroll
      for (int by = 1; by < 8; by *= 2)
#pragma unroll
        for (int t = 0; t < 2; t++)
          x[t] = each(x[t], [&](float y) {
            float later = shuffle_down(y, 4 * by);
            return l.group + by < 8 ? y + later : y;
          });
      x[0] = x[0] + each(x[1], [&](float y) { return shuffle(y, l.lane & 3); });
#pragma unroll
      for (int t = 0; t < 2; t++) x[t] = (x[t] - own[t]) * down;
    }
#pragma unroll
    for (int t = 0; t < 2; t++) {
      int token = at * Q + l.group + 8 * t;
      if (token < s.length) store_four((keys ? to.kappa : to.log_w) + to.at + s.token(token) + first + l.four, x[t]);
    }
  }
};
