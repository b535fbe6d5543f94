// What the roles of mla_attention_kernel share: parameters, shared memory, which block makes which part of the output, and
// the warp that loads.
#pragma once

#include <cuda_bf16.h>

#include "../common/device_error.cuh"
#include "../hopper/pipeline.cuh"
#include "mma.cuh"
#include "warpgroup.cuh"

namespace dsv3 {

constexpr int kNope = 128, kRope = 64, kValue = 128;
constexpr int kKeySubs = (kNope + kRope) / kSubColumns, kValueColumnSubs = kValue / kSubColumns;
constexpr int kKeys = 128;                 // of a tile
constexpr int kRows = 64, kConsumers = 2;  // queries of a warpgroup, warpgroups that multiply
constexpr int kTallSub = kKeys * 128;      // bytes of 64 columns of a tile of keys or values
constexpr int kStages = 2;

struct AttentionParams {
  CUtensorMap queries, keys, rope, values;  // [Tq, Hq * 192]; [Tk, ...] with heads at head_stride columns; [Tk, 64]
  const int *cu_seqlens_q, *cu_seqlens_k;   // [sequences + 1]
  __nv_bfloat16* out;                       // [Tq, Hq, 128]
  float* lse;                               // [Hq, Tq]
  DeviceError* error;
  int64_t query_rows, key_rows;
  int sequences, heads, heads_at_once;
  int key_head_stride, value_head_stride;
  float scale_log2;
  bool causal;
};

// 128 queries of a sequence and head, and the keys that they see. rows = 0: there are no more.
struct QueryTile {
  int head, row, rows;  // the first of its rows in q, how many are the sequence's
  int key, keys;        // the first of the sequence's keys, how many there are
  int diagonal;         // row i sees the keys below min(keys, diagonal + i)
  int tiles, whole;     // tiles of keys that some row sees; those that every row sees all of

  __device__ __forceinline__ int visible(int i) const { return min(keys, diagonal + i); }
};

struct AttentionShared {
  alignas(1024) uint8_t queries[kConsumers][kKeySubs][kSubBytes];
  alignas(1024) uint8_t keys[kStages][kKeySubs][kTallSub];
  alignas(1024) uint8_t values[kStages][kValueColumnSubs][kTallSub];
  QueryTile tile[kConsumers];
  uint64_t queries_full[kConsumers], queries_empty[kConsumers];
  uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
};

__device__ __forceinline__ void init_attention_barriers(AttentionShared& s) {
  using cutlass::arch::ClusterBarrier;
  for (int i = 0; i < kConsumers; ++i) {
    ClusterBarrier::init(&s.queries_full[i], 1);
    ClusterBarrier::init(&s.queries_empty[i], kWarpgroupWarps);
  }
  for (int i = 0; i < kStages; ++i) {
    ClusterBarrier::init(&s.keys_full[i], 1);
    ClusterBarrier::init(&s.values_full[i], 1);
    ClusterBarrier::init(&s.keys_empty[i], kConsumers * kWarpgroupWarps);
    ClusterBarrier::init(&s.values_empty[i], kConsumers * kWarpgroupWarps);
  }
  cutlass::arch::fence_barrier_init();
}

// A block's tiles, walked by a whole warp. The order: some heads at a time, whose keys and values stay in the L2 cache;
// of these a tile of queries for every head, those with the most keys of a sequence first. Every second group of heads is
// walked backwards, so that where groups meet tiles are of one length; the last one forwards, so that the end are short
// ones. The blocks take turns in both directions. So all have about the same to do: within 0.4% for one causal sequence
// of at least 4096 tokens and 8 heads.
class QueryTiles {
 public:
  __device__ __forceinline__ explicit QueryTiles(const AttentionParams& params)
      : p(params), lane_(threadIdx.x % kWarpSize) {
    for (int base = 0; base < p.sequences; base += kWarpSize) {
      const Rows rows = rows_of(base);
      const auto bad = [&](int first, int second, int64_t limit) {
        return second < first || second > limit || (base + lane_ == 0 && first != 0);
      };
      const bool bad_queries = bad(rows.begin, rows.end, p.query_rows);
      const int i = min(base + lane_, p.sequences - 1), first = p.cu_seqlens_k[i], second = p.cu_seqlens_k[i + 1];
      const bool bad_keys = bad(first, second, p.key_rows);
      if (const uint32_t ballot = __ballot_sync(0xffffffffu, bad_queries || bad_keys)) {
        if (blockIdx.x == 0 && lane_ == __ffs(ballot) - 1) {
          report(p.error, DeviceErrorCode::kOffsets, i, bad_queries ? rows.begin : first,
                 bad_queries ? rows.end : second, bad_queries ? p.query_rows : p.key_rows);
        }
        total_ = 0;
        return;
      }
      total_ += static_cast<int>(__reduce_add_sync(0xffffffffu, rows.tiles()));
    }
  }

  __device__ __forceinline__ bool next(QueryTile& tile) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int slot = turn_ * blocks + (turn_ % 2 ? blocks - 1 - block : block);
    if (slot >= total_ * p.heads) return false;
    ++turn_;
    const int group = slot / (total_ * p.heads_at_once), groups = ceil_div(p.heads, p.heads_at_once);
    const int first_head = group * p.heads_at_once, heads = min(p.heads_at_once, p.heads - first_head);
    const int rest = slot - group * p.heads_at_once * total_, index = rest / heads;
    tile.head = first_head + rest % heads;
    find((groups - 1 - group) % 2 ? total_ - 1 - index : index, tile);
    return true;
  }

