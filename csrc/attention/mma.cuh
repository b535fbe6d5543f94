// bf16 matrix products of a warpgroup for attention: scores of 64 queries and 64 keys, and probabilities times values.
// Operands lie in shared memory in sub-blocks of 64 rows of 64 columns (128 bytes) under the 128-byte swizzle (what TMA
// writes); keys and values are the same bytes, read along their rows and across them.
#pragma once

#include "../hopper/wgmma.cuh"

namespace dsv3 {

constexpr int kSubColumns = 64, kSubBytes = 64 * 128;

// The lower halves of matrix descriptors. By rows: as matrix_descriptor. Across rows (values): 8 rows (1024 bytes) to
// the next brick along the product's depth, a sub-block to the next 64 columns. NOTE: in a cluster an address has the
// block's rank in its upper bits, which must not reach the distance of the sub-blocks.
__device__ __forceinline__ uint32_t values_descriptor(uint32_t address) {
  return static_cast<uint32_t>(kSubBytes / 16) << 16 | (address >> 4 & 0x3fff);
}

namespace detail {
constexpr uint64_t kDescriptorHigh = (uint64_t{1} << 30 | 1024 / 16) << 32;

template <int kSize>
__device__ __forceinline__ void fence_registers(uint32_t (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(d[i])::"memory");
}
template <int... kIndex>
__device__ __forceinline__ void values_wgmma(const uint32_t* a, uint64_t b, float (&d)[128],
                                             std::integer_sequence<int, kIndex...>) {
  using namespace cute::SM90::GMMA;
  MMA_64x256x16_F32BF16BF16_RS<Major::K, Major::MN>::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., ScaleOut::One);
}
template <int... kIndex>
__device__ __forceinline__ void values_wgmma(uint64_t a, uint64_t b, float (&d)[128],
                                             std::integer_sequence<int, kIndex...>) {
  using namespace cute::SM90::GMMA;
  MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::MN>::fma(a, b, d[kIndex]..., ScaleOut::One);
}
}  // namespace detail

// scores += queries keys^T over the 64 columns of one sub-block; the first replaces what was there. Issued, not waited for.
__device__ __forceinline__ void add_scores(uint32_t queries, uint32_t keys, float (&scores)[32], bool first) {
  using Atom = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;
#pragma unroll
  for (int k = 0; k < kSubColumns / 16; ++k) {
    detail::wgmma<Atom>(detail::kDescriptorHigh | (queries + 2 * k), detail::kDescriptorHigh | (keys + 2 * k), scores,
                        !first || k > 0, std::make_integer_sequence<int, 32>{});
  }
}

// out += probabilities of 64 keys times 256 columns of values; the probabilities as registers of the A operand, or as a
// sub-block by rows.
__device__ __forceinline__ void add_values(const uint32_t (&probabilities)[16], uint32_t values, float (&out)[128]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // 16 rows of 128 bytes on
    detail::values_wgmma(&probabilities[4 * k], detail::kDescriptorHigh | (values + k * (16 * 128 / 16)), out,
                         std::make_integer_sequence<int, 128>{});
  }
}
__device__ __forceinline__ void add_values(uint32_t probabilities, uint32_t values, float (&out)[128]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::values_wgmma(detail::kDescriptorHigh | (probabilities + 2 * k),
                         detail::kDescriptorHigh | (values + k * (16 * 128 / 16)), out,
                         std::make_integer_sequence<int, 128>{});
  }
}

}  // namespace dsv3
