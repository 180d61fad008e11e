// The functions of device.cuh for a CPU: a block's threads are fibers that take turns, in an order
// drawn anew at every barrier, so that a missing barrier gives wrong numbers sooner or later.
// Asynchronous copies arrive when they are waited for, and not before.
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <random>
#include <vector>

#define DEVICE static inline
#define METHOD inline
#define KERNEL(threads, blocks) static void
#define SIZES(threads, bytes) static_assert(threads && bytes, "")

struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };

namespace simt {

struct Copy { void* to; const void* from; bool valid; };
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
  bool done;
};
struct Exchange { uint32_t word[8]; const f16* address; };
struct Barrier { int arrived = 0; long generation = 0; };

inline std::vector<Fiber> fibers;
inline std::vector<Exchange> exchange;
inline std::vector<Barrier> warps;
inline Barrier block, groups[16];
inline std::vector<char> memory;
inline ucontext_t scheduler;
inline int current, x, y, width;
inline std::mt19937 order{1};
inline const char* failure;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }
inline void meet(Barrier& barrier, int count) {
  long generation = barrier.generation;
  if (++barrier.arrived == count) barrier.arrived = 0, barrier.generation++;
  while (barrier.generation == generation) yield();
}
inline void meet_warp() { meet(warps[current / 32], 32); }

template <class Body> void run_block(int threads, size_t bytes, Body body) {
  static Body* entered;
  entered = &body;
  fibers = std::vector<Fiber>(threads);
  exchange.assign(threads, {});
  warps.assign(threads / 32, {});
  block = {};
  for (auto& group : groups) group = {};
  // NaN in every type: what is read must have been written
  memory.assign(bytes + 128, (char)0xff);
  for (auto& fiber : fibers) {
    fiber.stack.resize(1 << 17);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, (void (*)())+[] { (*entered)(); fibers[current].done = true; }, 0);
  }
  std::vector<int> turn(threads);
  for (int i = 0; i < threads; i++) turn[i] = i;
  for (int left = threads; left;) {
    std::shuffle(turn.begin(), turn.end(), order);
    left = 0;
    for (int i : turn)
      if (!fibers[i].done) {
        current = i;
        swapcontext(&scheduler, &fibers[i].context);
        left += !fibers[i].done;
      }
  }
}
template <class Body> void launch(int grid_x, int grid_y, int threads, size_t bytes, Body body) {
  width = grid_x;
  failure = nullptr;
  for (y = 0; y < grid_y; y++)
    for (x = 0; x < grid_x; x++) run_block(threads, bytes, body);
}

inline float to_float(u16 h) { _Float16 f; memcpy(&f, &h, 2); return f; }
inline float from_bits(u32 x) { float y; memcpy(&y, &x, 4); return y; }
inline u16 to_half(float x) { _Float16 f = x; u16 h; memcpy(&h, &f, 2); return h; }
}  // namespace simt

DEVICE int thread() { return simt::current; }
DEVICE int thread_anew() { return thread(); }
DEVICE int block_x() { return simt::x; }
DEVICE int block_y() { return simt::y; }
DEVICE int blocks_x() { return simt::width; }
DEVICE char* shared_memory() { return (char*)(((uintptr_t)simt::memory.data() + 127) & ~(uintptr_t)127); }
DEVICE void sync_threads() { simt::meet(simt::block, simt::fibers.size()); }
DEVICE void sync_group(int barrier, int threads) { simt::meet(simt::groups[barrier], threads); }
DEVICE void sync_warp() { simt::meet_warp(); }

template <class T> T from_lane(T value, int lane) {
  memcpy(simt::exchange[thread()].word, &value, sizeof value);
  simt::meet_warp();
  T other;
  memcpy(&other, simt::exchange[(thread() & ~31) + lane].word, sizeof other);
  simt::meet_warp();
  return other;
}
template <class T> T shuffle(T x, int lane) { return from_lane(x, lane & 31); }
template <class T> T shuffle_xor(T x, int mask) { return from_lane(x, (thread() & 31) ^ mask); }
template <class T> T shuffle_down(T x, int by) { return from_lane(x, std::min((thread() & 31) + by, 31)); }

