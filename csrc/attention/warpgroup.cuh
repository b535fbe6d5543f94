// What the warpgroups of attention kernels share: barriers, and the pieces of a running softmax over fragments.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "../common/vector.cuh"

namespace dsv3 {

constexpr float kLn2 = 0.693147180559945309f;

// ---- barriers ----
// For threads of a warp that the compiler may have let come apart, which compute-sanitizer's synccheck sees.
__device__ __forceinline__ void named_sync_apart(int id, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- softmax ----
// A thread has two rows of a fragment, 8 apart, and of every 8 columns two.
struct RowState {
  float max[2] = {-INFINITY, -INFINITY};  // of the scaled scores, to base 2
  float sum[2] = {0.f, 0.f};              // of this warpgroup's tiles, this thread's columns
};

// The maximum that is subtracted changes only where a score exceeds it by more (to base 2), so that the output is seldom
// rescaled; probabilities up to 2^kSlack lose nothing in floating point.
constexpr float kSlack = 8.f;
// Of a maximum over no scores, something that can be subtracted.
__device__ __forceinline__ float finite(float max) { return max == -INFINITY ? 0.f : max; }
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// ---- output ----
__device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, bool upper, int distance) {
  const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
  if (upper) {
    low = got;
  } else {
    high = got;
  }
}
// Row r of the thread's two: the four lanes of a row exchange their pairs of columns for 16 bytes in a row.
template <int kSize>
__device__ __forceinline__ void write_row(__nv_bfloat16* to, const float (&out)[kSize], int r, bool writes) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kSize / 4; j += 4) {
    uint32_t w[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) w[k] = pack_bf16(out[4 * (j + k) + 2 * r], out[4 * (j + k) + 2 * r + 1]);
    exchange(w[0], w[1], q & 1, 1);
    exchange(w[2], w[3], q & 1, 1);
    exchange(w[0], w[2], q & 2, 2);
    exchange(w[1], w[3], q & 2, 2);
    if (writes) *reinterpret_cast<uint4*>(to + (j + q) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

}  // namespace dsv3
