// The kernel for many rows: D[M, N] = A[M, K] B[N, K]^T in FP8 with a scale for every 1x128 of A, and for every 128x128
// or 1x128 of B. Tiles of 128 rows by up to 256 columns, or of 256 by 128; a producer warp fills a ring of K blocks by
// TMA, two warpgroups of half the rows each multiply and promote: the tensor core's sum of 128 products is scaled and
// added to fp32 registers. While one warpgroup promotes, the other keeps the tensor cores busy, if the way from the end
// of one product to the start of the next is short: see `multiply`. In a cluster of two, blocks of neighbouring rows
// share the columns: each loads half of B and multicasts it. Where a group's last rows are too few for both, blocks of
// neighbouring columns share the rows. Roofline: README.md.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90.hpp>
#include <type_traits>

#include "../common/launch.cuh"
#include "../hopper/pipeline.cuh"
#include "../hopper/wgmma.cuh"
#include "wide_tiles.cuh"

namespace dsv3 {

// A lane of the producer warp issues the TMA copies; lanes 1 to kScales bring the tile's block scales. What a tile is
// stands in shared memory when its first stage is full: finding it takes two divisions, for which consumers need not
// wait. A tile without K blocks is the end.
template <class C>
__device__ __forceinline__ void produce(const WideParams& p, WideShared<C>& shared) {
  const int lane = threadIdx.x % kWarpSize;
  const int rank = rank_in_cluster<C::kCluster>();
  constexpr int kPart = C::kTileColumns / C::kCluster;  // columns of B that this block loads, for the whole cluster
  constexpr int kBytes = (C::kTileRows + C::kTileColumns) * kBlockK;
  WideSchedule<C> schedule(p);
  RingState<C::kStages> at;
  Tile tile;
  int place = 0;
  for (; uniform(schedule.next(tile)); place = next_place<C>(place)) {
    const int scale_rows = ceil_div(p.columns, kBlockK);
    const int scale_row = min(tile.column / kBlockK + lane - 1, scale_rows - 1);
    const float* const b_sf = p.b_sf + (static_cast<int64_t>(tile.group) * scale_rows + scale_row) * p.depth_blocks;
    const int b_row = (C::kByRows ? tile.group * p.columns : 0) + tile.column;
    const int a_sf_bytes = p.a_sf.bytes(tile.row, C::kTileRows);
    const int b_sf_bytes = C::kRowScaleB ? p.b_row_sf.bytes(tile.column, C::kTileColumns) : 0;
    for (int i = 0; i < tile.depth_blocks; ++i, at.advance()) {
      shared.ring.wait_empty(at);
      uint64_t& full = shared.ring.full[at.stage];
      const int block = tile.depth + i, k = block * kBlockK;
      if (cute::elect_one_sync()) {
        if (i == 0) put(shared.tiles[place], tile);
        shared.ring.expect(at.stage, kBytes + a_sf_bytes + b_sf_bytes);
        constexpr uint16_t kAll = (1 << C::kCluster) - 1;
        uint8_t* const a = shared.a[at.stage];
        uint8_t* const b = shared.b[at.stage];
        if (C::kSameRows && tile.same_rows) {
          constexpr int kHalf = C::kCopyRows * kBlockK;
          tma_load_multicast(a + rank * kHalf, p.a, full, k, tile.row + rank * C::kCopyRows, kAll);
          for (int i = 0; i < C::kCluster; ++i) tma_load(b + i * kPart * kBlockK, p.b, full, k, b_row + i * kPart);
        } else {
#pragma unroll
          for (int i = 0; i < C::kTileRows; i += C::kCopyRows) {
            tma_load(a + i * kBlockK, p.a, full, k, tile.row + i);
          }
          if constexpr (C::kCluster > 1) {
            tma_load_multicast(b + rank * kPart * kBlockK, p.b, full, k, b_row + rank * kPart, kAll);
          } else {
            tma_load(b, p.b, full, k, b_row);
          }
        }
        load_scales(shared.a_sf[at.stage], p.a_sf.at(tile.row, block), a_sf_bytes, full);
        if constexpr (C::kRowScaleB) {
          load_scales(shared.b_sf[at.stage], p.b_row_sf.at(tile.column, block), b_sf_bytes, full);
        }
      }
      if (lane > 0 && lane <= C::kScales) {
        copy_float_async(shared_pointer(&shared.b_sf[at.stage][lane - 1]), b_sf + block);
        arrive_when_copied(full);
      }
    }
  }
  shared.ring.wait_empty(at);
  if (lane == 0) {
    put(shared.tiles[place].depth_blocks, 0);  // NOTE: the whole tile would make the loop above spill
    shared.ring.expect(at.stage, 0);
  } else if (lane <= C::kScales) {
    arrive_when_copied(shared.ring.full[at.stage]);
  }
  at.advance();
  // A block must not end while another can arrive at its barriers.
  for (int i = 0; i < C::kStages; ++i, at.advance()) shared.ring.wait_empty(at);
}

// The scales of a K block that a thread needs: of its two rows, and of its columns or of the blocks that they lie in.
template <class C>
struct StageScales {
  float rows[C::kHalves][2];
  float blocks[C::kScales > 0 ? C::kScales : 1];
  float2 columns[C::kRowScaleB ? C::kN / 8 : 1];

