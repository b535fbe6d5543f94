// Products whose first operand is made in registers, of codes that become fp16 on their way there, and the arithmetic of powers of
// two around them.
//
// Fragments. A word that ldmatrix gives a lane has four codes: along a key's columns (scores), or two keys by two columns
// (values, transposed). The columns of 16 that a product of scores sums are taken in the order of the words: lane t of four
// has 4t to 4t + 3 where the tensor core expects 2t, 2t + 1, 2t + 8 and 2t + 9, and queries lie in that order too.
#pragma once

#include <cuda_fp16.h>

#include "decode_fp8.cuh"

namespace dsv3 {

// Products of 64 rows from registers and kN columns from shared memory, 16 deep.
template <int kN>
struct RegisterWgmma;
#define DSV3_WGMMA(N)                                                                                           \
  template <>                                                                                                   \
  struct RegisterWgmma<N> {                                                                                     \
    using Half =                                                                                                \
        cute::SM90::GMMA::MMA_64x##N##x16_F32F16F16_RS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>; \
    using BFloat16 = WgmmaBF16<N>::Registers<cute::SM90::GMMA::Major::K>;                                       \
  }
DSV3_WGMMA(16);
DSV3_WGMMA(32);
DSV3_WGMMA(64);
#undef DSV3_WGMMA

struct Fragment {  // 64 rows of the A operand, 32 deep: two products
  uint32_t words[2][4];
};
constexpr int kFragments = 2;  // in turn: one multiplies while the other is made
constexpr int kAhead = 2;      // loads of a fragment's words that are under way

namespace detail {
__device__ __forceinline__ void fence_registers(Fragment& a) {
#pragma unroll
  for (int k = 0; k < 2; ++k) fence_registers(a.words[k]);
}
}  // namespace detail

// Issues d (+)= a b^T, b by rows in shared memory. Nothing may touch a or d before it is done.
template <class Atom, int kSize>
__device__ __forceinline__ void start_register_product(Fragment& a, uint32_t b, float (&d)[kSize], bool accumulate) {
  detail::fence_registers(a);
  detail::fence_registers(d);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    detail::wgmma<Atom>(a.words[k], kDescriptorHigh | (b + 2 * k), d, accumulate || k > 0);
  }
  cute::warpgroup_commit_batch();
}
// Waits until all but the kPending latest products are done, and with them the one that used a.
template <int kPending>
__device__ __forceinline__ void finish_register_product(Fragment& a) {
  cute::warpgroup_wait<kPending>();
  detail::fence_registers(a);
}

// NOTE: a load that is asked for behind products waits until these have read their operands, so loads come first.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
// The four scales of a key of a tile.
__device__ __forceinline__ float4 load_scales(uint32_t codes, int key) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(codes + key * kFp8Row + kFp8Scales)
               : "memory");
  return v;
}
// Four codes as pairs of fp16, exactly.
__device__ __forceinline__ void to_half(uint32_t codes, uint32_t& low, uint32_t& high) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(low), "=r"(high)
      : "r"(codes));
}
// Codes times scales, a pair each.
__device__ __forceinline__ uint32_t scaled(uint32_t pair, __half2 scales) {
  const __half2 product = __hmul2(reinterpret_cast<const __half2&>(pair), scales);
  return reinterpret_cast<const uint32_t&>(product);
}
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t scaled_half(uint32_t pair, float factor) {
  return pack_half(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000u) * factor);
}
__device__ __forceinline__ uint32_t scaled_bf16(uint32_t pair, float factor) {
  return pack_bf16(__uint_as_float(pair << 16) * factor, __uint_as_float(pair & 0xffff0000u) * factor);
}

// The largest power of two up to x, and it within bounds: at least `least`, and with a normal reciprocal. NaN counts as nothing.
__device__ __forceinline__ float power_of_two(float x, float least) {
  return __int_as_float(__float_as_int(fminf(fmaxf(x, least), 0x1p126f)) & 0x7f800000);
}
__device__ __forceinline__ float reciprocal(float x) { return __int_as_float((254 << 23) - __float_as_int(x)); }
// Whether any thread of the warpgroup says so, by a named barrier.
__device__ __forceinline__ bool any_of_warpgroup(int barrier, bool x) {
  int result;
  asm volatile(
      "{ .reg .pred in, out; setp.ne.s32 in, %1, 0; barrier.cta.red.or.pred out, %2, %3, in; selp.s32 %0, 1, 0, out; "
      "}"
      : "=r"(result)
      : "r"(static_cast<int>(x)), "r"(barrier), "n"(kWarpgroup)
      : "memory");
  return result != 0;
}
// The largest over the warp of what is positive, and no NaN.
__device__ __forceinline__ float warp_max(float a, float b) {
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(fmaxf(fmaxf(a, b), 0.f))));
}

}  // namespace dsv3
