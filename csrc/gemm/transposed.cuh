// What the kernels with weights on the M side of the tensor core share: D^T[N, T] = B[N, K] A[T, K]^T, so that few
// tokens cost few columns. A thread's accumulator i lies in row (weight) (i / 2 % 2) * 8 + lane / 4 of its warp's 16,
// column (token) i / 4 * 8 + lane % 4 * 2 + i % 2.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <type_traits>

#include "../common/launch.cuh"
#include "../hopper/pipeline.cuh"
#include "../hopper/tensor_map.h"
#include "../hopper/wgmma.cuh"
#include "schedule.cuh"

namespace dsv3 {

constexpr int kScratchBytes = 512;  // of a warp: 16 tokens of 16 bf16 outputs

// The scales of kN tokens of one K block that a thread needs, from the address of the first. kPairs: a multiple of 8.
// Where groups begin at odd rows a thread's two neighbours are no vector.
template <int kN>
struct TokenScales {
  float2 pairs[kN / 8];

  template <bool kPairs>
  __device__ __forceinline__ void load(uint32_t address) {
    const uint32_t mine = address + threadIdx.x % 4 * 8;
    if (kPairs || address % 8 == 0) {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) pairs[j] = load_shared_float2(mine + j * 32);
    } else {
#pragma unroll
      for (int j = 0; j < kN / 8; ++j) {
        pairs[j] = make_float2(load_shared_float(mine + j * 32), load_shared_float(mine + j * 32 + 4));
      }
    }
  }
};

// Scales the tensor core's sum of one K block and adds it.
template <int kN>
__device__ __forceinline__ void promote_transposed(float (&sum)[kN / 2], const float (&product)[kN / 2],
                                                   float weight_sf, const TokenScales<kN>& tokens) {
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float first = tokens.pairs[j].x * weight_sf, second = tokens.pairs[j].y * weight_sf;
    sum[4 * j] = fmaf(first, product[4 * j], sum[4 * j]);
    sum[4 * j + 1] = fmaf(second, product[4 * j + 1], sum[4 * j + 1]);
    sum[4 * j + 2] = fmaf(first, product[4 * j + 2], sum[4 * j + 2]);
    sum[4 * j + 3] = fmaf(second, product[4 * j + 3], sum[4 * j + 3]);
  }
}

// `blocks` K blocks, at least one, so that a product is always under way: start(product, i) begins that of the i-th, and
// finish(product, pending) waits until only `pending` are left and adds it. Two products, in turn, live in registers.
template <class Product, class Start, class Finish>
__device__ __forceinline__ void multiply_in_turn(int blocks, Start&& start, Finish&& finish) {
  constexpr std::integral_constant<int, 0> kNone;
  constexpr std::integral_constant<int, 1> kOne;
  Product a, b;
  int i = 0;
  start(a, i);
#pragma unroll 1
  for (; i + 2 < blocks; i += 2) {
    start(b, i + 1);
    finish(a, kOne);
    start(a, i + 2);
    finish(b, kOne);
  }
  if (i + 1 < blocks) {
    start(b, i + 1);
    finish(a, kOne);
    finish(b, kNone);
  } else {
    finish(a, kNone);
  }
}

// Where a warp's 16 outputs of every token go: out points to the first token's row.
template <class Out>
struct Target {
  Out* out;
  int64_t stride;  // of a token
  int tokens;      // that exist
  int column, columns;
  bool accumulate;
};

// Rounded to bf16 and turned through shared memory: lane l's part of what `sum`, 16 tokens of a warp's 16 weights, makes.
__device__ __forceinline__ void store_turned(uint8_t* target, const float* sum) {
  uint32_t words[4];  // tokens 0 to 7 of weights 0 to 7, of weights 8 to 15, then the other tokens
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]);
    words[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  cute::SM90_U16x8_STSM_T::copy(words[0], words[1], words[2], words[3], *reinterpret_cast<cute::uint128_t*>(target));
}

// A warp writes tokens `token` to `token` + 15 from 8 accumulators. bf16 is turned through kScratchBytes, so that a token's
// 16 outputs leave as one sector; in fp32 eight lanes hold a sector already.
__device__ __forceinline__ void write_tokens(const Target<__nv_bfloat16>& to, int token, const float* sum,
                                             uint8_t* scratch) {
  const int lane = threadIdx.x % kWarpSize;
  if (token >= to.tokens) return;
  __syncwarp();
  store_turned(scratch + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16, sum);
  __syncwarp();
  const int mine = token + lane / 2, column = to.column + lane % 2 * 8;
  if (mine >= to.tokens || column >= to.columns) return;
  *reinterpret_cast<uint4*>(to.out + mine * to.stride + column) = *reinterpret_cast<const uint4*>(scratch + lane * 16);
}
__device__ __forceinline__ void write_tokens(const Target<float>& to, int token, const float* sum, uint8_t*) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int mine = token + i / 4 * 8 + lane % 4 * 2 + i % 2, column = to.column + i / 2 % 2 * 8 + lane / 4;
    if (mine >= to.tokens || column >= to.columns) continue;
    float& value = to.out[mine * to.stride + column];
    value = to.accumulate ? value + sum[i] : sum[i];
  }
}

// A warpgroup writes kN tokens of its 64 weights, from `token` on; to.column is the warpgroup's first. bf16 takes kN rows
// of 128 bytes of scratch, whose chunks of 16 bytes lie as in the 128-byte swizzle, so that whole lines leave. `barrier` is
// the warpgroup's own.
template <int kN>
__device__ __forceinline__ void write_tile(const Target<__nv_bfloat16>& to, int token, const float (&sum)[kN / 2],
                                           uint8_t* scratch, int barrier) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize % kWarpgroupWarps;
  const auto at = [&](int row, int chunk) { return scratch + row * 128 + (chunk ^ row % 8) * 16; };
  const auto sync = [&] { named_sync(barrier, kWarpgroup); };
  sync();
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) {
    store_turned(at(16 * j + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2), &sum[8 * j]);
  }
  sync();
  const int first = warp * (kN / 4) + lane / 8, column = to.column + lane % 8 * 8;
  if (column >= to.columns) return;
  __nv_bfloat16* out = to.out + (token + first) * to.stride + column;
#pragma unroll
  for (int i = 0; i < kN / 16; ++i, out += 4 * to.stride) {
    if (token + first + 4 * i >= to.tokens) return;
    *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(at(first + 4 * i, lane % 8));
  }
}
template <int kN>
__device__ __forceinline__ void write_tile(Target<float> to, int token, const float (&sum)[kN / 2], uint8_t*, int) {
  to.column += threadIdx.x / kWarpSize % kWarpgroupWarps * 16;
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) write_tokens(to, token + 16 * j, &sum[8 * j], nullptr);
}

}  // namespace dsv3