  __device__ __forceinline__ void load(uint32_t a_sf, uint32_t b_sf) {
    load_rows(a_sf);
#pragma unroll
    for (int i = 0; i < C::kScales; ++i) blocks[i] = load_shared_float(b_sf + i * 4);
    if constexpr (C::kRowScaleB) {
#pragma unroll
      for (int j = 0; j < C::kN / 8; ++j) load_columns(b_sf, j);
    }
  }
  __device__ __forceinline__ void load_rows(uint32_t a_sf) {
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
      rows[half][0] = load_shared_float(a_sf + half * 256);
      rows[half][1] = load_shared_float(a_sf + half * 256 + 32);
    }
  }
  __device__ __forceinline__ void load_columns(uint32_t b_sf, int j) { columns[j] = load_shared_float2(b_sf + j * 32); }
};

// Adds a product's columns, scaled, to the sums. Accumulator i of a thread lies in row (i / 2 % 2) * 8 + lane / 4 of
// its warp, column i / 4 * 8 + lane % 4 * 2 + i % 2. Calls used(j) when columns[j] of the scales are needed no more.
template <class C, int kEdge, class F>
__device__ __forceinline__ void promote(float (&sum)[C::kTileColumns / 2], const float (&product)[C::kN / 2],
                                        const StageScales<C>& scales, int half, int part, F&& used) {
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
    if (i % 4 == 3) used(i / 4);
  }
}

// The warp's 16 rows of a chunk of 128 bytes of columns to shared memory, under the 128-byte swizzle: `groups` of 8
// columns in bf16, or 32 columns in fp32.
__device__ __forceinline__ void stage_chunk(uint8_t* buffer, const float* sum, int groups) {
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
__device__ __forceinline__ void stage_chunk(uint8_t* buffer, const float* sum) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int unit = 2 * j + lane % 4 / 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      auto& target = *reinterpret_cast<float2*>(buffer + row * 128 + (unit ^ row % 8) * 16 + lane % 2 * 8);
      target = make_float2(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
    }
  }
}

// A chunk of 128 bytes of columns in fp32, or as many as the matrix has, written by the warp.
__device__ __forceinline__ void write_chunk(const WideParams& p, const uint8_t* buffer, int64_t row, int rows,
                                            int column, bool adds) {
  constexpr int kUnit = 4;
  const int lane = threadIdx.x % kWarpSize, unit = lane % 8;
  if (column + unit * kUnit >= p.columns) return;
  for (int r = lane / 8; r < rows; r += 4) {
    float4 value = *reinterpret_cast<const float4*>(buffer + r * 128 + (unit ^ r % 8) * 16);
    auto* const out =
        reinterpret_cast<float4*>(static_cast<float*>(p.out) + (row + r) * p.columns + column + unit * kUnit);
    if (adds) {
      const float4 old = __ldcg(out);  // maybe another block's, of this kernel
      value = make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
    }
    *out = value;
  }
}

