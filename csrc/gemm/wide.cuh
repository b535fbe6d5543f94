// The kernel for many rows: D[M, N] = A[M, K] B[N, K]^T in FP8 with a scale for every 1x128 of A, and for every 128x128
// or 1x128 of B. Tiles of 128 rows by up to 256 columns; a producer warp fills a ring of K blocks by TMA, two
// warpgroups of 64 rows each multiply and promote: the tensor core's sum of 128 products is scaled and added to fp32
// registers. While one warpgroup promotes, the other keeps the tensor cores busy, if the way from the end of one
// product to the start of the next is short: see `multiply`. In a cluster of two, blocks of neighbouring rows share the
// columns: each loads half of B and multicasts it. Roofline: README.md, section gemm.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <numeric>

#include "../common/launch.cuh"
#include "../hopper/pipeline.cuh"
#include "../hopper/tensor_map.h"
#include "../hopper/wgmma.cuh"
#include "schedule.cuh"

namespace dsv3 {

// kN columns a product, kParts products a tile and K block; tiles wider than 128, or of no multiple of it, meet two
// blocks of B's scales. Out is bf16 or float; kRowScaleB: B has a scale every 1x128.
template <Layout kLayout_, class Out_, bool kRowScaleB_, int kN_, int kParts_, int kCluster_, int kStages_,
          int kBuffers_, int kHalves_ = 1>
struct WideConfig {
  static constexpr Layout kLayout = kLayout_;
  using Out = Out_;
  static constexpr bool kRowScaleB = kRowScaleB_;
  static constexpr int kN = kN_, kParts = kParts_, kCluster = kCluster_, kStages = kStages_;
  static constexpr int kBuffers = kBuffers_;  // of 128 bytes of columns: what a warp writes out at a time
  static constexpr bool kByRows = kLayout == Layout::kRows || kLayout == Layout::kMasked;
  static constexpr int kHalves = kHalves_;  // products of 64 rows that a warpgroup has one below the other
  static constexpr int kTileRows = 2 * 64 * kHalves, kTileColumns = kN * kParts;
  static constexpr int kEdgeStep = std::gcd(kTileColumns, kBlockK);  // of a tile's distance to the next block of scales
  // Blocks of B's scales that a tile can meet.
  static constexpr int kScales = kRowScaleB ? 0 : (2 * kBlockK - kEdgeStep + kTileColumns - 1) / kBlockK;
  static constexpr bool kSplits = kLayout == Layout::kDense && kRowScaleB && kHalves == 1;  // K may be cut into parts
  static constexpr int kConsumerWarps = 8;
  // Of a thread: together those that the block begins with, 168 each.
  static constexpr int kProducerRegisters = kHalves == 1 ? 40 : 24, kConsumerRegisters = kHalves == 1 ? 232 : 240;
  static constexpr int kThreads = 3 * kWarpgroup;
  static_assert(!kRowScaleB || kParts == 1);  // StageScales holds the columns of one product
};

constexpr int kStoreBytes = 2048;  // 16 rows of 128 bytes

template <class C>
struct WideShared {
  alignas(1024) uint8_t a[C::kStages][C::kTileRows * kBlockK];
  alignas(1024) uint8_t b[C::kStages][C::kTileColumns * kBlockK];
  alignas(1024) uint8_t store[C::kConsumerWarps][C::kBuffers][kStoreBytes];
  alignas(16) float b_sf[C::kStages][C::kRowScaleB ? C::kTileColumns : 4];
  alignas(16) float a_sf[C::kStages][RowScales::size(C::kTileRows)];
  RingBarriers<C::kStages, C::kConsumerWarps, C::kCluster, C::kScales> ring;
};

struct WideParams {
  CUtensorMap a, b, out_map;
  void* out;
  RowScales a_sf, b_row_sf;
  const float* b_sf;   // [G, ceil(N / 128), depth_blocks]
  const int* offsets;  // [G + 1], counts [G] (kMasked), or null
  DeviceError* error;
  int rows, columns, depth_blocks, groups;
  int limit;        // of the offsets or counts
  int fewest_rows;  // of a group that this kernel takes; others are another's
  bool accumulate;
  int splits;  // parts that K is cut into (kSplits)
  int* turns;  // [tiles, kConsumerWarps], zeros: the part of a tile whose turn it is to be added
};

template <class C>
class WideSchedule {
 public:
  // By a whole warp. The first tile is that of the cluster's own number.
  __device__ __forceinline__ WideSchedule(const WideParams& p, bool reports) : p_(p) {
    index_ = blockIdx.x / C::kCluster;
    step_ = gridDim.x / C::kCluster;
    columns_ = ceil_div(p.columns, C::kTileColumns);
    valid_ = true;
    if constexpr (C::kLayout != Layout::kDense) {
      valid_ = check_groups<C::kLayout>(p.offsets, p.groups, p.limit, p.error, reports);
    }
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    constexpr int kSpan = C::kTileRows * C::kCluster;
    if (!valid_) return false;
    int span, column;
    if constexpr (C::kByRows) {
      int first, length, before;
      const auto tiles = [this](int rows) { return rows < p_.fewest_rows ? 0 : ceil_div(rows, kSpan) * columns_; };
      if (!window_.template seek<C::kLayout>(p_.offsets, p_.groups, p_.limit, index_, tiles, tile.group, first, length,
                                             before)) {
        return false;
      }
      Grid{ceil_div(length, kSpan), columns_}.place(index_ - before, span, column);
      tile.row = first;
      tile.row_end = first + length;
      tile.depth = 0;
      tile.depth_blocks = p_.depth_blocks;
    } else {
      const Grid grid{ceil_div(p_.rows, kSpan), columns_};
      tile.group = 0;
      tile.depth = 0;
      tile.depth_blocks = p_.depth_blocks;
      if constexpr (C::kLayout == Layout::kDepth) {
        do {
          if (index_ >= grid.size() * p_.groups) return false;
          tile.group = index_ / grid.size();
          for (; group_ < tile.group; ++group_) depth_ += blocks_of(group_);
          tile.depth = depth_;
          tile.depth_blocks = blocks_of(tile.group);
          if (tile.depth_blocks == 0) index_ += step_;
        } while (tile.depth_blocks == 0);
      } else if (index_ >= grid.size() * (C::kSplits ? p_.splits : 1)) {
        return false;
      }
      tile.number = index_ - tile.group * grid.size();
      if constexpr (C::kSplits) {
        tile.part = index_ / grid.size();
        tile.number = index_ - tile.part * grid.size();
        tile.depth = part_begin(tile.part);
        tile.depth_blocks = part_begin(tile.part + 1) - tile.depth;
      }
      grid.place(tile.number, span, column);
      tile.row = 0;
      tile.row_end = p_.rows;
    }
    tile.row += span * kSpan + static_cast<int>(rank_in_cluster<C::kCluster>()) * C::kTileRows;
    tile.column = column * C::kTileColumns;
    index_ += step_;
    return true;
  }

