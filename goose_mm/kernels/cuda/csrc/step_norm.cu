// Before a product: what the last ones gave is added to the residual stream, which is normalised and mixed with the
// token before. A block takes a row of the batch.
//
// Options: IO (bf16, f16), C channels, MIXES (0: no token shift, the norm itself).
#include "step.cuh"

constexpr int THREADS = C >= 2048 ? 512 : 256, PAIRS = C / 2, MINE = (PAIRS + THREADS - 1) / THREADS;
struct Shared { float scratch[4][THREADS / 32]; };

// Of a row, this thread has the pairs thread, thread + THREADS, ...
DEVICE int pair_at(int i) { return 2 * (thread() + i * THREADS); }
struct Pairs {
  float2 of[MINE];
  template <class T> METHOD void load(const T* row) {
#pragma unroll
    for (int i = 0; i < MINE; i++) of[i] = row && pair_at(i) < C ? load_pair(row + pair_at(i)) : float2{0, 0};
  }
  template <class T> METHOD void store(T* row) const {
#pragma unroll
    for (int i = 0; i < MINE; i++)
      if (pair_at(i) < C) store_pair(row + pair_at(i), of[i].x, of[i].y);
  }
};

// (x - mean) / sqrt(variance + 1e-5) * weight + bias
DEVICE void normalise(Pairs& x, const Pairs& weight, const Pairs& bias, float (*scratch)[THREADS / 32]) {
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < MINE; i++) sum += x.of[i].x + x.of[i].y;
  float mean = sum_of_block<THREADS>(sum, scratch[0]) / C;
#pragma unroll
  for (int i = 0; i < MINE; i++)
    if (pair_at(i) < C) {
      float2& at = x.of[i];
      at = {at.x - mean, at.y - mean};
      squares += at.x * at.x + at.y * at.y;
    }
  float scale = 1 / sqrtf(sum_of_block<THREADS>(squares, scratch[1]) / C + 1e-5f);
#pragma unroll
  for (int i = 0; i < MINE; i++) {
    float2 w = weight.of[i], b = bias.of[i];
    x.of[i] = {x.of[i].x * scale * w.x + b.x, x.of[i].y * scale * w.y + b.y};
  }
}

KERNEL(THREADS, 1) wkv7_step_norm(
    const i64* tokens,        // [B], of a first layer: the stream begins with their embeddings, else null
    const IO* embedding,      // [V, C]
    const IO* first_weight,   // [C] each, the norm of embeddings
    const IO* first_bias,
    float* x,                 // [B, C] the residual stream
    const float* sums,        // [parts, B, C] to be added to it
    const IO* weight,         // [C] each
    const IO* bias,
    const IO* mu,             // [MIXES, C]
    IO* carried,              // [slots, C] the token before, replaced by this one
    const int* slots,         // [B]; a negative one is that of a row of padding
    IO* out,                  // [MIXES, B, C], or [B, C] if there are none
    i64 B, i64 parts) {
  let_next_begin();
  Shared& shared = *(Shared*)shared_memory();
  i64 row = block_x(), slot = slots[row];
  Pairs w, b, mix[MIXES + 1], before, y;  // all that the kernel ahead does not write is asked for at once
  w.load(weight), b.load(bias);
#pragma unroll
  for (int m = 0; m < MIXES; m++) mix[m].load(mu + m * C);
  before.load(MIXES && slot >= 0 ? carried + slot * C : nullptr);
  wait_for_previous();
  if (slot < 0) return;
  if (tokens) {
    Pairs first_w, first_b;
    first_w.load(first_weight), first_b.load(first_bias);
    y.load(embedding + tokens[row] * C);
    normalise(y, first_w, first_b, shared.scratch + 2);
  } else {
    y.load(x + row * C);
  }
  for (int part = 0; part < parts; part++) {
    Pairs more;
    more.load(sums + (part * B + row) * C);
#pragma unroll
    for (int i = 0; i < MINE; i++) y.of[i] = {y.of[i].x + more.of[i].x, y.of[i].y + more.of[i].y};
  }
  if (tokens || parts) y.store(x + row * C);
  normalise(y, w, b, shared.scratch);
  if (MIXES == 0) {
    y.store(out + row * C);
    return;
  }
  y.store(carried + slot * C);
#pragma unroll
  for (int m = 0; m < MIXES; m++) {
#pragma unroll
    for (int i = 0; i < MINE; i++) {
      float2 at = y.of[i], old = before.of[i], &t = mix[m].of[i];
      t = {at.x + (old.x - at.x) * t.x, at.y + (old.y - at.y) * t.y};
    }
    mix[m].store(out + (m * B + row) * C);
  }
}

SIZES(THREADS, sizeof(Shared));