// The warp's rows of a tile in bf16, 128 bytes of columns at a time, by the warp itself: with TMA it would wait until
// the copies of two chunks have been read, before it could stage the next two.
template <class C>
__device__ __forceinline__ void store_tile(const WideParams& p, const Tile& tile,
                                           uint8_t (&buffers)[C::kBuffers][kStoreBytes],
                                           const float (&sum)[C::kTileColumns / 2], int warp_row, __nv_bfloat16) {
  static_assert(C::kLayout != Layout::kDepth && !C::kSplits && C::kBuffers > 1);
  constexpr int kChunk = 64, kChunks = ceil_div(C::kTileColumns, kChunk), kUnit = 8;
  const int row = tile.row + warp_row, rows = tile.row_end - row;
  const int column = tile.column, columns = min(C::kTileColumns, p.columns - column);
  if (rows <= 0) return;
  const int lane = threadIdx.x % kWarpSize, unit = lane % 8, first = lane / 8;
  auto* const out =
      static_cast<__nv_bfloat16*>(p.out) + static_cast<int64_t>(row + first) * p.columns + column + unit * kUnit;
  __syncwarp();
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    if (c * kChunk >= columns) break;
    uint8_t* const buffer = buffers[c % C::kBuffers];  // in turn: the last one is read while this one is written
    stage_chunk(buffer, &sum[c * kChunk / 2], min(8, C::kTileColumns / 8 - c * 8));
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 16; r += 4) {
      if (first + r >= rows || c * kChunk + unit * kUnit >= columns) continue;
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(r) * p.columns + c * kChunk) =
          *reinterpret_cast<const uint4*>(buffer + (first + r) * 128 + (unit ^ (first + r) % 8) * 16);
    }
  }
}

// In fp32: whole boxes by TMA (or by its reduction, which adds to what is there: one addition an element and part, in
// turns, so the order of sums stays fixed), kBuffers chunks at a time; rows at the end of a group, and chunks of which
// one is not whole, by the warp itself.
template <class C>
__device__ __forceinline__ void store_tile(const WideParams& p, const Tile& tile,
                                           uint8_t (&buffers)[C::kBuffers][kStoreBytes],
                                           const float (&sum)[C::kTileColumns / 2], int warp_row, float) {
  constexpr int kChunk = 32, kChunks = C::kTileColumns / kChunk;
  static_assert(C::kTileColumns % (kChunk * C::kBuffers) == 0);
  const int row = tile.row + warp_row, rows = min(16, tile.row_end - row);
  if (rows <= 0) return;
  const int column = uniform(tile.column);
  const int64_t out_row = (C::kLayout == Layout::kDepth ? static_cast<int64_t>(tile.group) * p.rows : 0) + row;
  const bool adds = p.accumulate || tile.part > 0;
#pragma unroll
  for (int c = 0; c < kChunks; c += C::kBuffers) {
    const int begin = column + c * kChunk;
    if (begin >= p.columns) break;
    if (cute::elect_one_sync()) cute::tma_store_wait<0>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < C::kBuffers; ++i) stage_chunk(buffers[i], &sum[(c + i) * kChunk / 2]);
    if (rows == 16 && begin + C::kBuffers * kChunk <= p.columns) {
      fence_shared_writes();
      __syncwarp();
      if (cute::elect_one_sync()) {
        const int first_row = static_cast<int>(out_row);
        if (adds) {
#pragma unroll
          for (int i = 0; i < C::kBuffers; ++i) {
            cute::SM90_TMA_REDUCE_ADD_2D::copy(&p.out_map, buffers[i], begin + i * kChunk, first_row);
          }
        } else {
#pragma unroll
          for (int i = 0; i < C::kBuffers; ++i) {
            cute::SM90_TMA_STORE_2D::copy(&p.out_map, buffers[i], begin + i * kChunk, first_row);
          }
        }
        cute::tma_store_arrive();
      }
    } else {
      __syncwarp();
      for (int i = 0; i < C::kBuffers; ++i) write_chunk(p, buffers[i], out_row, rows, begin + i * kChunk, adds);
    }
    __syncwarp();
  }
}

// The parts of a tile are added in the order of K, a warp's rows at a time: part i waits until i - 1 has been added.
// Each part has a block of its own, and waits for one of a lower number, which the device starts first: so there is
// always one that does not wait, however few run at once.
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

template <class C>
using Sums = float[C::kHalves][C::kTileColumns / 2];

