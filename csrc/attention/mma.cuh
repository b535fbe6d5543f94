// bf16 matrix products of a warpgroup for attention: scores of 64 queries and 64 or 128 keys, and probabilities times
// values. Operands lie in shared memory in sub-blocks of 64 columns (128 bytes) and as many rows as a tile has, under the
// 128-byte swizzle (what TMA writes); keys are read along their rows, values across them.
#pragma once

#include <type_traits>

#include "../hopper/wgmma.cuh"

namespace dsv3 {

constexpr int kSubColumns = 64, kSubBytes = 64 * 128;

// The lower halves of matrix descriptors. By rows: as matrix_descriptor. Across rows (values): 8 rows (1024 bytes) to
// the next brick along the product's depth, a sub-block to the next 64 columns. NOTE: in a cluster an address has the
// block's rank in its upper bits, which must not reach the distance of the sub-blocks.
template <int kBytes = kSubBytes>  // of a sub-block
__device__ __forceinline__ uint32_t values_descriptor(uint32_t address) {
  return static_cast<uint32_t>(kBytes / 16) << 16 | (address >> 4 & 0x3fff);
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
__device__ __forceinline__ void values_wgmma(const uint32_t* a, uint64_t b, float (&d)[64],
                                             std::integer_sequence<int, kIndex...>) {
  using namespace cute::SM90::GMMA;
  MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., ScaleOut::One);
}
template <int... kIndex>
__device__ __forceinline__ void values_wgmma(uint64_t a, uint64_t b, float (&d)[128],
                                             std::integer_sequence<int, kIndex...>) {
  using namespace cute::SM90::GMMA;
  MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::MN>::fma(a, b, d[kIndex]..., ScaleOut::One);
}
}  // namespace detail

// scores += queries keys^T over the 64 columns of one sub-block; the first replaces what was there. Issued, not waited for.
template <int kSize>
__device__ __forceinline__ void add_scores(uint32_t queries, uint32_t keys, float (&scores)[kSize], bool first) {
  using namespace cute::SM90::GMMA;
  using Atom = std::conditional_t<kSize == 32, MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>,
                                  MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K>>;
#pragma unroll
  for (int k = 0; k < kSubColumns / 16; ++k) {
    detail::wgmma<Atom>(detail::kDescriptorHigh | (queries + 2 * k), detail::kDescriptorHigh | (keys + 2 * k), scores,
                        !first || k > 0, std::make_integer_sequence<int, kSize>{});
  }
}

// out += probabilities times values: of 64 keys and 256 columns, or 128 and 128, with the probabilities as registers of
// the A operand; or of 64 and 256 with the probabilities as a sub-block by rows.
template <int kWords, int kSize>
__device__ __forceinline__ void add_values(const uint32_t (&probabilities)[kWords], uint32_t values,
                                           float (&out)[kSize]) {
#pragma unroll
  for (int k = 0; k < kWords / 4; ++k) {  // 16 rows of 128 bytes on
    detail::values_wgmma(&probabilities[4 * k], detail::kDescriptorHigh | (values + k * (16 * 128 / 16)), out,
                         std::make_integer_sequence<int, kSize>{});
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
