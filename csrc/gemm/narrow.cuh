// Groups of at most 128 rows, whose weights are read once: tiles of 128 weights by up to 128 tokens, with as many columns
// of the tensor core as the tile has tokens. The blocks of a cluster of two take neighbouring weights and share the
// tokens: each loads every other 16 and multicasts them. The kernel is in groups.cuh. Roofline: README.md.
#pragma once

#include "transposed.cuh"

namespace dsv3 {

template <Layout kLayout_, class Out_>
struct NarrowConfig {
  static constexpr Layout kLayout = kLayout_;
  using Out = Out_;
  static constexpr int kStages = 6, kCluster = 2, kConsumerWarps = 8;
  static constexpr int kTokens = 128, kBox = 16;  // of a group at most, and of a TMA copy
};

template <class C>
struct NarrowShared {
  alignas(1024) uint8_t b[C::kStages][kTileRows * kBlockK];
  alignas(1024) uint8_t a[C::kStages][C::kTokens * kBlockK];
  alignas(16) float a_sf[C::kStages][RowScales::size(C::kTokens)];
  float b_sf[C::kStages];
  alignas(16) uint8_t scratch[C::kConsumerWarps][kScratchBytes];
  Tile tiles[C::kStages + 1];  // in turn
  RingBarriers<C::kStages, C::kConsumerWarps, C::kCluster, 2> ring;
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
};

// Columns of the tensor core for a number of tokens.
__device__ __forceinline__ int padded_tokens(int tokens) {
  if (tokens <= 16) return 16;
  if (tokens <= 32) return 32;
  if (tokens <= 64) return 64;
  return tokens <= 96 ? 96 : 128;
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
    const auto tiles = [this](int rows) { return rows == 0 || rows > C::kTokens ? 0 : pairs_; };
    if (!valid_ || !window_.template seek<C::kLayout>(p_.numbers, p_.groups, p_.rows, index_, tiles, tile.group, first,
                                                      length, before)) {
      return false;
    }
    tile.row = first;
    tile.row_end = first + length;
    tile.depth_blocks = p_.depth_blocks;
    tile.column = ((index_ - before) * C::kCluster + static_cast<int>(rank_in_cluster<C::kCluster>())) * kTileRows;
    index_ += step_;
    return true;
  }

 private:
  const NarrowParams& p_;
  GroupWindow window_;
  int index_, step_, pairs_;
  bool valid_;
};

// One warp brings the weights and finds the tiles, which stand in shared memory when their first stage is full (as in
// wide.cuh), another the tokens: one for both would take longer for a K block's copies than the product of few tokens.
// A tile without K blocks is the end. NOTE: by an elected lane, see few_rows.cuh.
template <class C, bool kWeights>
__device__ __forceinline__ void produce(const NarrowParams& p, NarrowShared<C>& shared) {
  const int lane = threadIdx.x % kWarpSize, rank = rank_in_cluster<C::kCluster>();
  const int scale_rows = ceil_div(p.columns, kBlockK);
  NarrowSchedule<C> schedule(p, kWeights && blockIdx.x == 0);
  RingState<C::kStages> at;
  int place = 0;
  for (Tile tile{}; true; place = next_place<C>(place)) {
    const bool more = uniform(schedule.next(tile));
    for (int block = 0; block < (more ? p.depth_blocks : 1); ++block, at.advance()) {
      shared.ring.wait_empty(at);
      uint64_t& full = shared.ring.full[at.stage];
      const int k = block * kBlockK;
      if constexpr (kWeights) {
        if (cute::elect_one_sync()) {
          if (block == 0) put(shared.tiles[place], more ? tile : Tile{});
          shared.ring.expect(at.stage, more ? kTileRows * kBlockK : 0);
          if (more) tma_load(shared.b[at.stage], p.b, full, k, tile.group * p.columns + tile.column);
        }
        if (lane == 1) {
          const int scale_row = min(tile.column / kBlockK, scale_rows - 1);
          const int64_t row = static_cast<int64_t>(tile.group) * scale_rows + scale_row;
          if (more) copy_float_async(shared_pointer(&shared.b_sf[at.stage]), p.b_sf + row * p.depth_blocks + block);
          arrive_when_copied(full);
        }
      } else if (cute::elect_one_sync()) {
        constexpr uint16_t kAll = (1 << C::kCluster) - 1;
        const int padded = more ? padded_tokens(tile.row_end - tile.row) : 0;
        const int sf_bytes = more ? p.a_sf.bytes(tile.row, tile.row_end - tile.row) : 0;
        shared.ring.expect(at.stage, padded * kBlockK + sf_bytes);
        for (int i = rank * C::kBox; i < padded; i += C::kCluster * C::kBox) {
          tma_load_multicast(shared.a[at.stage] + i * kBlockK, p.a, full, k, tile.row + i, kAll);
        }
        load_scales(shared.a_sf[at.stage], p.a_sf.at(tile.row, block), sf_bytes, full);
      }
    }
    if (!more) break;
  }
  // A block must not end while another can arrive at its barriers.
  for (int i = 0; i < C::kStages; ++i, at.advance()) shared.ring.wait_empty(at);
}

