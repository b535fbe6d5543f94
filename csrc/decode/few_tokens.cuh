// Products of weights [N, K], in bf16 or FP8, with few tokens: what its kernels share. Bound by reading the weights once, so
// these go from memory straight to registers, 16 bytes a lane, and only sums pass through shared memory.
//
// A warp takes 16 rows of weights (the M side of the tensor core), up to kTiles times 8 tokens (the N side) and a part
// of K in chunks of 128. The 16 bytes of a lane are 8 neighbouring columns of a row, 16 in FP8; the instruction wants columns 2t,
// 2t + 1, 2t + 8, 2t + 9 of it. Which column of K is which does not matter as long as weights and tokens agree, so both load
// in the way that suits memory. Warps of a block share K; their sums are added in the order of the warps. Nothing
// depends on how many tokens there are: a token gets the same bits alone and among others.
#pragma once

#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "few_codes.cuh"

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
__device__ __forceinline__ uint4 load_once(const void* p) {
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

// The lane's tokens of kTiles tiles; none of a token that there is not.
template <int kTiles>
struct TokenRows {
  const bf16* rows[kTiles];
  __device__ __forceinline__ TokenRows(const bf16* x, int64_t stride, int first, int tokens) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int token = first + i * kTokenTile + lane_row();
      rows[i] = token < tokens ? x + token * stride : nullptr;
    }
  }
  // 8 columns of a tile's token, or zeros.
  __device__ __forceinline__ uint4 load(int tile, int column, int depth) const {
    return rows[tile] != nullptr && column < depth ? *reinterpret_cast<const uint4*>(rows[tile] + column) : uint4{};
  }
};

// A chunk of 16 rows, in registers: of the lane's row of the first 8 and of that of the last 8, kVectors of 16 bytes each.
struct Values {  // bf16
  using Element = bf16;
  static constexpr int kVectors = kSteps;
  uint4 upper[kVectors], lower[kVectors];
  int chunk = -1;

  static __device__ __forceinline__ int column(int chunk, int i) { return chunk * kChunk + i * kStep + lane_column(); }
  // row: the lane's of the first 8.
  __device__ __forceinline__ void load(const bf16* row, const float*, int wanted, int depth) {
    if (wanted == chunk) return;
    chunk = wanted;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = column(chunk, i);
      const bool inside = at < depth;
      upper[i] = inside ? load_once(row + at) : uint4{};
      lower[i] = inside ? load_once(row + at + static_cast<int64_t>(8) * depth) : uint4{};
    }
  }
  template <int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4], const TokenRows<kTiles>& x, int depth) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint4 token[kVectors];
#pragma unroll
      for (int i = 0; i < kVectors; ++i) token[i] = x.load(tile, column(chunk, i), depth);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        mma(sum[tile], upper[i].x, lower[i].x, upper[i].y, lower[i].y, token[i].x, token[i].y);
        mma(sum[tile], upper[i].z, lower[i].z, upper[i].w, lower[i].w, token[i].z, token[i].w);
      }
    }
  }
};

struct Codes {  // e4m3; the block's scale is that of the chunk
  using Element = uint8_t;
  static constexpr int kVectors = kSteps / 2;
  uint4 upper[kVectors], lower[kVectors];
  float scale;
  int chunk = -1;

  static __device__ __forceinline__ int column(int chunk, int i) {
    return chunk * kChunk + 2 * (i * kStep + lane_column());
  }
  __device__ __forceinline__ void load(const uint8_t* row, const float* scales, int wanted, int depth) {
    if (wanted == chunk) return;
    chunk = wanted;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int at = column(chunk, i);
      const bool inside = at < depth;
      upper[i] = inside ? load_once(row + at) : uint4{};
      lower[i] = inside ? load_once(row + at + static_cast<int64_t>(8) * depth) : uint4{};
    }
    scale = scales[chunk];
  }
  template <int kTiles>
  __device__ __forceinline__ void multiply(float (&sum)[kTiles][4], const TokenRows<kTiles>& x, int depth) const {
    float part[kTiles][4] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const uint32_t up[] = {upper[i].x, upper[i].y, upper[i].z, upper[i].w};
      const uint32_t low[] = {lower[i].x, lower[i].y, lower[i].z, lower[i].w};
      uint32_t row[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        codes_to_bf16(up[k], row[k][0], row[k][2]);
        codes_to_bf16(low[k], row[k][1], row[k][3]);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint4 first = x.load(tile, column(chunk, i), depth), second = x.load(tile, column(chunk, i) + 8, depth);
        mma(part[tile], row[0][0], row[0][1], row[0][2], row[0][3], first.x, first.y);
        mma(part[tile], row[1][0], row[1][1], row[1][2], row[1][3], first.z, first.w);
        mma(part[tile], row[2][0], row[2][1], row[2][2], row[2][3], second.x, second.y);
        mma(part[tile], row[3][0], row[3][1], row[3][2], row[3][3], second.z, second.w);
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) sum[i / 4][i % 4] = fmaf(scale, part[i / 4][i % 4], sum[i / 4][i % 4]);
  }
};

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
