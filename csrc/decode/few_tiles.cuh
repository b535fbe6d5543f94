// Products of many rows of bf16 weights with few tokens, in tiles of 64 rows (the M side of a warpgroup's tensor core, tokens
// on N). A block, two of which share a multiprocessor, goes from tile to tile without a pause in its loads: a warp has TMA
// bring the weights, another gathers the tokens' rows, a warpgroup multiplies what has come; the ring between them holds as
// much as memory needs under way. K is one sum in one order, so a token gets the same bits alone and among others.
//
// What differs between kernels is a Work, of which every warp has one:
//   tiles()                         how many there are; a block takes every gridDim.x-th
//   begin(tile)                     for a whole warp: turns to a tile, and returns how many tokens it has
//   depth()                         its columns of K, a multiple of 32
//   load(to, column, full)          by one lane: TMA of 64 rows of 64 columns
//   row(token)                      where the row of the tile's token begins
//   store(out, first, thread)       for 128 threads: what has become of the tile's tokens from `first` on
#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "../hopper/pipeline.cuh"
#include "../hopper/tensor_map.h"
#include "../hopper/wgmma.cuh"
#include "few_attention.cuh"

namespace dsv3 {

constexpr int kTileRows = 64, kBoxColumns = 64;
constexpr int kBoxBytes = kTileRows * kBoxColumns * 2;

template <int kN_>
struct TileConfig {
  static constexpr int kN = kN_;                  // tokens at a time: 8, 16 or 32
  static constexpr int kBoxes = kN < 32 ? 2 : 1;  // of 64 columns a stage
  static constexpr int kDepth = kBoxes * kBoxColumns;
  static constexpr int kTokenBytes = kN * kBoxColumns * 2;
  static constexpr int kStages = kN == 8 ? 5 : kN == 16 ? 4 : 7;  // 80 to 90 KiB
  static constexpr int kWarps = kWarpgroupWarps, kThreads = (kWarps + 2) * kWarpSize;
  static constexpr int kBlocks = 2;  // a multiprocessor
  // Stages of tokens that are under way before the first is waited for. NOTE: the ring holds two more at least, since a stage is
  // given back behind the start of the next product.
  static constexpr int kLag = 2;
  static_assert(kStages >= kLag + 2);
};

template <class C>
struct TileShared {
  alignas(1024) uint8_t weights[C::kStages][C::kBoxes][kBoxBytes];
  alignas(1024) uint8_t tokens[C::kStages][C::kBoxes][C::kTokenBytes];
  float out[C::kN][kTileRows + 4];  // the pad keeps the lanes of a store in different banks
  RingBarriers<C::kStages, C::kWarps, 1, 1> ring;
};

// Calls f(first token, tokens) for each of the block's tiles and each kN of its tokens.
template <class C, class Work, class F>
__device__ __forceinline__ void for_each_pass(Work& work, F&& f) {
  for (int tile = blockIdx.x; tile < work.tiles(); tile += gridDim.x) {
    const int tokens = work.begin(tile);
    for (int first = 0; first < tokens; first += C::kN) f(first, tokens);
  }
}

template <class C, class Work>
__device__ __forceinline__ void produce_weights(TileShared<C>& shared, Work& work) {
  RingState<C::kStages> at;
  for_each_pass<C>(work, [&](int, int) {
    for (int column = 0; column < work.depth(); column += C::kDepth, at.advance()) {
      shared.ring.wait_empty(at);
      if (!cute::elect_one_sync()) continue;
      shared.ring.expect(at.stage, C::kBoxes * kBoxBytes);
#pragma unroll
      for (int i = 0; i < C::kBoxes; ++i) {
        work.load(shared.weights[at.stage][i], column + i * kBoxColumns, shared.ring.full[at.stage]);
      }
    }
  });
}

template <class C, class Work>
__device__ __forceinline__ void produce_tokens(TileShared<C>& shared, Work& work) {
  const int lane = threadIdx.x % kWarpSize;
  RingState<C::kStages> at, behind;
  int under_way = 0;
  const auto declare = [&] {  // what the lanes have copied, to the tensor core
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0) cutlass::arch::ClusterBarrier::arrive(&shared.ring.full[behind.stage]);
    behind.advance();
  };
  // A lane has one vector of 8 columns of every fourth row, in each box.
  constexpr int kRows = C::kN / 4;
  const int vector = lane % 8, lane_row = lane / 8;
  for_each_pass<C>(work, [&](int first, int tokens) {
    const bf16* rows[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int token = first + 4 * i + lane_row;
      rows[i] = token < tokens ? work.row(token) : nullptr;
    }
    for (int column = 0; column < work.depth(); column += C::kDepth, at.advance()) {
      shared.ring.wait_empty(at);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        if (rows[i] == nullptr) break;  // a column of the product that nobody reads
        const int row = 4 * i + lane_row;
        uint8_t* const to = shared.tokens[at.stage][0] + row * 128 + (vector ^ row % 8) * 16;
#pragma unroll
        for (int box = 0; box < C::kBoxes; ++box) {
          const int from = column + box * kBoxColumns + vector * 8;
          const bool there = from < work.depth();  // columns past K must be zeros
          copy_async(to + box * C::kTokenBytes, rows[i] + (there ? from : 0), there);
        }
      }
      commit_copies();
      if (++under_way > C::kLag) {
        wait_for_copies<C::kLag>();
        declare();
        --under_way;
      }
    }
  });
  wait_for_copies<0>();
  for (; under_way > 0; --under_way) declare();
}

