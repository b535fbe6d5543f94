// The kernel for groups of any number of rows, weights read once where a group has at most 256: tiles of 128 weights by
// up to 256 tokens, with as many columns of the tensor core as the tile has tokens. The blocks of a cluster of two take
// neighbouring weights and share the tokens: each loads every other 16 and multicasts them. Roofline: README.md.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "transposed.cuh"

namespace dsv3 {

template <Layout kLayout_, class Out_>
struct NarrowConfig {
  static constexpr Layout kLayout = kLayout_;
  using Out = Out_;
  static constexpr int kStages = 4, kCluster = 2, kConsumerWarps = 8, kThreads = 3 * kWarpgroup;
  static constexpr int kTokens = 256, kBox = 16;  // of a tile at most, and of a TMA copy
};

template <class C>
struct NarrowShared {
  alignas(1024) uint8_t b[C::kStages][kTileRows * kBlockK];
  alignas(1024) uint8_t a[C::kStages][C::kTokens * kBlockK];
  alignas(16) float a_sf[C::kStages][RowScales::size(C::kTokens)];
  float b_sf[C::kStages];
  alignas(16) uint8_t scratch[C::kConsumerWarps][kScratchBytes];
  RingBarriers<C::kStages, C::kConsumerWarps, C::kCluster, 1> ring;
};

struct NarrowParams {
  CUtensorMap a, b;
  void* out;
  RowScales a_sf;
  const float* b_sf;   // [G, ceil(N / 128), depth_blocks]
  const int* numbers;  // offsets [G + 1] or counts [G]
  DeviceError* error;
  int rows;  // of all groups (offsets) or of one (counts)
  int columns, depth_blocks, groups;
  int most_rows;  // of a group that this kernel takes; others are another's
};

// Columns of the tensor core for a number of tokens.
__device__ __forceinline__ int padded_tokens(int tokens) {
  if (tokens <= 16) return 16;
  if (tokens <= 32) return 32;
  if (tokens <= 64) return 64;
  if (tokens <= 96) return 96;
  return tokens <= 128 ? 128 : tokens <= 192 ? 192 : 256;
}

template <class C>
class NarrowSchedule {
 public:
  __device__ __forceinline__ NarrowSchedule(const NarrowParams& p, bool reports) : p_(p) {
    index_ = blockIdx.x / C::kCluster;
    step_ = gridDim.x / C::kCluster;
    pairs_ = ceil_div(p.columns, kTileRows * C::kCluster);
    valid_ = check_groups<C::kLayout>(p.numbers, p.groups, p.rows, p.error, reports);
  }

  // row and row_end are tokens, column is the block's first weight.
  __device__ __forceinline__ bool next(Tile& tile) {
    int first, length, before;
    const auto tiles = [this](int rows) { return rows > p_.most_rows ? 0 : ceil_div(rows, C::kTokens) * pairs_; };
    if (!valid_ || !window_.template seek<C::kLayout>(p_.numbers, p_.groups, p_.rows, index_, tiles, tile.group, first,
                                                      length, before)) {
      return false;
    }
    int tokens, pair;
    Grid{ceil_div(length, C::kTokens), pairs_}.place(index_ - before, tokens, pair);
    tile.row = first + tokens * C::kTokens;
    tile.row_end = min(first + length, tile.row + C::kTokens);
    tile.column = (pair * C::kCluster + static_cast<int>(rank_in_cluster<C::kCluster>())) * kTileRows;
    index_ += step_;
    return true;
  }

