// bf16 matrix products of a warpgroup for attention: scores of 64 queries and 64 or 128 keys, and probabilities times
// values. Operands lie in shared memory in sub-blocks of 64 columns (128 bytes) and as many rows as a tile has, under the
// 128-byte swizzle (what TMA writes); keys are read along their rows, values across them.
#pragma once

#include "../hopper/wgmma.cuh"

namespace dsv3 {

constexpr int kSubColumns = 64, kSubBytes = 64 * 128;

// scores += queries keys^T over the 64 columns of one sub-block; the first replaces what was there. Issued, not waited for.
template <int kSize>
__device__ __forceinline__ void add_scores(uint32_t queries, uint32_t keys, float (&scores)[kSize], bool first) {
  using cute::SM90::GMMA::Major;
  using Atom = typename WgmmaBF16<2 * kSize>::template Shared<Major::K, Major::K>;
#pragma unroll
  for (int k = 0; k < kSubColumns / 16; ++k) {
    detail::wgmma<Atom>(kDescriptorHigh | (queries + 2 * k), kDescriptorHigh | (keys + 2 * k), scores, !first || k > 0);
  }
}

// out += probabilities times values: of 64 keys and 256 columns, or 128 and 128, with the probabilities as registers of
// the A operand; or of 64 and 256 with the probabilities as a sub-block by rows.
template <int kWords, int kSize>
__device__ __forceinline__ void add_values(const uint32_t (&probabilities)[kWords], uint32_t values,
                                           float (&out)[kSize]) {
  using Atom = typename WgmmaBF16<2 * kSize>::template Registers<cute::SM90::GMMA::Major::MN>;
#pragma unroll
  for (int k = 0; k < kWords / 4; ++k) {  // 16 rows of 128 bytes on
    detail::wgmma<Atom>(&probabilities[4 * k], kDescriptorHigh | (values + k * (16 * 128 / 16)), out, true);
  }
}
__device__ __forceinline__ void add_values(uint32_t probabilities, uint32_t values, float (&out)[128]) {
  using cute::SM90::GMMA::Major;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::wgmma<WgmmaBF16<256>::Shared<Major::K, Major::MN>>(
        kDescriptorHigh | (probabilities + 2 * k), kDescriptorHigh | (values + k * (16 * 128 / 16)), out, true);
  }
}

}  // namespace dsv3
