// Products of many rows of weights, in bf16 or FP8, with few tokens, in tiles of 64 rows (the M side of a warpgroup's tensor
// core, tokens on N). A block, two of which share a multiprocessor, goes from tile to tile without a pause in its loads: a warp
// has TMA bring the weights, another gathers the tokens' rows, a warpgroup multiplies what has come (two, of FP8); the ring
// between them holds as much as memory needs under way. K is summed in one order (of FP8 even and odd blocks of 128 columns,
// then both), so a token gets the same bits alone and among others.
//
// What differs between kernels is a Work, of which every warp has one:
//   tiles()                         how many there are; a block takes every gridDim.x-th
//   begin(tile)                     turns to a tile, and returns how many tokens it has
//   list(n, make)                   for a whole warp: turns to the n-th of kTokenLists lists of the tile's tokens, and makes it
//   depth()                         its columns of K, a multiple of 8
//   load(to, column, full)          by one lane: TMA of 64 rows of 128 bytes
//   scales(row)                     of FP8: those of the blocks that the row of the tile is in
//   x(), row(token)                 the tokens of the tile, rows of K, and which of them is the tile's n-th
//   store(out, first, thread, threads)  what has become of the tile's tokens from `first` on
#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "../hopper/pipeline.cuh"
#include "../hopper/tensor_map.h"
#include "../hopper/wgmma.cuh"
#include "few_codes.cuh"

