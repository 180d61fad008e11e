// From the products of a time mix to what a step of the state wants: gates, keys, values. A block takes a head of ROWS
// rows of the batch.
//
// Options: IO (bf16, f16), ROWS (8, 32), C channels, A_MAX, and the ranks of the gates RANK_W, RANK_A, RANK_V, RANK_G.
#include "step.cuh"

constexpr int N = 64, WARPS = 8, THREADS = 32 * WARPS, MINE = ROWS / WARPS;  // rows of a warp
constexpr int HIDDEN = RANK_W + RANK_A + RANK_V + RANK_G, STRIDE = (HIDDEN + 63) / 64 * 64 + 32;
constexpr float DECAY_FLOOR = -0.6065306597126334f;  // -exp(-1/2)

struct Shared {
  IO hidden[ROWS][STRIDE];
  float gates[4][ROWS][N + 4];  // decay, a, mix towards the first layer's values, output gate
};

// gates[row, channel] = sum over the rank of second[channel, rank] hidden[row, rank], of 16 channels by a warp
template <int rank> struct Second {
  uint4 weights[rank / 32][2];
  METHOD void request(const IO* second) {
    if (!second) return;
    const IO* lane = second + (i64)(thread() % 32 / 4) * rank + thread() % 4 * 8;
#pragma unroll
    for (int i = 0; i < rank / 32; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) weights[i][half] = load_once(lane + 8 * half * rank + 32 * i);
  }
  METHOD void multiply(const IO* hidden, float (*gate)[N + 4], int channel, int rows) const {
    int lane = thread() % 32, group = lane / 4, pair = 2 * (lane % 4);
    float sums[MINE][4] = {};
#pragma unroll
    for (int i = 0; i < rank / 32; i++)
#pragma unroll
      for (int n = 0; n < MINE; n++) {
        int row = 8 * n + group;
        uint4 b = *(const uint4*)(hidden + (row < rows ? row : 0) * STRIDE + 32 * i + lane % 4 * 8);
        const uint4 &top = weights[i][0], &bottom = weights[i][1];
        const u32 even[4] = {top.x, bottom.x, top.y, bottom.y}, odd[4] = {top.z, bottom.z, top.w, bottom.w};
        multiply_add(sums[n], even, b.x, b.y, IO());
        multiply_add(sums[n], odd, b.z, b.w, IO());
      }
#pragma unroll
    for (int n = 0; n < MINE; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) gate[8 * n + pair + j % 2][channel + group + j / 2 * 8] = sums[n][j];
  }
};

