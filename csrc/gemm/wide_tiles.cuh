// What the wide kernel is made for and given, and which tiles a block takes.
#pragma once

#include <cuda.h>

#include <numeric>

#include "../hopper/pipeline.cuh"
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
  static constexpr int kBuffers = kBuffers_;  // of a warp, for 128 bytes of columns each
  static constexpr bool kByRows = kLayout == Layout::kRows || kLayout == Layout::kMasked;
  static constexpr int kHalves = kHalves_;  // products of 64 rows that a warpgroup has one below the other
  static constexpr int kTileRows = 2 * 64 * kHalves, kTileColumns = kN * kParts;
  static constexpr int kEdgeStep = std::gcd(kTileColumns, kBlockK);  // of a tile's distance to the next block of scales
  // Where at most half of the rows of a cluster's last tiles of a group exist, its blocks take the same rows.
  static constexpr bool kSameRows = kByRows && kCluster == 2;
  static constexpr int kCopyRows = kSameRows ? kTileRows / 2 : kTileRows;  // of A, of a TMA copy
  // Blocks of B's scales that a tile can meet.
  static constexpr int kScales = kRowScaleB ? 0 : (2 * kBlockK - kEdgeStep + kTileColumns - 1) / kBlockK;
  static constexpr bool kSplits = kLayout == Layout::kDense && kRowScaleB && kHalves == 1;  // K may be cut into parts
  static constexpr int kConsumerWarps = 8;
  // Of a thread: together those that the block begins with, 168 each.
  static constexpr int kProducerRegisters = kHalves == 1 ? 40 : 24, kConsumerRegisters = kHalves == 1 ? 232 : 240;
  static constexpr int kThreads = 3 * kWarpgroup;
  static_assert(!kRowScaleB || kParts == 1);  // StageScales holds the columns of one product
  static_assert(kHalves == 1 || kRowScaleB);  // two halves load the scales of columns ahead
};

constexpr int kStoreBytes = 2048;  // 16 rows of 128 bytes

template <class C>
struct WideShared {
  alignas(1024) uint8_t a[C::kStages][C::kTileRows * kBlockK];
  alignas(1024) uint8_t b[C::kStages][C::kTileColumns * kBlockK];
  alignas(1024) uint8_t store[C::kConsumerWarps][C::kBuffers][kStoreBytes];
  alignas(16) float b_sf[C::kStages][C::kRowScaleB ? C::kTileColumns : 4];
  alignas(16) float a_sf[C::kStages][RowScales::size(C::kTileRows)];
  // In turn. A tile is put down when all warps have released the last stage but kStages, which is one of the tile kStages
  // before it or of a later one: so the tile before that has been written out.
  Tile tiles[C::kStages + 1];
  RingBarriers<C::kStages, C::kConsumerWarps, C::kCluster, C::kScales> ring;
};

struct WideParams {
  CUtensorMap a, b, out_map;  // out_map: only where Out is float
  void* out;
  RowScales a_sf, b_row_sf;
  const float* b_sf;   // [G, ceil(N / 128), depth_blocks]
  const int* offsets;  // [G + 1], counts [G] (kMasked), or null
  DeviceError* error;
  int rows, columns, depth_blocks, groups;
  int limit;        // of the offsets or counts
  int fewest_rows;  // of a group that is taken here; narrow.cuh takes the others
  bool accumulate;
  // By which the second warpgroup begins later, so that one writes its part of a tile while the other multiplies.
  int late_clocks;
  int splits;  // parts that K is cut into (kSplits)
  int* turns;  // [tiles, kConsumerWarps], zeros: the part of a tile whose turn it is to be added
};

template <class C>
class WideSchedule {
 public:
  // By a whole warp. The first tile is that of the cluster's own number. The first block reports wrong offsets.
  __device__ __forceinline__ explicit WideSchedule(const WideParams& p) : p_(p) {
    index_ = blockIdx.x / C::kCluster;
    valid_ = true;
    if constexpr (C::kLayout != Layout::kDense) {
      valid_ = check_groups<C::kLayout>(p.offsets, p.groups, p.limit, p.error, blockIdx.x == 0 && p.error != nullptr);
    }
  }

  __device__ __forceinline__ bool next(Tile& tile) {
    if (!valid_) return false;
    // Not kept: registers are few.
    const int columns = ceil_div(p_.columns, C::kTileColumns), step = gridDim.x / C::kCluster;
    int span, column;
    if constexpr (C::kByRows) {
      int first, length, before;
      const auto tiles = [&](int rows) {
        if (rows < p_.fewest_rows) return 0;
        return spans_of(rows) * columns + (ends_in_half(rows) ? ceil_div(columns, 2) : 0);
      };
      if (!window_.template seek<C::kLayout>(p_.offsets, p_.groups, p_.limit, index_, tiles, tile.group, first, length,
                                             before)) {
        return false;
      }
      tile.same_rows = false;
      const int spans = spans_of(length), within = index_ - before;
      const int last_panel = max(spans - 1, 0) / kPanel * kPanel;
      if (ends_in_half(length) && within >= last_panel * columns) {
        // With every two columns of the last panel come those of the rows that are left: B is read once for all.
        const int height = spans - last_panel, pair = (within - last_panel * columns) / (2 * height + 1);
        const int at = within - last_panel * columns - pair * (2 * height + 1);
        tile.same_rows = at >= height * min(2, columns - 2 * pair);
        column = 2 * pair + (tile.same_rows ? static_cast<int>(rank_in_cluster<C::kCluster>()) : at / height);
        span = tile.same_rows ? spans : last_panel + at % height;
      } else {
        Grid{spans, columns}.place(within, span, column);
      }
      tile.row = first;
      tile.row_end = first + length;
      tile.depth = 0;
      tile.depth_blocks = p_.depth_blocks;
    } else {
      const Grid grid{ceil_div(p_.rows, kSpan), columns};
      tile.group = 0;
      tile.depth = 0;
      tile.depth_blocks = p_.depth_blocks;
      if constexpr (C::kLayout == Layout::kDepth) {
        do {
          if (index_ >= grid.size() * p_.groups) return false;
          tile.group = index_ / grid.size();
#pragma unroll 1  // few registers
          for (; group_ < tile.group; ++group_) depth_ += blocks_of(group_);
          tile.depth = depth_;
          tile.depth_blocks = blocks_of(tile.group);
          if (tile.depth_blocks == 0) index_ += step;
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
    tile.row += span * kSpan;
    if (!tile.same_rows) tile.row += static_cast<int>(rank_in_cluster<C::kCluster>()) * C::kTileRows;
    tile.column = column * C::kTileColumns;
    index_ += step;
    return true;
  }

 private:
  static constexpr int kSpan = C::kTileRows * C::kCluster;
  // Of a group with so many rows: whether its last rows are so few, and the spans of those before them.
  static __device__ __forceinline__ bool ends_in_half(int rows) {
    return C::kSameRows && rows % kSpan > 0 && rows % kSpan <= C::kTileRows;
  }
  static __device__ __forceinline__ int spans_of(int rows) {
    return ceil_div(rows, kSpan) - (ends_in_half(rows) ? 1 : 0);
  }
  __device__ __forceinline__ int part_begin(int part) const { return part * p_.depth_blocks / p_.splits; }
  __device__ __forceinline__ int blocks_of(int group) const {
    return ceil_div(__ldg(p_.offsets + group + 1) - __ldg(p_.offsets + group), kBlockK);
  }

  const WideParams& p_;
  GroupWindow window_;
  int index_;
  int group_ = 0, depth_ = 0;
  bool valid_;
};

}  // namespace dsv3