 private:
  const NarrowParams& p_;
  GroupWindow window_;
  int index_, step_, pairs_;
  bool valid_;
};

template <class C>
__device__ __forceinline__ void produce(const NarrowParams& p, NarrowShared<C>& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int rank = rank_in_cluster<C::kCluster>();
  constexpr uint16_t kAll = (1 << C::kCluster) - 1;
  NarrowSchedule<C> schedule(p, blockIdx.x == 0);
  RingState<C::kStages> at;
  Tile tile;
  while (schedule.next(tile)) {
    const int padded = padded_tokens(tile.row_end - tile.row);
    const int sf_bytes = p.a_sf.bytes(tile.row, tile.row_end - tile.row);
    const int bytes = (kTileRows + padded) * kBlockK + sf_bytes;
    const int scale_rows = ceil_div(p.columns, kBlockK), scale_row = min(tile.column / kBlockK, scale_rows - 1);
    const float* const b_sf = p.b_sf + (static_cast<int64_t>(tile.group) * scale_rows + scale_row) * p.depth_blocks;
    const int b_row = tile.group * p.columns + tile.column;
    for (int block = 0; block < p.depth_blocks; ++block, at.advance()) {
      shared.ring.wait_empty(at);
      uint64_t& full = shared.ring.full[at.stage];
      const int k = block * kBlockK;
      if (lane == 0) {
        shared.ring.expect(at.stage, bytes);
        tma_load(shared.b[at.stage], p.b, full, k, b_row);
        for (int i = rank * C::kBox; i < padded; i += C::kCluster * C::kBox) {
          tma_load_multicast(shared.a[at.stage] + i * kBlockK, p.a, full, k, tile.row + i, kAll);
        }
        load_scales(shared.a_sf[at.stage], p.a_sf.at(tile.row, block), sf_bytes, full);
      } else if (lane == 1) {
        copy_float_async(&shared.b_sf[at.stage], b_sf + block);
        arrive_when_copied(full);
      }
    }
  }
  // A block must not end while another can arrive at its barriers.
  for (int i = 0; i < C::kStages; ++i, at.advance()) shared.ring.wait_empty(at);
}

// One tile of kHalves times kN tokens.
template <class C, int kN, int kHalves>
__device__ __forceinline__ void consume_tile(const NarrowParams& p, NarrowShared<C>& shared, const Tile& tile,
                                             RingState<C::kStages>& at) {
  using Ring = decltype(shared.ring);
  const uint32_t warp = uniform_warp() - kWarpgroupWarps, group = warp / kWarpgroupWarps;
  const uint32_t full = shared_address(shared.ring.full), empty = shared.ring.empty_address();
  const uint32_t b_first = uniform(matrix_descriptor(shared_address(shared.b)) + group * (64 * kBlockK / 16));
  const uint32_t a_first = uniform(matrix_descriptor(shared_address(shared.a)));
  const uint32_t b_sf = shared_address(shared.b_sf);
  const uint32_t a_sf = shared_address(shared.a_sf) + (tile.row & RowScales::kEarly) * 4;
  float sum[kHalves][kN / 2] = {};
#pragma unroll 1
  for (int i = 0; i < p.depth_blocks; ++i, at.advance()) {
    const uint32_t b = b_first + at.stage * (sizeof(shared.b[0]) / 16);
    const uint32_t a = a_first + at.stage * (sizeof(shared.a[0]) / 16);
    Ring::wait_full(full, at);
    const float weight_sf = load_shared_float(b_sf + at.stage * 4);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float product[kN / 2];
      start_product<kN>(b, a + half * (kN * kBlockK / 16), product);
      finish_product<kN>(product);
      promote_transposed<kN, false>(sum[half], product, weight_sf,
                                    a_sf + at.stage * sizeof(shared.a_sf[0]) + half * kN * 4);
    }
    Ring::release(empty, at.stage);
  }
  using Out = typename C::Out;
  const Target<Out> target{static_cast<Out*>(p.out) + static_cast<int64_t>(tile.row) * p.columns,
                           p.columns,
                           tile.row_end - tile.row,
                           tile.column + static_cast<int>(warp) * 16,
                           p.columns,
                           false};
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int j = 0; j < kN / 16; ++j) {
      write_tokens(target, half * kN + 16 * j, &sum[half][8 * j], shared.scratch[warp]);
    }
  }
}

template <class C>
__device__ __forceinline__ void consume(const NarrowParams& p, NarrowShared<C>& shared) {
  NarrowSchedule<C> schedule(p, false);
  RingState<C::kStages> at;
  Tile tile;
  while (schedule.next(tile)) {
    switch (padded_tokens(tile.row_end - tile.row)) {
      case 16:
        consume_tile<C, 16, 1>(p, shared, tile, at);
        break;
      case 32:
        consume_tile<C, 32, 1>(p, shared, tile, at);
        break;
      case 64:
        consume_tile<C, 64, 1>(p, shared, tile, at);
        break;
      case 96:
        consume_tile<C, 96, 1>(p, shared, tile, at);
        break;
      case 128:
        consume_tile<C, 128, 1>(p, shared, tile, at);
        break;
      case 192:
        consume_tile<C, 96, 2>(p, shared, tile, at);
        break;
      default:
        consume_tile<C, 128, 2>(p, shared, tile, at);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) narrow_kernel(const __grid_constant__ NarrowParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<NarrowShared<C>*>(raw);
  if (threadIdx.x == 0) shared.ring.init();
  sync_cluster<C::kCluster>();
  wait_for_inputs();
  release_dependents();
  if (threadIdx.x < kWarpgroup) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x < kWarpSize) produce<C>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    consume<C>(p, shared);
  }
}

}  // namespace dsv3