 private:
  struct Rows {
    int begin, end;
    __device__ __forceinline__ int tiles() const { return ceil_div(end - begin, kConsumers * kRows); }
  };
  // Of this lane's sequence among 32; no rows behind the last one.
  __device__ __forceinline__ Rows rows_of(int base) const {
    const int i = base + lane_, last = p.sequences;
    return {p.cu_seqlens_q[min(i, last)], p.cu_seqlens_q[min(i + 1, last)]};
  }

  // The sequence of a tile, from where the last one was found unless that is behind it.
  __device__ __forceinline__ void find(int index, QueryTile& tile) {
    if (index < tiles_before_) base_ = tiles_before_ = 0;
    Rows rows;
    int sum;
    for (;; base_ += kWarpSize) {
      rows = rows_of(base_);
      sum = rows.tiles();
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane_ >= offset) sum += below;
      }
      const int all = __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
      if (index < tiles_before_ + all) break;
      tiles_before_ += all;
    }
    const int owner = __ffs(__ballot_sync(0xffffffffu, index < tiles_before_ + sum)) - 1;
    const int behind = __shfl_sync(0xffffffffu, tiles_before_ + sum, owner) - 1 - index;  // tiles of its sequence
    const int begin = __shfl_sync(0xffffffffu, rows.begin, owner), end = __shfl_sync(0xffffffffu, rows.end, owner);
    const int first = behind * kConsumers * kRows;
    tile.row = begin + first;
    tile.rows = min(end - tile.row, kConsumers * kRows);
    tile.key = p.cu_seqlens_k[base_ + owner];
    tile.keys = p.cu_seqlens_k[base_ + owner + 1] - tile.key;
    tile.diagonal = p.causal ? tile.keys - (end - begin) + first + 1 : tile.keys;
    tile.tiles = ceil_div(max(tile.visible(kConsumers * kRows - 1), 0), kKeys);
    tile.whole = max(tile.visible(0), 0) / kKeys;
  }

  const AttentionParams& p;
  int lane_, turn_ = 0, total_ = 0;
  int base_ = 0, tiles_before_ = 0;  // 32 sequences, and the tiles of those before them
};

// The warp that loads: keys and values of a tile in the order in which they are used, queries as soon as those before
// them are no longer needed.
class Loader {
 public:
  __device__ __forceinline__ Loader(const AttentionParams& params, AttentionShared& shared) : p(params), s(shared) {}

  __device__ __forceinline__ void run() {
    QueryTiles tiles(p);
    QueryTile tile;
    while (tiles.next(tile)) {
      if (tile.tiles > 0) load_keys(tile, tile.tiles - 1);
      give_queries(tile);
      for (int i = tile.tiles - 2; i >= 0; --i) {
        load_keys(tile, i);
        load_values(tile, i + 1);
      }
      if (tile.tiles > 0) load_values(tile, 0);
    }
    tile.rows = tile.tiles = 0;
    give_queries(tile);
  }

 private:
  __device__ __forceinline__ static uint32_t address(const uint64_t& barrier) { return shared_pointer(&barrier); }
  __device__ __forceinline__ void load_keys(const QueryTile& tile, int i) {
    wait_barrier(address(s.keys_empty[keys_at_.stage]), keys_at_.phase ^ 1);
    if (cute::elect_one_sync()) {
      uint64_t& full = s.keys_full[keys_at_.stage];
      expect_bytes(address(full), sizeof(s.keys[0]));
      const int column = tile.head * p.key_head_stride, row = tile.key + i * kKeys;
      tma_load(s.keys[keys_at_.stage][0], p.keys, full, column, row);
      tma_load(s.keys[keys_at_.stage][1], p.keys, full, column + kSubColumns, row);
      tma_load(s.keys[keys_at_.stage][2], p.rope, full, 0, row);
    }
    __syncwarp();
    keys_at_.advance();
  }
  __device__ __forceinline__ void load_values(const QueryTile& tile, int i) {
    wait_barrier(address(s.values_empty[values_at_.stage]), values_at_.phase ^ 1);
    if (cute::elect_one_sync()) {
      uint64_t& full = s.values_full[values_at_.stage];
      expect_bytes(address(full), sizeof(s.values[0]));
      const int column = tile.head * p.value_head_stride, row = tile.key + i * kKeys;
      tma_load(s.values[values_at_.stage][0], p.values, full, column, row);
      tma_load(s.values[values_at_.stage][1], p.values, full, column + kSubColumns, row);
    }
    __syncwarp();
    values_at_.advance();
  }
  // To each warpgroup: its rows, and what they are.
  __device__ __forceinline__ void give_queries(const QueryTile& tile) {
    for (int w = 0; w < kConsumers; ++w) {
      wait_barrier(address(s.queries_empty[w]), queries_phase_ ^ 1);
      if (cute::elect_one_sync()) {
        s.tile[w] = tile;
        uint64_t& full = s.queries_full[w];
        expect_bytes(address(full), tile.tiles > 0 ? sizeof(s.queries[0]) : 0);
        for (int i = 0; i < kKeySubs && tile.tiles > 0; ++i) {
          tma_load(s.queries[w][i], p.queries, full, tile.head * (kNope + kRope) + i * kSubColumns,
                   tile.row + w * kRows, cute::TMA::CacheHintSm90::EVICT_FIRST);
        }
      }
      __syncwarp();
    }
    queries_phase_ ^= 1;
  }

  const AttentionParams& p;
  AttentionShared& s;
  RingState<kStages> keys_at_, values_at_;
  uint32_t queries_phase_ = 0;
};

}  // namespace dsv3