namespace dsv3 {

using bf16 = __nv_bfloat16;

constexpr int kTileRows = 64, kRowBytes = 128;
constexpr int kBoxBytes = kTileRows * kRowBytes;  // of weights
constexpr int kTokenColumns = kRowBytes / 2;      // of a box of tokens

constexpr int kHalfOfMemory = 113 * 1024;  // of a multiprocessor, less what the system takes
constexpr int kTokenLists = 3;             // of the warp that gathers, and in turn two of those that multiply

// Weights of 128 columns by 16 bits or 8; where tokens are many, of 64 by 16. kTaken: bytes of shared memory that a kernel
// needs beside.
template <int kN_, bool kFp8_, int kTaken>
struct TileConfig {
  static constexpr bool kFp8 = kFp8_;
  static constexpr int kN = kN_;  // tokens at a time: 8, 16 or 32
  static constexpr int kBoxColumns = kFp8 ? kRowBytes : kRowBytes / 2;
  static constexpr int kBoxes = kFp8 || kN == 32 ? 1 : 2;  // a stage
  static constexpr int kDepth = kBoxes * kBoxColumns;
  static constexpr int kTokenBoxes = kDepth / kTokenColumns;
  static constexpr int kTokenBytes = kN * kRowBytes;
  static constexpr int kGroups = kFp8 ? 2 : 1;  // warpgroups that multiply
  static constexpr int kWarps = kGroups * kWarpgroupWarps, kThreads = (kWarps + 2) * kWarpSize;
  static constexpr int kBlocks = 2;  // a multiprocessor
  static constexpr int kOutBytes = kN * (kTileRows + 4) * sizeof(float);
  // What is left of the memory, 64 to 108 KiB, and of that, alignment. NOTE: a multiple of the groups, so that a stage is
  // always the same group's: one that came to it later than another could not tell two uses from none.
  static constexpr int kStages = (kHalfOfMemory - 1024 - kTaken - kOutBytes) /
                                 (kBoxes * kBoxBytes + kTokenBoxes * kTokenBytes) / kGroups * kGroups;
  // Stages of tokens that are under way before the first is waited for. NOTE: the ring holds that one too, and one more for
  // each group, which gives a stage back when it has the next.
  static constexpr int kLag = kStages - 1 - kGroups < 2 ? kStages - 1 - kGroups : 2;
  static_assert(kLag >= 1);
};

template <class C>
struct TileShared {
  alignas(1024) uint8_t weights[C::kStages][C::kBoxes][kBoxBytes];
  alignas(1024) uint8_t tokens[C::kStages][C::kTokenBoxes][C::kTokenBytes];
  float out[C::kN][kTileRows + 4];  // the pad keeps the lanes of a store in different banks
  RingBarriers<C::kStages, kWarpgroupWarps, 1, 1> ring;
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
        work.load(shared.weights[at.stage][i], column + i * C::kBoxColumns, shared.ring.full[at.stage]);
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
  // A lane has one vector of 8 columns of every fourth row, in each box. Where in a box: row i's place is that of row i % 2,
  // and 1024 bytes further on for each two.
  constexpr int kRows = C::kN / 4;
  const int vector = lane % 8, lane_row = lane / 8;
  const uint32_t first_stage = shared_pointer(shared.tokens);
  const uint32_t even = first_stage + lane_row * kRowBytes + (vector ^ lane_row) * 16;
  const uint32_t odd = first_stage + (lane_row + 4) * kRowBytes + (vector ^ (lane_row + 4)) * 16;
  for_each_pass<C>(work, [&](int first, int tokens) {
    work.list(0, first == 0);
    // The lane's; columns of the product that have none nobody reads.
    const int rows = ceil_div(min(tokens - first, C::kN) - lane_row, 4);
    const char* from[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = i < rows ? work.row(first + 4 * i + lane_row) : 0;
      from[i] = reinterpret_cast<const char*>(work.x() + row * work.depth() + vector * 8);
    }
    for (int column = 0; column < work.depth(); column += C::kDepth, at.advance()) {
      shared.ring.wait_empty(at);
      const uint32_t stage = at.stage * C::kTokenBoxes * C::kTokenBytes;
      const auto copy_rows = [&](auto whole) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const uint32_t to = (i % 2 == 0 ? even : odd) + stage + i / 2 * 1024;
#pragma unroll
          for (int box = 0; box < C::kTokenBoxes; ++box) {
            // Columns past K must be zeros.
            const bool there = whole() || column + box * kTokenColumns + vector * 8 < work.depth();
            const char* const source = from[i] + (there ? box * kRowBytes : 0);
            if (i < rows) copy_async(to + box * C::kTokenBytes, source, there);
          }
          from[i] += C::kDepth * 2;
        }
      };
      column + C::kDepth <= work.depth() ? copy_rows(std::true_type{}) : copy_rows(std::false_type{});
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

template <int kStages>
__device__ __forceinline__ void advance(RingState<kStages>& at, int stages) {
  const int to = at.stage + stages;
  at.stage = to % kStages;
  at.phase ^= to / kStages & 1;
}

// What a warpgroup that multiplies knows of the ring.
template <class C>
struct TileStages {
  using Ring = RingBarriers<C::kStages, kWarpgroupWarps, 1, 1>;
  uint32_t full, empty;  // barriers
  uint32_t weights;      // a descriptor; of FP8 an address
  uint32_t tokens;       // a descriptor
  RingState<C::kStages> at;
  __device__ __forceinline__ explicit TileStages(TileShared<C>& shared)
      : full(shared_address(shared.ring.full)),
        empty(shared.ring.empty_address()),
        weights(shared_address(shared.weights)),
        tokens(uniform(matrix_descriptor(shared_address(shared.tokens)))) {
    if constexpr (!C::kFp8) weights = uniform(matrix_descriptor(weights));
  }
  // Of 16 columns, the k-th of the stage.
  __device__ __forceinline__ uint64_t token_descriptor(int k) const {
    return kDescriptorHigh | (tokens + (at.stage * C::kTokenBoxes + k / 4) * (C::kTokenBytes / 16) + k % 4 * 2);
  }
};

// A pass's sums, in bf16: the next stage's products are issued before this one's are done.
template <class C>
__device__ __forceinline__ void multiply_values(TileStages<C>& stages, int depth, float (&sum)[C::kN / 2]) {
  using cute::SM90::GMMA::Major;
  int last = 0;
  for (int column = 0; column < depth; column += C::kDepth) {
    TileStages<C>::Ring::wait_full(stages.full, stages.at);
    detail::fence_registers(sum);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < C::kDepth / 16; ++k) {
      const uint32_t box = stages.at.stage * C::kBoxes + k / 4;
      detail::wgmma<typename WgmmaBF16<C::kN>::template Shared<Major::K, Major::K>>(
          kDescriptorHigh | (stages.weights + box * (kBoxBytes / 16) + k % 4 * 2), stages.token_descriptor(k), sum,
          column > 0 || k > 0);
    }
    cute::warpgroup_commit_batch();
    if (column > 0) {
      cute::warpgroup_wait<1>();
      TileStages<C>::Ring::release(stages.empty, last);
    }
    last = stages.at.stage;
    stages.at.advance();
  }
  cute::warpgroup_wait<0>();
  detail::fence_registers(sum);
  TileStages<C>::Ring::release(stages.empty, last);
}

// The same in FP8, of the group's stages, every second one, a part at a time: the next one's codes are converted while this one
// multiplies.
template <class C>
__device__ __forceinline__ void multiply_codes(TileStages<C>& stages, int group, int depth, const float* row_scales,
                                               float (&sum)[C::kN / 2]) {
  constexpr int kParts = 4, kProducts = C::kDepth / 16 / kParts;
  const int lane = threadIdx.x % kWarpSize, row = lane / 4;
  const uint32_t mine = stages.weights + (threadIdx.x % kWarpgroup / kWarpSize * 16 + row) * kRowBytes + lane % 4 * 2;
  const int blocks = ceil_div(depth, C::kDepth), first = (stages.at.stage + group) % C::kGroups;
  BlockScales<C::kGroups> scales(row_scales, first, blocks);
  int last = -1;  // the stage whose products are under way
  float block_sum[C::kN / 2];
  uint16_t codes[kProducts][4];
  uint32_t words[2][kProducts][4];
  const auto load = [&](int part) {
    const uint32_t from = mine + stages.at.stage * kBoxBytes;
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      const uint32_t at = from + ((part * kProducts + k) ^ row) * 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[k][i] = load_shared_codes(at + i % 2 * 8 * kRowBytes + i / 2 * 8);
    }
  };
  const auto convert = [&](int part) {
#pragma unroll
    for (int i = 0; i < kProducts * 4; ++i) words[part % 2][i / 4][i % 4] = codes_to_bf16(codes[i / 4][i % 4]);
  };
  const auto keep = [&](int part) {  // in their registers until here
#pragma unroll
    for (int i = 0; i < kProducts * 4; ++i) cute::warpgroup_fence_operand(words[part % 2][i / 4][i % 4]);
  };
  const auto multiply = [&](int part) {
    keep(part);
    detail::fence_registers(block_sum);
    cute::warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < kProducts; ++k) {
      detail::wgmma<typename WgmmaBF16<C::kN>::template Registers<cute::SM90::GMMA::Major::K>>(
          words[part % 2][k], stages.token_descriptor(part * kProducts + k), block_sum, part > 0 || k > 0);
    }
    cute::warpgroup_commit_batch();
  };
  const auto add = [&] {
    const float scale = scales.next();
    cute::warpgroup_wait<0>();
    detail::fence_registers(block_sum);
    keep(kParts - 1);
    if (last >= 0) TileStages<C>::Ring::release(stages.empty, last);
#pragma unroll
    for (int i = 0; i < C::kN / 2; ++i) sum[i] = fmaf(scale, block_sum[i], sum[i]);
  };
#pragma unroll
  for (int i = 0; i < C::kN / 2; ++i) block_sum[i] = sum[i] = 0.f;
  const RingState<C::kStages> begin = stages.at;
  advance(stages.at, first);
  for (int block = first; block < blocks; block += C::kGroups) {
    TileStages<C>::Ring::wait_full(stages.full, stages.at);
    load(0);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      convert(part);
      if (part + 1 < kParts) load(part + 1);
      if (part == 0 && block > first) add();
      multiply(part);
      cute::warpgroup_wait<1>();
      keep(part + 1);  // the other one
    }
    last = stages.at.stage;
    advance(stages.at, C::kGroups);
  }
  add();
  stages.at = begin;
  advance(stages.at, blocks);
}

