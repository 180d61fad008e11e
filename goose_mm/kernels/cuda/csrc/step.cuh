// What the kernels of one token share: sums over a block, loads and stores of single numbers, activations.
//
// A step is a chain of kernels for every layer: norm, products, gates, state, product, norm, product, product. Each begins
// while those ahead of it still run and asks for its weights then; it waits before it reads what they wrote. Only the
// memory of a row may be read before: the step before wrote it, and the first kernel of a step does not begin early.
#pragma once
#include "device.cuh"

// What `step_gates` makes for `step_state`, each [B, C].
enum Made { DECAY, KEY, VALUE, KAPPA, REMOVAL, GATE, MADE };

DEVICE float load_one(const float* p) { return *p; }
DEVICE float load_one(const bf16* p) { return bits_float((u32)p->bits << 16); }
DEVICE float load_one(const f16* p) { return unpack_f16(p->bits).x; }
DEVICE void store_one(float* p, float x) { *p = x; }
DEVICE void store_one(bf16* p, float x) { p->bits = (u16)pack_bf16(x, 0); }
DEVICE void store_one(f16* p, float x) { p->bits = (u16)pack_f16(x, 0); }

DEVICE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

DEVICE float sum_of_warp(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}
// The same in every thread; `scratch` holds a number for each warp, and must not be in use.
template <int threads> DEVICE float sum_of_block(float x, float* scratch) {
  x = sum_of_warp(x);
  if (thread() % 32 == 0) scratch[thread() / 32] = x;
  sync_threads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < threads / 32; i++) sum += scratch[i];
  return sum;
}