template <int kN>
struct WgmmaBF16;
template <>
struct WgmmaBF16<8> {
  using Atom = cute::SM90::GMMA::MMA_64x8x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;
};
template <>
struct WgmmaBF16<16> {
  using Atom = cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;
};
template <>
struct WgmmaBF16<32> {
  using Atom = cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K, cute::SM90::GMMA::Major::K>;
};

template <class C, class Work>
__device__ __forceinline__ void consume(TileShared<C>& shared, Work& work) {
  constexpr uint64_t kHigh = (uint64_t{1} << 30 | 1024 / 16) << 32;
  using Ring = decltype(shared.ring);
  const uint32_t full = shared_address(shared.ring.full), empty = shared.ring.empty_address();
  const uint32_t weights = uniform(matrix_descriptor(shared_address(shared.weights)));
  const uint32_t tokens = uniform(matrix_descriptor(shared_address(shared.tokens)));
  const int warp = uniform_warp(), lane = threadIdx.x % kWarpSize;
  const auto sync = [] { asm volatile("bar.sync 1, %0;" ::"n"(C::kWarps * kWarpSize) : "memory"); };
  RingState<C::kStages> at;
  for_each_pass<C>(work, [&](int first, int) {
    float sum[C::kN / 2];
    int last = 0;
    for (int column = 0; column < work.depth(); column += C::kDepth) {
      Ring::wait_full(full, at);
      detail::fence_registers(sum);
      cute::warpgroup_arrive();
#pragma unroll
      for (int k = 0; k < C::kDepth / 16; ++k) {
        const uint32_t box = at.stage * C::kBoxes + k / 4;
        detail::wgmma<typename WgmmaBF16<C::kN>::Atom>(kHigh | (weights + box * (kBoxBytes / 16) + k % 4 * 2),
                                                       kHigh | (tokens + box * (C::kTokenBytes / 16) + k % 4 * 2), sum,
                                                       column > 0 || k > 0,
                                                       std::make_integer_sequence<int, C::kN / 2>{});
      }
      cute::warpgroup_commit_batch();
      if (column > 0) {
        cute::warpgroup_wait<1>();
        Ring::release(empty, last);
      }
      last = at.stage;
      at.advance();
    }
    cute::warpgroup_wait<0>();
    detail::fence_registers(sum);
    Ring::release(empty, last);
    sync();  // the tile before has been stored
#pragma unroll
    for (int i = 0; i < C::kN / 2; ++i) {
      shared.out[i / 4 * 8 + lane % 4 * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + lane / 4] = sum[i];
    }
    sync();
    work.store(shared.out, first, static_cast<int>(threadIdx.x));
  });
}

// The roles of a block's warps. `ready` is called by those that read or write more than weights.
template <class C, class Work, class Ready>
__device__ __forceinline__ void run_tiles(TileShared<C>& shared, Work& work, Ready&& ready) {
  const int warp = uniform_warp();
  if (warp == C::kWarps) return produce_weights(shared, work);
  ready();
  warp < C::kWarps ? consume(shared, work) : produce_tokens(shared, work);
}

// Launches a kernel for so many tokens: f(configuration) names it. More than 32 of a tile take several passes.
template <class F>
void visit_tile_config(int64_t tokens, F&& f) {
  if (tokens <= 8) return f(TileConfig<8>{});
  if (tokens <= 16) return f(TileConfig<16>{});
  f(TileConfig<32>{});
}

template <class C>
Launch tile_launch(int64_t tiles, size_t smem) {
  return {.grid = dim3(std::min<int64_t>(tiles, C::kBlocks * sm_count())), .block = dim3(C::kThreads), .smem = smem};
}

}  // namespace dsv3
