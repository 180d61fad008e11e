// What the kernels ask of the machine: a dozen instructions, each behind a function.
// Tests compile the same kernels for the CPU, with these functions emulated (tests/kernels/simt.h).
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

#ifdef EMULATED
#include "simt.h"
#else

#define DEVICE static __device__ __forceinline__
#define METHOD __device__ __forceinline__
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)

// The size of a variable can be asked of a compiled module.
#define SIZES(threads, bytes) extern "C" { __device__ char block_size[threads], shared_size[bytes]; }

// Whether a multiprocessor has the shared memory for two blocks that want half of 227 kB each.
#define AMPLE (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)

DEVICE int thread() { return threadIdx.x; }
// The same, but what is computed from it is computed here: not before a loop, to lie in registers all through it.
DEVICE int thread_anew() {
  int x = threadIdx.x;
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int blocks_x() { return gridDim.x; }
DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}
DEVICE void sync_threads() { __syncthreads(); }
// Only some warps, `threads` in number, at a barrier of their own, 1 to 15.
DEVICE void sync_group(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
DEVICE void sync_warp() { __syncwarp(); }

template <class T> DEVICE T shuffle(T x, int lane) { return __shfl_sync(~0u, x, lane); }
template <class T> DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
template <class T> DEVICE T shuffle_down(T x, int by) { return __shfl_down_sync(~0u, x, by); }
DEVICE u32 largest_of_warp(u32 x) { return __reduce_max_sync(~0u, x); }

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 16 bytes from global to shared memory, or zeros.
DEVICE void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;"); }
template <int pending> DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// 128 bytes of global memory, to where they are sooner at hand.
DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Four 8 x 8 matrices of f16; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], const f16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)) : "memory");
}
DEVICE void load_transposed(u32 (&r)[4], const f16* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(p)) : "memory");
}

// 16 bytes that no other block will ask for: they need no place in the first cache.
DEVICE uint4 load_once(const void* p) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
  return x;
}

// Programmatic dependent launch: a kernel may begin before those ahead of it in the stream have ended. What they write
// may be read, and what they read may be written, only after the wait.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// c [16 x 8] += a [16 x 16] b [16 x 8], 16 bits in, float32 out.
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, f16) { multiply_add(c, a, b0, b1); }

DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE u32 pack_f16(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u32 pack_bf16(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE float2 unpack_f16(u32 x) {
  float2 y;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
      : "=f"(y.x), "=f"(y.y) : "r"(x));
  return y;
}
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
DEVICE float largest(float a, float b) { return fmaxf(a, b); }
DEVICE float smallest(float a, float b) { return fminf(a, b); }
DEVICE float magnitude(float x) { return fabsf(x); }

extern "C" __device__ void __assertfail(const char*, const char*, u32, const char*, size_t);
DEVICE void require(bool condition, const char* what) {
  if (!condition) __assertfail(what, "wkv7", 0, "", 1);
}
#endif

// Two or four neighbours, from and to each type of input and output.
DEVICE float2 load_pair(const float* p) { return *(const float2*)p; }
DEVICE float2 load_pair(const f16* p) { return unpack_f16(*(const u32*)p); }
DEVICE float2 unpack_bf16(u32 x) { return {bits_float(x << 16), bits_float(x & 0xffff0000u)}; }
DEVICE float2 load_pair(const bf16* p) { return unpack_bf16(*(const u32*)p); }
DEVICE float4 load_four(const float* p) { return *(const float4*)p; }
DEVICE float4 load_four(const f16* p) {
  uint2 x = *(const uint2*)p;
  float2 low = unpack_f16(x.x), high = unpack_f16(x.y);
  return {low.x, low.y, high.x, high.y};
}
DEVICE float4 load_four(const bf16* p) {
  uint2 x = *(const uint2*)p;
  float2 low = unpack_bf16(x.x), high = unpack_bf16(x.y);
  return {low.x, low.y, high.x, high.y};
}
DEVICE void store_pair(float* p, float x, float y) { *(float2*)p = {x, y}; }
DEVICE void store_pair(f16* p, float x, float y) { *(u32*)p = pack_f16(x, y); }
DEVICE void store_pair(bf16* p, float x, float y) { *(u32*)p = pack_bf16(x, y); }
DEVICE void store_four(float* p, float4 x) { *(float4*)p = x; }
DEVICE void store_four(f16* p, float4 x) { *(u64*)p = pack_f16(x.x, x.y) | (u64)pack_f16(x.z, x.w) << 32; }
DEVICE void store_four(bf16* p, float4 x) { *(u64*)p = pack_bf16(x.x, x.y) | (u64)pack_bf16(x.z, x.w) << 32; }

DEVICE float4 operator*(float4 x, float4 y) { return {x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w}; }
DEVICE float4 operator*(float4 x, float y) { return {x.x * y, x.y * y, x.z * y, x.w * y}; }
DEVICE float4 operator+(float4 x, float4 y) { return {x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w}; }
DEVICE float4 operator-(float4 x, float4 y) { return {x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w}; }
template <class F> DEVICE float4 each(float4 x, F f) { return {f(x.x), f(x.y), f(x.z), f(x.w)}; }
