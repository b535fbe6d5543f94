// The matrix products of the backward pass, of one warpgroup: 64 keys against 64 queries, issued and not waited for.
// Scores and their gradients are transposed (keys by queries), so that they are the left operand of dV and dK in
// registers.
#pragma once

#include "mma.cuh"

namespace dsv3 {

namespace detail {
template <class Atom, int kSize, int... kIndex>
__device__ __forceinline__ void register_wgmma(const uint32_t* a, uint64_t b, float (&d)[kSize],
                                               std::integer_sequence<int, kIndex...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., cute::SM90::GMMA::ScaleOut::One);
}
}  // namespace detail

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
  using namespace cute::SM90::GMMA;
  using Atom = std::conditional_t<kSize == 64, MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>,
                                  MMA_64x192x16_F32BF16BF16_RS<Major::K, Major::MN>>;
  detail::fence_registers(gradient);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::register_wgmma<Atom>(&left[4 * k], detail::kDescriptorHigh | (rows + k * (16 * 128 / 16)), gradient,
                                 std::make_integer_sequence<int, kSize>{});
  }
  cute::warpgroup_commit_batch();
}

// The same with the left operand in shared memory, a sub-block by rows.
__device__ __forceinline__ void start_key_gradient(uint32_t left, uint32_t rows, float (&gradient)[96]) {
  using namespace cute::SM90::GMMA;
  using Atom = MMA_64x192x16_F32BF16BF16_SS<Major::K, Major::MN>;
  detail::fence_registers(gradient);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::wgmma<Atom>(detail::kDescriptorHigh | (left + 2 * k),
                        detail::kDescriptorHigh | (rows + k * (16 * 128 / 16)), gradient, true,
                        std::make_integer_sequence<int, 96>{});
  }
  cute::warpgroup_commit_batch();
}

// dq[64 queries, 96] = ds[128 keys, 64 queries]^T keys[128 keys, 96 columns].
__device__ __forceinline__ void start_query_gradient(uint32_t ds, uint32_t keys, float (&dq)[48]) {
  using namespace cute::SM90::GMMA;
  using Atom = MMA_64x96x16_F32BF16BF16_SS<Major::MN, Major::MN>;
  detail::fence_registers(dq);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    detail::wgmma<Atom>(detail::kDescriptorHigh | (ds + k * (16 * 128 / 16)),
                        detail::kDescriptorHigh | (keys + k * (16 * 128 / 16)), dq, k > 0,
                        std::make_integer_sequence<int, 48>{});
  }
  cute::warpgroup_commit_batch();
}

}  // namespace dsv3
