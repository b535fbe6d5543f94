// The matrix products of the backward pass, of one warpgroup: 64 keys against 64 queries, issued and not waited for.
// Scores and their gradients are transposed (keys by queries), so that they are the left operand of dV and dK in
// registers.
#pragma once

#include "mma.cuh"

namespace dsv3 {

// scores[64 keys, 64 queries] += keys queries^T over kCount sub-blocks of columns, those of the keys key_step apart.
template <int kCount>
__device__ __forceinline__ void add_products(uint32_t keys, uint32_t key_step, uint32_t queries, float (&scores)[32]) {
  detail::fence_registers(scores);
  cute::warpgroup_arrive();
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    add_scores(keys + c * (key_step / 16), queries + c * (kSubBytes / 16), scores, false);
  }
  cute::warpgroup_commit_batch();
}

// gradient[64 keys, 2 kSize] += left[64 keys, 64 queries] rows[64 queries, 2 kSize].
template <int kSize>
__device__ __forceinline__ void start_key_gradient(const uint32_t (&left)[16], uint32_t rows,
                                                   float (&gradient)[kSize]) {
  using Atom = typename WgmmaBF16<2 * kSize>::template Registers<cute::SM90::GMMA::Major::MN>;
  detail::fence_registers(gradient);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::wgmma<Atom>(&left[4 * k], kDescriptorHigh | (rows + k * (16 * 128 / 16)), gradient, true);
  }
  cute::warpgroup_commit_batch();
}

// The same with the left operand in shared memory, a sub-block by rows.
__device__ __forceinline__ void start_key_gradient(uint32_t left, uint32_t rows, float (&gradient)[96]) {
  using cute::SM90::GMMA::Major;
  detail::fence_registers(gradient);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::wgmma<WgmmaBF16<192>::Shared<Major::K, Major::MN>>(
        kDescriptorHigh | (left + 2 * k), kDescriptorHigh | (rows + k * (16 * 128 / 16)), gradient, true);
  }
  cute::warpgroup_commit_batch();
}

// dq[64 queries, 96] = ds[128 keys, 64 queries]^T keys[128 keys, 96 columns].
__device__ __forceinline__ void start_query_gradient(uint32_t ds, uint32_t keys, float (&dq)[48]) {
  using cute::SM90::GMMA::Major;
  detail::fence_registers(dq);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    detail::wgmma<WgmmaBF16<96>::Shared<Major::MN, Major::MN>>(
        kDescriptorHigh | (ds + k * (16 * 128 / 16)), kDescriptorHigh | (keys + k * (16 * 128 / 16)), dq, k > 0);
  }
  cute::warpgroup_commit_batch();
}

}  // namespace dsv3