// One tile of kN tokens.
template <class C, int kN>
__device__ __forceinline__ void consume_tile(const NarrowParams& p, NarrowShared<C>& shared, const Tile& tile,
                                             RingState<C::kStages>& at) {
  using Ring = decltype(shared.ring);
  const uint32_t warp = uniform_warp() - kWarpgroupWarps, group = warp / kWarpgroupWarps;
  const uint32_t full = shared_address(shared.ring.full), empty = shared.ring.empty_address();
  const uint32_t b_first = uniform(matrix_descriptor(shared_address(shared.b)) + group * (64 * kBlockK / 16));
  const uint32_t a_first = uniform(matrix_descriptor(shared_address(shared.a)));
  const uint32_t b_sf = shared_address(shared.b_sf);
  const uint32_t a_sf = shared_address(shared.a_sf) + uniform(tile.row & RowScales::kEarly) * 4;
  float sum[kN / 2] = {};
  struct Product {
    float values[kN / 2], weight;
    TokenScales<kN> tokens;
    int stage;
  };
  const auto start = [&](Product& product, int) {
    Ring::wait_full(full, at);
    product.stage = at.stage;
    product.weight = load_shared_float(b_sf + at.stage * 4);
    product.tokens.template load<false>(a_sf + at.stage * sizeof(shared.a_sf[0]));
    start_product<kN>(b_first + at.stage * (sizeof(shared.b[0]) / 16), a_first + at.stage * (sizeof(shared.a[0]) / 16),
                      product.values);
    at.advance();
  };
  const auto finish = [&](Product& product, auto pending) {
    finish_product<kN, pending>(product.values);
    Ring::release(empty, product.stage);
    promote_transposed<kN>(sum, product.values, product.weight, product.tokens);
  };
  if constexpr (kN <= 64) {
    multiply_in_turn<Product>(p.depth_blocks, start, finish);
  } else {
#pragma unroll 1
    for (int i = 0; i < p.depth_blocks; ++i) {  // for two products there are no registers
      Product product;
      start(product, i);
      finish(product, std::integral_constant<int, 0>{});
    }
  }
  using Out = typename C::Out;
  const Target<Out> target{static_cast<Out*>(p.out) + static_cast<int64_t>(tile.row) * p.columns,
                           p.columns,
                           tile.row_end - tile.row,
                           tile.column + static_cast<int>(warp) * 16,
                           p.columns,
                           false};
#pragma unroll
  for (int j = 0; j < kN / 16; ++j) write_tokens(target, 16 * j, &sum[8 * j], shared.scratch[warp]);
}

template <class C>
__device__ __forceinline__ void consume(const NarrowParams& p, NarrowShared<C>& shared) {
  using Ring = decltype(shared.ring);
  RingState<C::kStages> at;
  for (int place = 0;; place = next_place<C>(place)) {
    Ring::wait_full(shared_address(shared.ring.full), at);
    const Tile tile = shared.tiles[place];
    if (uniform(tile.depth_blocks) == 0) break;
    switch (uniform(padded_tokens(tile.row_end - tile.row))) {
      case 16:
        consume_tile<C, 16>(p, shared, tile, at);
        break;
      case 32:
        consume_tile<C, 32>(p, shared, tile, at);
        break;
      case 64:
        consume_tile<C, 64>(p, shared, tile, at);
        break;
      case 96:
        consume_tile<C, 96>(p, shared, tile, at);
        break;
      default:
        consume_tile<C, 128>(p, shared, tile, at);
    }
  }
  Ring::release(shared.ring.empty_address(), at.stage);
}

}  // namespace dsv3