KERNEL(THREADS, 2) wkv7_step_gates(
    const IO* r, const IO* k, const IO* v,                    // [B, C]
    const IO* hidden,                                         // [B, HIDDEN] of the four gates
    const IO* w2, const IO* a2, const IO* v2, const IO* g2,   // [C, rank]; v2 null in the first layer
    const IO* w0, const IO* a0, const IO* v0,                 // [C]
    const IO* k_k, const IO* k_a, const IO* r_k,              // [C]
    IO* v_first,                                              // [B, C] the first layer's values
    float* made,                                              // [MADE, B, C]
    float* bonus,                                             // [B, C / N] what a head reads of the current token
    i64 B) {
  let_next_begin();
  Shared& shared = *(Shared*)shared_memory();
  const int warp = thread() / 32, lane = thread() % 32, head = block_x(), channel = head * N + warp % 4 * 16;
  const int first = block_y() * ROWS, rows = B - first < ROWS ? B - first : ROWS;
  Second<RANK_W> second_w;
  Second<RANK_A> second_a;
  Second<RANK_V> second_v;
  Second<RANK_G> second_g;
  if (warp < 4) {
    second_w.request(w2 + (i64)channel * RANK_W);
    second_a.request(a2 + (i64)channel * RANK_A);
    second_v.request(v2 ? v2 + (i64)channel * RANK_V : nullptr);
  } else {
    second_g.request(g2 + (i64)channel * RANK_G);
  }
  // a warp works out every eighth row of the batch, a lane two channels of it
  const int two = 2 * lane, at = head * N + two;
  const float2 w_bias = load_pair(w0 + at), a_bias = load_pair(a0 + at);
  const float2 v_bias = v2 ? load_pair(v0 + at) : float2{0, 0};
  const float2 keyed = load_pair(k_k + at), scaled = load_pair(k_a + at), bonus_weight = load_pair(r_k + at);
  wait_for_previous();

  for (int i = thread(); i < rows * (HIDDEN / 8); i += THREADS) {
    int row = i / (HIDDEN / 8), column = i % (HIDDEN / 8) * 8;
    *(uint4*)&shared.hidden[row][column] = *(const uint4*)(hidden + (i64)(first + row) * HIDDEN + column);
  }
  sync_threads();
  if (warp < 4) {
    second_w.multiply(&shared.hidden[0][0], shared.gates[0], warp % 4 * 16, rows);
    second_a.multiply(&shared.hidden[0][RANK_W], shared.gates[1], warp % 4 * 16, rows);
    if (v2) second_v.multiply(&shared.hidden[0][RANK_W + RANK_A], shared.gates[2], warp % 4 * 16, rows);
  } else {
    second_g.multiply(&shared.hidden[0][RANK_W + RANK_A + RANK_V], shared.gates[3], warp % 4 * 16, rows);
  }
  float2 r_[MINE], k_[MINE], v_[MINE], first_values[MINE];
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    int row = warp + 8 * i;
    const i64 here = (i64)(first + (row < rows ? row : 0)) * C + at;
    r_[i] = load_pair(r + here), k_[i] = load_pair(k + here), v_[i] = load_pair(v + here);
    first_values[i] = v2 ? load_pair(v_first + here) : float2{0, 0};
  }
  sync_threads();

#pragma unroll
  for (int i = 0; i < MINE; i++) {
    const int row = warp + 8 * i;
    if (row >= rows) return;
    const i64 here = (i64)(first + row) * C + at;
    auto gate = [&](int which) { return load_pair(&shared.gates[which][row][two]); };
    float2 value = v_[i];
    if (v2) {
      float2 mix = gate(2);
      value.x += (first_values[i].x - value.x) * sigmoid(v_bias.x + mix.x);
      value.y += (first_values[i].y - value.y) * sigmoid(v_bias.y + mix.y);
    } else {
      store_pair(v_first + here, value.x, value.y);
    }
    const float2 decay = gate(0), rate = gate(1), output = gate(3);
    const float2 w = {expf(DECAY_FLOOR * sigmoid(w_bias.x + decay.x)), expf(DECAY_FLOOR * sigmoid(w_bias.y + decay.y))};
    const float2 a = {sigmoid(a_bias.x + rate.x), sigmoid(a_bias.y + rate.y)};
    float2 kappa = {k_[i].x * keyed.x, k_[i].y * keyed.y};
    const float length = largest(sqrtf(sum_of_warp(kappa.x * kappa.x + kappa.y * kappa.y)), 1e-12f);
    kappa = {kappa.x / length, kappa.y / length};
    const float2 key = {k_[i].x * (1 + (a.x - 1) * scaled.x), k_[i].y * (1 + (a.y - 1) * scaled.y)};
    const float read = sum_of_warp(r_[i].x * key.x * bonus_weight.x + r_[i].y * key.y * bonus_weight.y);
    if (lane == 0) bonus[(i64)(first + row) * (C / N) + head] = read;
    const float2 results[MADE] = {w, key, value, kappa, {kappa.x * (a.x * A_MAX), kappa.y * (a.y * A_MAX)}, output};
#pragma unroll
    for (int j = 0; j < MADE; j++) store_pair(made + j * B * C + here, results[j].x, results[j].y);
  }
}

SIZES(THREADS, sizeof(Shared));
