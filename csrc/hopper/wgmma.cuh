// Matrix products of a warpgroup: D[64, N] += A[64, 32] B[N, 32]^T per instruction in FP8, 16 deep in bf16. Operands lie in
// shared memory in rows of 128 bytes under the 128-byte swizzle (what TMA writes), or A in registers. They are read along their
// rows (K-major), in bf16 also across them.
#pragma once

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>
#include <utility>

#include "shared_memory.cuh"

namespace dsv3 {

constexpr int kWarpgroup = 128;  // threads
constexpr int kWarpgroupWarps = 4;

// CuTe's atom for both operands in shared memory.
template <int kN>
struct WgmmaE4M3;
#define DSV3_WGMMA(N)                                                   \
  template <>                                                           \
  struct WgmmaE4M3<N> {                                                 \
    using Atom = cute::SM90::GMMA::MMA_64x##N##x32_F32E4M3E4M3_SS_TN<>; \
  }
DSV3_WGMMA(16);
DSV3_WGMMA(32);
DSV3_WGMMA(64);
DSV3_WGMMA(96);
DSV3_WGMMA(128);
DSV3_WGMMA(144);
DSV3_WGMMA(192);
#undef DSV3_WGMMA

// The same in bf16, A in shared memory or in registers.
template <int kN>
struct WgmmaBF16;
#define DSV3_WGMMA(N)                                                                                   \
  template <>                                                                                           \
  struct WgmmaBF16<N> {                                                                                 \
    template <cute::SM90::GMMA::Major kA, cute::SM90::GMMA::Major kB>                                   \
    using Shared = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_SS<kA, kB>;                            \
    template <cute::SM90::GMMA::Major kB>                                                               \
    using Registers = cute::SM90::GMMA::MMA_64x##N##x16_F32BF16BF16_RS<cute::SM90::GMMA::Major::K, kB>; \
  }
DSV3_WGMMA(8);
DSV3_WGMMA(16);
DSV3_WGMMA(32);
DSV3_WGMMA(64);
DSV3_WGMMA(96);
DSV3_WGMMA(128);
DSV3_WGMMA(192);
DSV3_WGMMA(256);
#undef DSV3_WGMMA

// A tile's matrix descriptor, lower half (the upper is constant): rows of 128 bytes, 8 rows (1024 bytes) to the next
// brick, 128-byte swizzle. The tile starts at a multiple of 1024 bytes. `+ n / 16` is n bytes further on.
__device__ __forceinline__ uint32_t matrix_descriptor(uint32_t address) { return 1u << 16 | address >> 4; }
// Of one that is read across its rows, in bf16: kBytes (those of 64 rows) to the next 64 columns. NOTE: in a cluster an address
// has the block's rank in its upper bits, which must not reach that distance.
template <int kBytes = 64 * 128>
__device__ __forceinline__ uint32_t columns_descriptor(uint32_t address) {
  return static_cast<uint32_t>(kBytes / 16) << 16 | (address >> 4 & 0x3fff);
}
constexpr uint64_t kDescriptorHigh = (uint64_t{1} << 30 | 1024 / 16) << 32;

// A value that is the same for all lanes, in a register that the compiler knows to be so: what is derived from it and
// from other such values, descriptors above all, can then stay in uniform registers, where the tensor core takes it
// from.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __shfl_sync(0xffffffffu, x, 0); }
__device__ __forceinline__ uint32_t uniform_warp() { return uniform(threadIdx.x / 32); }
// An address in shared memory, computed once: the compiler makes a generic pointer's anew wherever it is used.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uniform(shared_pointer(p)); }

namespace detail {
template <class Atom, int kSize, int... kIndex>
__device__ __forceinline__ void wgmma(uint64_t a, uint64_t b, float (&d)[kSize], cute::SM90::GMMA::ScaleOut out,
                                      std::integer_sequence<int, kIndex...>) {
  Atom::fma(a, b, d[kIndex]..., out);
}
template <class Atom, int kSize, int... kIndex>
__device__ __forceinline__ void wgmma(const uint32_t* a, uint64_t b, float (&d)[kSize], cute::SM90::GMMA::ScaleOut out,
                                      std::integer_sequence<int, kIndex...>) {
  Atom::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., out);
}
// One instruction: d (+)= a b, a being a descriptor (both halves, as b) or four registers.
template <class Atom, class Left, int kSize>
__device__ __forceinline__ void wgmma(Left a, uint64_t b, float (&d)[kSize], bool accumulate) {
  using cute::SM90::GMMA::ScaleOut;
  wgmma<Atom>(a, b, d, accumulate ? ScaleOut::One : ScaleOut::Zero, std::make_integer_sequence<int, kSize>{});
}
template <int kSize>
__device__ __forceinline__ void fence_registers(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(d[i]);
}
template <int kSize>
__device__ __forceinline__ void fence_registers(uint32_t (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) cute::warpgroup_fence_operand(d[i]);
}
}  // namespace detail

// Issues D = A B^T over one K block of 128, A and B being descriptors. Nothing but `finish_product` may touch d before
// it returns.
template <int kN>
__device__ __forceinline__ void start_product(uint32_t a, uint32_t b, float (&d)[kN / 2]) {
  detail::fence_registers(d);
  cute::warpgroup_arrive();
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    detail::wgmma<typename WgmmaE4M3<kN>::Atom>(kDescriptorHigh | (a + 2 * k), kDescriptorHigh | (b + 2 * k), d, k > 0);
  }
  cute::warpgroup_commit_batch();
}

// Waits for it; the kPending products issued last may go on.
template <int kN, int kPending = 0>
__device__ __forceinline__ void finish_product(float (&d)[kN / 2]) {
  cute::warpgroup_wait<kPending>();
  detail::fence_registers(d);
}

}  // namespace dsv3