 private:
  __device__ __forceinline__ int part_begin(int part) const { return part * p_.depth_blocks / p_.splits; }
  __device__ __forceinline__ int blocks_of(int group) const {
    return ceil_div(__ldg(p_.offsets + group + 1) - __ldg(p_.offsets + group), kBlockK);
  }

  const WideParams& p_;
  GroupWindow window_;
  int index_, step_, columns_;
  int group_ = 0, depth_ = 0;
  bool valid_;
};

// Lane 0 of the producer warp issues the TMA copies; lanes 1 to kScales bring the tile's block scales.
template <class C>
__device__ __forceinline__ void produce(const WideParams& p, WideShared<C>& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int rank = rank_in_cluster<C::kCluster>();
  constexpr int kPart = C::kTileColumns / C::kCluster;  // columns of B that this block loads, for the whole cluster
  constexpr int kBytes = (C::kTileRows + C::kTileColumns) * kBlockK;
  WideSchedule<C> schedule(p, blockIdx.x == 0 && p.error != nullptr);
  RingState<C::kStages> at;
  Tile tile;
  while (schedule.next(tile)) {
    const int scale_rows = ceil_div(p.columns, kBlockK);
    const int scale_row = min(tile.column / kBlockK + lane - 1, scale_rows - 1);
    const float* const b_sf = p.b_sf + (static_cast<int64_t>(tile.group) * scale_rows + scale_row) * p.depth_blocks;
    const int b_row = (C::kByRows ? tile.group * p.columns : 0) + tile.column + rank * kPart;
    const int a_sf_bytes = p.a_sf.bytes(tile.row, C::kTileRows);
    const int b_sf_bytes = C::kRowScaleB ? p.b_row_sf.bytes(tile.column, C::kTileColumns) : 0;
    for (int i = 0; i < tile.depth_blocks; ++i, at.advance()) {
      shared.ring.wait_empty(at);
      uint64_t& full = shared.ring.full[at.stage];
      const int block = tile.depth + i, k = block * kBlockK;
      if (lane == 0) {
        shared.ring.expect(at.stage, kBytes + a_sf_bytes + b_sf_bytes);
        tma_load(shared.a[at.stage], p.a, full, k, tile.row);
        if constexpr (C::kCluster > 1) {
          constexpr uint16_t kAll = (1 << C::kCluster) - 1;
          tma_load_multicast(shared.b[at.stage] + rank * kPart * kBlockK, p.b, full, k, b_row, kAll);
        } else {
          tma_load(shared.b[at.stage], p.b, full, k, b_row);
        }
        load_scales(shared.a_sf[at.stage], p.a_sf.at(tile.row, block), a_sf_bytes, full);
        if constexpr (C::kRowScaleB) {
          load_scales(shared.b_sf[at.stage], p.b_row_sf.at(tile.column, block), b_sf_bytes, full);
        }
      } else if (lane <= C::kScales) {
        copy_float_async(&shared.b_sf[at.stage][lane - 1], b_sf + block);
        arrive_when_copied(full);
      }
    }
  }
  // A block must not end while another can arrive at its barriers.
  for (int i = 0; i < C::kStages; ++i, at.advance()) shared.ring.wait_empty(at);
}

// The scales of a K block that a thread needs: of its two rows, and of its columns or of the blocks that they lie in.
template <class C>
struct StageScales {
  float rows[C::kHalves][2];
  float blocks[C::kScales > 0 ? C::kScales : 1];
  float2 columns[C::kRowScaleB ? C::kN / 8 : 1];