// The tile's sums over its K blocks, of which there is at least one. From the end of a product to the start of the next
// lies what the tensor cores can wait for, so little is done there: addresses are kept, and the scales are read before
// the product starts, since a load after it queues behind its operands; two halves, whose scales are many, read those
// of the next stage while the last product of this one is promoted. In a row of four K blocks the compiler also asks
// during that time whether the next stage is full. (By hand: a loop that it unrolls itself zeroes the sums twice.)
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
  const auto a_sf_at = [&](int stage) { return a_sf + stage * static_cast<uint32_t>(sizeof(shared.a_sf[0])); };
  const auto b_sf_at = [&](int stage) { return b_sf + stage * static_cast<uint32_t>(sizeof(shared.b_sf[0])); };

  StageScales<C> scales;
  const auto begin = [&] {
    Ring::wait_full(full, at);
    scales.load(a_sf_at(at.stage), b_sf_at(at.stage));
  };
  // One K block, whose scales are there; `ahead`: loads those of the next.
  const auto step = [&](auto ahead) {
    constexpr bool kAhead = decltype(ahead)::value;
    const uint32_t a = a_first + at.stage * (sizeof(shared.a[0]) / 16);
    const uint32_t b = b_first + at.stage * (sizeof(shared.b[0]) / 16);
    RingState<C::kStages> following = at;
    following.advance();
    StageScales<C> next;
    float product[C::kN / 2];
    start_product<C::kN>(a, b, product);
#pragma unroll
    for (int n = 0; n < kProducts; ++n) {
      const bool last = n == kProducts - 1;
      if (kAhead && last) Ring::wait_full(full, following);
      finish_product<C::kN>(product);
      if (last) Ring::release(empty, at.stage);
      if (kAhead && last) next.load_rows(a_sf_at(following.stage));
      promote<C, kEdge>(sums[n / C::kParts], product, scales, n / C::kParts, n % C::kParts, [&](int j) {
        if (kAhead && last) next.load_columns(b_sf_at(following.stage), j);
      });
      const int half = (n + 1) / C::kParts, part = (n + 1) % C::kParts;
      if (!last) {
        start_product<C::kN>(a + half * (64 * kBlockK / 16), b + part * (C::kN * kBlockK / 16), product);
      }
    }
    if constexpr (kAhead) scales = next;
    at = following;
  };

  if constexpr (C::kHalves == 1) {
    const auto whole = [&] {
      begin();
      step(std::false_type{});
    };
    int i = 0;
    for (; i + 4 <= blocks; i += 4) {
      whole();
      whole();
      whole();
      whole();
    }
    for (; i < blocks; ++i) whole();
  } else {
    begin();
#pragma unroll 1  // more would spill registers
    for (int i = 1; i < blocks; ++i) step(std::true_type{});
    step(std::false_type{});
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
  using Ring = decltype(shared.ring);
  const uint32_t warp = uniform_warp() - kWarpgroupWarps;
  const int lane = threadIdx.x % kWarpSize;
  // The warp's rows of the first half; those of the second are 64 further down.
  const int warp_row = warp / kWarpgroupWarps * (C::kHalves * 64) + warp % kWarpgroupWarps * 16;
  const uint32_t full = shared_address(shared.ring.full);
  RingState<C::kStages> at;
  if (!C::kRowScaleB && p.late_clocks > 0 && warp >= kWarpgroupWarps) {
    Ring::wait_full(full, at);
    for (const int64_t start = clock64(); clock64() - start < p.late_clocks;) {
    }
  }
  for (int place = 0;; place = next_place<C>(place)) {
    Ring::wait_full(full, at);
    const Tile& tile = shared.tiles[place];  // read again when it is written out: registers are few until then
    const int blocks = uniform(tile.depth_blocks);
    if (blocks == 0) break;
    Sums<C> sums = {};
    with_edge<C>(kBlockK - uniform(tile.column) % kBlockK, [&](auto edge) {
      multiply<C, edge>(shared, at, blocks, warp_row + lane / 4 + (tile.row & RowScales::kEarly), warp, sums);
    });
    if constexpr (C::kSplits) wait_turn<C>(p, tile, warp);
#pragma unroll
    for (int half = 0; half < C::kHalves; ++half) {
      store_tile<C>(p, tile, shared.store[warp], sums[half], warp_row + half * 64, typename C::Out{});
    }
    if constexpr (C::kSplits) end_turn<C>(p, tile, warp);
  }
  Ring::release(shared.ring.empty_address(), at.stage);
  if constexpr (std::is_same_v<typename C::Out, float>) cute::tma_store_wait<0>();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) wide_kernel(const __grid_constant__ WideParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<WideShared<C>*>(raw);
  if (threadIdx.x == 0) shared.ring.init();
  sync_cluster<C::kCluster>();
  wait_for_inputs();
  release_dependents();
  const uint32_t warp = uniform_warp();  // NOTE: else the compiler keeps little in uniform registers
  if (warp < kWarpgroupWarps) {
    cutlass::arch::warpgroup_reg_dealloc<C::kProducerRegisters>();
    if (warp == 0) produce<C>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    consume<C>(p, shared);
  }
}

}  // namespace dsv3