template <class C, class Work>
__device__ __forceinline__ void consume(TileShared<C>& shared, Work& work) {
  TileStages<C> stages(shared);
  const int group = uniform_warp() / kWarpgroupWarps, warp = uniform_warp() % kWarpgroupWarps;
  const int lane = threadIdx.x % kWarpSize;
  const auto sync = [] { named_sync(1, C::kWarps * kWarpSize); };
  int pass = 0;
  for_each_pass<C>(work, [&](int first, int) {
    float sum[C::kN / 2];
    if constexpr (C::kFp8) {
      multiply_codes<C>(stages, group, work.depth(), work.scales(warp * 16), sum);
    } else {
      multiply_values<C>(stages, work.depth(), sum);
    }
    // Made by the first warp for all, which read it behind a barrier; they may still read the one before.
    work.list(1 + pass++ % 2, threadIdx.x < kWarpSize);
#pragma unroll
    for (int turn = 0; turn < C::kGroups; ++turn) {
      sync();  // the tile before has been stored, or the group before has left its sums
      if (turn != group) continue;
#pragma unroll
      for (int i = 0; i < C::kN / 2; ++i) {
        float& out = shared.out[i / 4 * 8 + lane % 4 * 2 + i % 2][warp * 16 + i / 2 % 2 * 8 + lane / 4];
        out = turn == 0 ? sum[i] : out + sum[i];
      }
    }
    sync();
    work.store(shared.out, first, static_cast<int>(threadIdx.x), C::kWarps * kWarpSize);
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
template <int kTaken, bool kFp8, class F>
void visit_tile_config(int64_t tokens, F&& f) {
  if (tokens <= 8) return f(TileConfig<8, kFp8, kTaken>{});
  if (tokens <= 16) return f(TileConfig<16, kFp8, kTaken>{});
  f(TileConfig<32, kFp8, kTaken>{});
}
template <int kTaken, class F>
void visit_tile_config(int64_t tokens, bool fp8, F&& f) {
  fp8 ? visit_tile_config<kTaken, true>(tokens, f) : visit_tile_config<kTaken, false>(tokens, f);
}

// Rows of K weights, a box of 128 bytes of `box_rows` of them at a time.
inline CUtensorMap weight_map(const void* weight, bool fp8, int64_t rows, int64_t depth, int box_rows) {
  const int size = fp8 ? 1 : 2;
  return tensor_map(
      {weight, fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, depth, size * depth},
      box_rows, kRowBytes / size, true);
}

template <class C>
Launch tile_launch(int64_t tiles, size_t smem) {
  return {.grid = dim3(std::min<int64_t>(tiles, C::kBlocks * sm_count())), .block = dim3(C::kThreads), .smem = smem};
}

}  // namespace dsv3