  __device__ __forceinline__ StageScales(uint32_t a_sf, uint32_t b_sf) {
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
      rows[half][0] = load_shared_float(a_sf + half * 256);
      rows[half][1] = load_shared_float(a_sf + half * 256 + 32);
    }
#pragma unroll
    for (int i = 0; i < C::kScales; ++i) blocks[i] = load_shared_float(b_sf + i * 4);
    if constexpr (C::kRowScaleB) {
#pragma unroll
      for (int j = 0; j < C::kN / 8; ++j) columns[j] = load_shared_float2(b_sf + j * 32);
    }
  }
};

// Adds a product's columns, scaled, to the sums. Accumulator i of a thread lies in row (i / 2 % 2) * 8 + lane / 4 of
// its warp, column i / 4 * 8 + lane % 4 * 2 + i % 2.
template <class C, int kEdge>
__device__ __forceinline__ void promote(float (&sum)[C::kTileColumns / 2], const float (&product)[C::kN / 2],
                                        const StageScales<C>& scales, int half, int part) {
#pragma unroll
  for (int i = 0; i < C::kN / 2; ++i) {
    const int column = part * C::kN + i / 4 * 8;
    const float row = scales.rows[half][i / 2 % 2];
    float& s = sum[part * (C::kN / 2) + i];
    if constexpr (!C::kRowScaleB) {
      s = fmaf(row * scales.blocks[column < kEdge ? 0 : (column - kEdge) / kBlockK + 1], product[i], s);
      continue;
    }
    const float by = i % 2 == 0 ? scales.columns[i / 4].x : scales.columns[i / 4].y;
    // With one half factors are ready before the product is; for two halves there are no registers to keep them in.
    s = C::kHalves == 1 ? fmaf(row * by, product[i], s) : fmaf(row, by * product[i], s);
  }
}

