// Device side helpers: 16-byte vectors, conversions, warp and block reductions in a fixed order, programmatic launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dsv3 {

constexpr int kWarpSize = 32;

// Everything that an earlier kernel of the stream wrote is visible after this (no-op without programmatic launch).
__device__ __forceinline__ void wait_for_inputs() { cudaGridDependencySynchronize(); }
// The next kernel of the stream may be scheduled once every block has called this; it still waits for this grid's end
// to read.
__device__ __forceinline__ void release_dependents() { cudaTriggerProgrammaticLaunchCompletion(); }

// 16 bytes of T, held as raw words so that an array of them stays in registers.
template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Plain loads and stores: on an H200 evict-first or no-allocate loads beside plain stores cost swiglu 10%, and hints on
// both sides gained nothing.
template <class T>
__device__ __forceinline__ Vec<T> load(const T* p) {
  const uint4 raw = *reinterpret_cast<const uint4*>(p);
  return reinterpret_cast<const Vec<T>&>(raw);
}
template <class T>
__device__ __forceinline__ void store(T* p, const Vec<T>& v) {
  *reinterpret_cast<uint4*>(p) = reinterpret_cast<const uint4&>(v);
}
// The vector as fp32 and back (rounded to nearest even). They work on whole words: element access would make the
// compiler keep every 16-bit value in a register of its own.
__device__ __forceinline__ void unpack(const Vec<float>& v, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = v.values[i];
}
__device__ __forceinline__ void unpack(const Vec<__nv_bfloat16>& v, float (&x)[8]) {
  const uint4& raw = reinterpret_cast<const uint4&>(v);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void pack(const float (&x)[4], Vec<float>& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) v.values[i] = x[i];
}
__device__ __forceinline__ void pack(const float (&x)[8], Vec<__nv_bfloat16>& v) {
  __nv_bfloat162 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) words[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  reinterpret_cast<uint4&>(v) = reinterpret_cast<const uint4&>(words);
}

template <class T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}
template <class T>
__device__ __forceinline__ T from_float(float x) {
  return static_cast<T>(x);
}

// 2^x, 0 below 2^-126.
__device__ __forceinline__ float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Unsigned integers in the order of the floats, and back; 0 is below every float.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float float_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
  static constexpr float kIdentity = 0.f;
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  static constexpr float kIdentity = -INFINITY;
};

template <class Op>
__device__ __forceinline__ float warp_reduce(float x, Op op = {}) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Every thread of the block gets the result. `scratch` holds one float a warp and may be reused after a __syncthreads.
template <class Op, int kThreads>
__device__ __forceinline__ float block_reduce(float x, float* scratch, Op op = {}) {
  constexpr int kWarps = kThreads / kWarpSize;
  x = warp_reduce<Op>(x);
  if constexpr (kWarps == 1) return x;
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = threadIdx.x % kWarpSize < kWarps ? scratch[threadIdx.x % kWarpSize] : Op::kIdentity;
  return warp_reduce<Op>(x);
}

}  // namespace dsv3