DEVICE u32 largest_of_warp(u32 x) {
  for (int mask = 16; mask; mask /= 2) x = std::max(x, shuffle_xor(x, mask));
  return x;
}

DEVICE void copy_async(void* to, const void* from, bool valid) {
  if ((uintptr_t)to % 16 || (uintptr_t)from % 16) simt::failure = "a copy of 16 bytes is not aligned";
  simt::fibers[thread()].open.push_back({to, from, valid});
}
DEVICE void prefetch(const void*) {}
DEVICE void copy_commit() {
  auto& fiber = simt::fibers[thread()];
  fiber.groups.push_back(fiber.open);
  fiber.open.clear();
}
template <int pending> void copy_wait() {
  auto& groups = simt::fibers[thread()].groups;
  for (; groups.size() > pending; groups.pop_front())
    for (auto& copy : groups.front())
      if (copy.valid) memcpy(copy.to, copy.from, 16);
      else memset(copy.to, 0, 16);
}

DEVICE void load_matrices(u32 (&r)[4], const f16* p, bool transposed) {
  if ((uintptr_t)p % 16) simt::failure = "a row of a matrix is not aligned";
  simt::exchange[thread()].address = p;
  simt::meet_warp();
  int lane = thread() & 31, row = lane / 4, col = 2 * (lane % 4);
  for (int i = 0; i < 4; i++) {
    const simt::Exchange* rows = &simt::exchange[(thread() & ~31) + 8 * i];
    u32 low = transposed ? rows[col].address[row].bits : rows[row].address[col].bits;
    u32 high = transposed ? rows[col + 1].address[row].bits : rows[row].address[col + 1].bits;
    r[i] = low | high << 16;
  }
  simt::meet_warp();
}
DEVICE void load_matrices(u32 (&r)[4], const f16* p) { load_matrices(r, p, false); }
DEVICE void load_transposed(u32 (&r)[4], const f16* p) { load_matrices(r, p, true); }

template <class Float>
void multiply_add_as(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Float to_float) {
  u32* word = simt::exchange[thread()].word;
  memcpy(word, a, 16), word[4] = b0, word[5] = b1;
  simt::meet_warp();
  const simt::Exchange* warp = &simt::exchange[thread() & ~31];
  auto half = [&](u32 w, int i) { return to_float(w >> 16 * (i & 1)); };
  for (int i = 0; i < 4; i++) {
    int lane = thread() & 31, row = lane / 4 + 8 * (i >> 1), col = 2 * (lane % 4) + (i & 1);
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      float x = half(warp[4 * (row & 7) + k / 2 % 4].word[(row >> 3) + 2 * (k >> 3)], k);
      float y = half(warp[4 * col + k / 2 % 4].word[4 + (k >> 3)], k);
      sum += (double)x * y;
    }
    c[i] = sum;
  }
  simt::meet_warp();
}
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  multiply_add_as(c, a, b0, b1, [](u32 h) { return simt::to_float((u16)h); });
}
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) { multiply_add(c, a, b0, b1); }
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
  multiply_add_as(c, a, b0, b1, [](u32 h) { return simt::from_bits(h << 16); });
}

DEVICE uint4 load_once(const void* p) {
  if ((uintptr_t)p % 16) simt::failure = "a load of 16 bytes is not aligned";
  return *(const uint4*)p;
}
DEVICE void wait_for_previous() {}
DEVICE void let_next_begin() {}

DEVICE float exp2_fast(float x) { return exp2f(x); }
DEVICE u32 pack_f16(float low, float high) { return simt::to_half(low) | (u32)simt::to_half(high) << 16; }
DEVICE u32 float_bits(float x) { u32 y; memcpy(&y, &x, 4); return y; }
DEVICE float bits_float(u32 x) { float y; memcpy(&y, &x, 4); return y; }
DEVICE u32 to_bf16(float x) { u32 b = float_bits(x); return (b + 0x7fff + (b >> 16 & 1)) >> 16; }
DEVICE u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
DEVICE float2 unpack_f16(u32 x) { return {simt::to_float(x), simt::to_float(x >> 16)}; }
DEVICE float largest(float a, float b) { return fmaxf(a, b); }
DEVICE float smallest(float a, float b) { return fminf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }
DEVICE void require(bool condition, const char* what) { if (!condition) simt::failure = what; }