// The warp's 16 rows of a chunk of 128 bytes of columns to shared memory, under the 128-byte swizzle.
__device__ __forceinline__ void stage_chunk(uint8_t* buffer, const float* sum, int groups, __nv_bfloat16) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = lane / 8 % 2 * 8 + lane % 8;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    if (j >= groups) break;
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
      words[i] = reinterpret_cast<const uint32_t&>(pair);
    }
    const int unit = j + lane / 16;
    auto& target = *reinterpret_cast<cute::uint128_t*>(buffer + row * 128 + (unit ^ row % 8) * 16);
    cute::SM90_U32x4_STSM_N::copy(words[0], words[1], words[2], words[3], target);
  }
}
__device__ __forceinline__ void stage_chunk(uint8_t* buffer, const float* sum, int groups, float) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (j >= groups) break;
    const int unit = 2 * j + lane % 4 / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      auto& target = *reinterpret_cast<float2*>(buffer + row * 128 + (unit ^ row % 8) * 16 + lane % 2 * 8);
      target = make_float2(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
    }
  }
}

__device__ __forceinline__ void write_unit(__nv_bfloat16* out, const uint4& unit, bool) {
  *reinterpret_cast<uint4*>(out) = unit;
}
__device__ __forceinline__ void write_unit(float* out, const uint4& unit, bool accumulate) {
  float4 value = reinterpret_cast<const float4&>(unit);
  if (accumulate) {
    const float4 old = __ldcg(reinterpret_cast<const float4*>(out));  // maybe another block's, of this kernel
    value = make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
  }
  *reinterpret_cast<float4*>(out) = value;
}

// A chunk of 128 bytes of columns, or as many as the tile and the matrix have, written by the warp.
template <class C>
__device__ __forceinline__ void write_chunk(const WideParams& p, const uint8_t* buffer, int64_t row, int rows,
                                            int column, int columns, bool adds) {
  using Out = typename C::Out;
  constexpr int kUnit = 16 / sizeof(Out);
  const int lane = threadIdx.x % kWarpSize, unit = lane % 8;
  if (unit * kUnit >= min(columns, p.columns - column)) return;
  for (int r = lane / 8; r < rows; r += 4) {
    const uint4 value = *reinterpret_cast<const uint4*>(buffer + r * 128 + (unit ^ r % 8) * 16);
    write_unit(static_cast<Out*>(p.out) + (row + r) * p.columns + column + unit * kUnit, value, adds);
  }
}

