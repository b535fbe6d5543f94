// Products of bf16 weights [N, K] with few tokens: what its kernels share. Bound by reading the weights once, so these go
// from memory straight to registers, 16 bytes a lane, and only sums pass through shared memory.
//
// A warp takes 16 rows of weights (the M side of the tensor core), up to kTiles times 8 tokens (the N side) and a part
// of K in chunks of 128. The 16 bytes of a lane are 8 neighbouring columns of a row; the instruction wants columns 2t, 2t + 1,
// 2t + 8, 2t + 9 of it. Which column of K is which does not matter as long as weights and tokens agree, so both load
// in the way that suits memory. Warps of a block share K; their sums are added in the order of the warps. Nothing
// depends on how many tokens there are: a token gets the same bits alone and among others.
#pragma once

#include "../common/launch.cuh"
#include "../common/vector.cuh"

namespace dsv3 {

using bf16 = __nv_bfloat16;

constexpr int kRowTile = 16, kTokenTile = 8;
constexpr int kStep = 32, kSteps = 4, kChunk = kStep * kSteps;  // columns of K
constexpr int kMaxWarps = 16;
constexpr int kFewTokens = 64;
// A tile of sums in shared memory, tokens by rows; the pad keeps the lanes of a store in different banks.
constexpr int kSumStride = kRowTile + 4, kSumTile = kTokenTile * kSumStride;

// Warps that share K: as many as give each the same number of chunks.
inline int depth_warps(int64_t depth) {
  const int64_t chunks = ceil_div(depth, kChunk);
  return static_cast<int>(ceil_div(chunks, ceil_div(chunks, kMaxWarps)));
}

// Token tiles that a kernel takes at a time.
template <class F>
void visit_tiles(int64_t tokens, F&& f) {
  if (tokens <= 8) return f(std::integral_constant<int, 1>{});
  if (tokens <= 16) return f(std::integral_constant<int, 2>{});
  return f(std::integral_constant<int, 4>{});
}

__device__ __forceinline__ int lane_row() { return threadIdx.x % kWarpSize / 4; }         // of 8
__device__ __forceinline__ int lane_column() { return threadIdx.x % kWarpSize % 4 * 8; }  // of a step

// Weights are read once: they need not push tokens out of the L1 cache.
__device__ __forceinline__ uint4 load_once(const bf16* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A chunk of 16 rows, in registers.
struct Weights {
  uint4 upper[kSteps], lower[kSteps];  // the lane's row of the first 8 and of the last 8
  int chunk = -1;

  // row: the lane's of the first 8, at its first column.
  __device__ __forceinline__ void load(const bf16* row, int wanted, int depth) {
    if (wanted == chunk) return;
    chunk = wanted;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int column = chunk * kChunk + s * kStep;
      const bool inside = column < depth;
      upper[s] = inside ? load_once(row + column) : uint4{};
      lower[s] = inside ? load_once(row + column + static_cast<int64_t>(8) * depth) : uint4{};
    }
  }
};

// A chunk of a token's row, in the lane's columns; zeros for a token that there is not.
__device__ __forceinline__ void load_tokens(uint4 (&x)[kSteps], const bf16* row, int chunk, int depth) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int column = chunk * kChunk + s * kStep;
    x[s] = row != nullptr && column < depth ? *reinterpret_cast<const uint4*>(row + column) : uint4{};
  }
}

__device__ __forceinline__ void multiply(float (&sum)[4], const Weights& w, const uint4 (&x)[kSteps]) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const uint4 &up = w.upper[s], &low = w.lower[s];
    mma(sum, up.x, low.x, up.y, low.y, x[s].x, x[s].y);
    mma(sum, up.z, low.z, up.w, low.w, x[s].z, x[s].w);
  }
}

// Where a warp leaves its sums of a tile: tile[token * kSumStride + row].
__device__ __forceinline__ void leave_sums(float* tile, const float (&sum)[4]) {
  const int row = lane_row(), token = threadIdx.x % 4 * 2;
  tile[token * kSumStride + row] = sum[0];
  tile[(token + 1) * kSumStride + row] = sum[1];
  tile[token * kSumStride + row + 8] = sum[2];
  tile[(token + 1) * kSumStride + row + 8] = sum[3];
}

// The sum of all warps for one place of a tile; tiles of the same place lie `stride` apart.
__device__ __forceinline__ float add_sums(const float* place, int warps, int stride) {
  float sum = 0.f;
#pragma unroll 4
  for (int w = 0; w < warps; ++w) sum += place[w * stride];
  return sum;
}

}  // namespace dsv3
