// From fragments of the tensor core to rows of bf16 in memory, a warp at a time: 16 rows, through shared memory so that
// stores are 16 bytes a lane and runs of a row.
#pragma once

#include "backward.cuh"

namespace dsv3 {

constexpr int kScratch = 16 * 128;  // bytes: 16 rows of 64 columns under the swizzle of matrix tiles

// kSteps * 16 columns of a fragment, times a factor.
template <int kSteps>
__device__ __forceinline__ void stage_rows(const float* d, float factor, uint32_t scratch) {
  const int lane = threadIdx.x % kWarpSize, row = lane % 16;
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = pack_bf16(d[8 * k + 2 * i] * factor, d[8 * k + 2 * i + 1] * factor);
    store_matrices(scratch + row * 128 + ((2 * k + lane / 16) ^ (row % 8)) * 16, v);
  }
}

// `rows` of them (perhaps none, or more than 16) to rows `stride` elements apart.
template <int kSteps>
__device__ __forceinline__ void copy_rows(uint32_t scratch, __nv_bfloat16* target, int64_t stride, int rows) {
  constexpr int kChunks = 2 * kSteps;
#pragma unroll
  for (int i = threadIdx.x % kWarpSize; i < 16 * kChunks; i += kWarpSize) {
    const int row = i / kChunks, chunk = i % kChunks;
    if (row >= rows) break;
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(scratch + row * 128 + (chunk ^ (row % 8)) * 16)
                 : "memory");
    *reinterpret_cast<uint4*>(target + row * stride + chunk * 8) = v;
  }
}

}  // namespace dsv3