// Writes the tile: whole boxes by TMA (or by its reduction, which adds to what is there: one addition an element and part,
// in turns, so the order of sums stays fixed), kBuffers chunks at a time; rows at the end of a group, and chunks of which one is not
// whole, by the warp itself.
template <class C>
__device__ __forceinline__ void store_tile(const WideParams& p, const Tile& tile,
                                           uint8_t (&buffers)[C::kBuffers][kStoreBytes],
                                           const float (&sum)[C::kTileColumns / 2], int warp_row) {
  using Out = typename C::Out;
  constexpr int kChunk = 128 / sizeof(Out), kChunks = (C::kTileColumns + kChunk - 1) / kChunk, kGroups = kChunk / 8;
  const int row = tile.row + warp_row, rows = min(16, tile.row_end - row);
  if (rows <= 0) return;
  const int64_t out_row = (C::kLayout == Layout::kDepth ? static_cast<int64_t>(tile.group) * p.rows : 0) + row;
  const bool adds = p.accumulate || tile.part > 0;
#pragma unroll
  for (int first = 0; first < kChunks; first += C::kBuffers) {
    const int end = min(first + C::kBuffers, kChunks);
    if (tile.column + first * kChunk >= p.columns) break;
    if (cute::elect_one_sync()) cute::tma_store_wait<0>();
    __syncwarp();
#pragma unroll
    for (int c = first; c < end; ++c) {
      stage_chunk(buffers[c - first], &sum[c * kGroups * 4], min(kGroups, C::kTileColumns / 8 - c * kGroups), Out{});
    }
    if (rows == 16 && end * kChunk <= min(C::kTileColumns, p.columns - tile.column)) {
      cute::tma_store_fence();
      __syncwarp();
      if (cute::elect_one_sync()) {
#pragma unroll
        for (int c = first; c < end; ++c) {
          const int column = tile.column + c * kChunk;
          if (adds) {
            cute::SM90_TMA_REDUCE_ADD_2D::copy(&p.out_map, buffers[c - first], column, static_cast<int>(out_row));
          } else {
            cute::SM90_TMA_STORE_2D::copy(&p.out_map, buffers[c - first], column, static_cast<int>(out_row));
          }
        }
        cute::tma_store_arrive();
      }
    } else {
      __syncwarp();
      for (int c = first; c < end; ++c) {
        write_chunk<C>(p, buffers[c - first], out_row, rows, tile.column + c * kChunk, C::kTileColumns - c * kChunk,
                       adds);
      }
    }
    __syncwarp();
  }
}

// The parts of a tile are added in the order of K, a warp's rows at a time: part i waits until i - 1 has been added. Each
// part has a block of its own, and waits for one of a lower number, which the device starts first: so there is always one
// that does not wait, however few run at once.
template <class C>
__device__ __forceinline__ void wait_turn(const WideParams& p, const Tile& tile, uint32_t warp) {
  if (tile.part == 0) return;
  const int* const turn = p.turns + tile.number * C::kConsumerWarps + warp;
  const auto added = [turn] {
    int parts;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(parts) : "l"(turn) : "memory");
    return parts;
  };
  if (threadIdx.x % kWarpSize == 0) {
    while (added() != tile.part) __nanosleep(64);
  }
  __syncwarp();
  asm volatile("fence.proxy.async;" ::: "memory");
}
template <class C>
__device__ __forceinline__ void end_turn(const WideParams& p, const Tile& tile, uint32_t warp) {
  if (tile.part + 1 == p.splits) return;
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");  // written, not only read
  asm volatile("fence.proxy.async;" ::: "memory");
  __threadfence();
  __syncwarp();
  if (threadIdx.x % kWarpSize == 0) {
    int* const turn = p.turns + tile.number * C::kConsumerWarps + warp;
    asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turn), "r"(tile.part + 1) : "memory");
  }
}

// The tile's sums over its K blocks. From the end of a product to the start of the next lies what the tensor cores can
// wait for, so little is done there: addresses are kept, and the scales are read before the product starts, since a
// load after it queues behind its operands. Unrolled, the question whether the next stage is full is asked while this
// one is promoted.
template <class C>
using Sums = float[C::kHalves][C::kTileColumns / 2];

