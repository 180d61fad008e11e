// One step of a head's state in place, and what is read of it: S <- S diag(w) - (S kappa) removal^T + v k^T, y = S r,
// its norm, bonus and gate. A block takes a head of a row of the batch; the state is asked for before the kernel ahead
// has ended.
//
// Options: IO (bf16, f16), C channels.
#include "step.cuh"

constexpr int N = 64, HEADS = C / N, THREADS = 256;
constexpr float NORM_EPS = N * 1e-5f;
struct Shared { float y[N]; };

DEVICE float sum_of(float4 x) { return (x.x + x.y) + (x.z + x.w); }
// Over 16 lanes, in each of them: lanes share the work, then what they found.
DEVICE float4 sum_of_lanes(float4 x) {
  const int lane = thread() % 16;
  const bool high = lane & 8, odd = lane & 4;
  float2 half = high ? float2{x.z, x.w} : float2{x.x, x.y};
  half.x += shuffle_xor(high ? x.x : x.z, 8);
  half.y += shuffle_xor(high ? x.y : x.w, 8);
  float one = odd ? half.y : half.x;
  one += shuffle_xor(odd ? half.x : half.y, 4);
  one += shuffle_xor(one, 2);
  one += shuffle_xor(one, 1);
  const float other = shuffle_xor(one, 4);
  half = odd ? float2{other, one} : float2{one, other};
  const float2 rest = {shuffle_xor(half.x, 8), shuffle_xor(half.y, 8)};
  return high ? float4{rest.x, rest.y, half.x, half.y} : float4{half.x, half.y, rest.x, rest.y};
}

KERNEL(THREADS, 4) wkv7_step_state(
    const IO* r,              // [B, C]
    const float* made,        // [MADE, B, C]
    const float* bonus,       // [B, HEADS]
    const IO* norm_weight, const IO* norm_bias,  // [C]
    float* state,             // [slots, HEADS, N, N]
    const int* slots,         // [B]; a negative one is that of a row of padding
    IO* out,                  // [B, C]
    i64 B) {
  let_next_begin();
  Shared& shared = *(Shared*)shared_memory();
  // 16 lanes share four rows of the state, a lane has four keys of them
  const int head = block_x(), value = thread() / 16 * 4, key = thread() % 16 * 4;
  const i64 row = block_y(), slot = slots[row], at = row * C + head * N;
  if (slot < 0) return;
  float* mine = state + (slot * HEADS + head) * N * N + value * N + key;
  float4 S[4];
#pragma unroll
  for (int i = 0; i < 4; i++) S[i] = load_four(mine + i * N);
  wait_for_previous();

  auto given = [&](int which, int channel) { return load_four(made + which * B * C + at + channel); };
  const float4 kappa = given(KAPPA, key), removal = given(REMOVAL, key), w = given(DECAY, key), k = given(KEY, key);
  const float4 v = given(VALUE, value), r_ = load_four(r + at + key);
  const float4 removed =
      sum_of_lanes({sum_of(S[0] * kappa), sum_of(S[1] * kappa), sum_of(S[2] * kappa), sum_of(S[3] * kappa)});
  const float removals[4] = {removed.x, removed.y, removed.z, removed.w}, values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    S[i] = S[i] * w - removal * removals[i] + k * values[i];
    store_four(mine + i * N, S[i]);
  }
  const float4 y = sum_of_lanes({sum_of(S[0] * r_), sum_of(S[1] * r_), sum_of(S[2] * r_), sum_of(S[3] * r_)});
  if (thread() % 16 == 0) store_four(&shared.y[value], y);
  sync_threads();
  if (thread() >= 32) return;

  const int two = 2 * thread();
  float2 found = load_pair(&shared.y[two]);
  const float mean = sum_of_warp(found.x + found.y) / N;
  found = {found.x - mean, found.y - mean};
  const float scale = 1 / sqrtf(sum_of_warp(found.x * found.x + found.y * found.y) / N + NORM_EPS);
  const float read = bonus[row * HEADS + head];
  const float2 weight = load_pair(norm_weight + head * N + two), bias = load_pair(norm_bias + head * N + two);
  const float2 own = load_pair(made + VALUE * B * C + at + two), gate = load_pair(made + GATE * B * C + at + two);
  store_pair(out + at + two, (found.x * scale * weight.x + bias.x + read * own.x) * gate.x,
             (found.y * scale * weight.y + bias.y + read * own.y) * gate.y);
}

SIZES(THREADS, sizeof(Shared));