template <class C, int kEdge>
__device__ __forceinline__ void multiply(WideShared<C>& shared, RingState<C::kStages>& at, int blocks, int row,
                                         uint32_t warp, Sums<C>& sums) {
  using Ring = decltype(shared.ring);
  constexpr int kProducts = C::kHalves * C::kParts;
  const uint32_t full = shared_address(shared.ring.full), empty = shared.ring.empty_address();
  const uint32_t a_first =
      uniform(matrix_descriptor(shared_address(shared.a) + warp / kWarpgroupWarps * (C::kHalves * 64 * kBlockK)));
  const uint32_t b_first = uniform(matrix_descriptor(shared_address(shared.b)));
  const uint32_t a_sf = shared_address(shared.a_sf) + row * 4;
  const uint32_t b_sf = shared_address(shared.b_sf) + (C::kRowScaleB ? threadIdx.x % 4 * 8 : 0);
  // NOTE: of two halves and the schedule of one matrix more would not fit the registers.
  constexpr int kUnroll = C::kHalves == 2 && C::kLayout == Layout::kDense ? 1 : 4;
#pragma unroll kUnroll
  for (int i = 0; i < blocks; ++i, at.advance()) {
    const uint32_t a = a_first + at.stage * (sizeof(shared.a[0]) / 16);
    const uint32_t b = b_first + at.stage * (sizeof(shared.b[0]) / 16);
    Ring::wait_full(full, at);
    const StageScales<C> scales(a_sf + at.stage * sizeof(shared.a_sf[0]), b_sf + at.stage * sizeof(shared.b_sf[0]));
    float product[C::kN / 2];
    start_product<C::kN>(a, b, product);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      finish_product<C::kN>(product);
      if (n == kProducts - 1) Ring::release(empty, at.stage);
      promote<C, kEdge>(sums[n / C::kParts], product, scales, n / C::kParts, n % C::kParts);
      const int next = n + 1, half = next / C::kParts, part = next % C::kParts;
      if (next < kProducts) {
        start_product<C::kN>(a + half * (64 * kBlockK / 16), b + part * (C::kN * kBlockK / 16), product);
      }
    }
  }
}

// Calls f with the distance from the tile's first column to the next block of scales as a constant: selecting scales by
// a variable costs more than the promotion itself.
template <class C, int kEdge = C::kRowScaleB ? kBlockK : C::kEdgeStep, class F>
__device__ __forceinline__ void with_edge(int edge, F&& f) {
  if constexpr (kEdge == kBlockK) {
    f(std::integral_constant<int, kBlockK>{});
  } else if (edge == kEdge) {
    f(std::integral_constant<int, kEdge>{});
  } else {
    with_edge<C, kEdge + C::kEdgeStep>(edge, f);
  }
}

template <class C>
__device__ __forceinline__ void consume(const WideParams& p, WideShared<C>& shared) {
  const uint32_t warp = uniform_warp() - kWarpgroupWarps;
  const int lane = threadIdx.x % kWarpSize;
  // The warp's rows of the first half; those of the second are 64 further down.
  const int warp_row = warp / kWarpgroupWarps * (C::kHalves * 64) + warp % kWarpgroupWarps * 16;
  WideSchedule<C> schedule(p, false);
  RingState<C::kStages> at;
  Tile tile;
  while (schedule.next(tile)) {
    Sums<C> sums = {};
    with_edge<C>(kBlockK - tile.column % kBlockK, [&](auto edge) {
      multiply<C, edge>(shared, at, tile.depth_blocks, warp_row + lane / 4 + (tile.row & RowScales::kEarly), warp,
                        sums);
    });
    if constexpr (C::kSplits) wait_turn<C>(p, tile, warp);
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
      store_tile<C>(p, tile, shared.store[warp], sums[half], warp_row + half * 64);
    }
    if constexpr (C::kSplits) end_turn<C>(p, tile, warp);
  }
  cute::tma_store_wait<0>();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) wide_kernel(const __grid_constant__ WideParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WideShared<C>*>(raw);
  if (threadIdx.x == 0) shared.ring.init();
  sync_cluster<C::kCluster>();
  wait_for_inputs();
  release_dependents();
  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    if (threadIdx.x < kWarpSize) produce<C>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    consume<C>(p, shared);
  }
}

}  // namespace dsv3
