// What the kernels of mla_attention_backward share: parameters, how the work is divided, and the workspace.
//
// Queries come in tiles of 64 and keys in tiles of 128, counted from the beginning of a sequence. Tile t of all packed
// tiles belongs to the last sequence s with offsets[s] / rows + s <= t: a numbering that needs no prefix sum, at the
// price of tiles without rows, one a sequence at most.
#pragma once

#include <cuda_bf16.h>

#include "../common/device_error.cuh"
#include "../common/vector.cuh"
#include "../hopper/bulk.cuh"
#include "../hopper/pipeline.cuh"
#include "mma.cuh"
#include "warpgroup.cuh"

namespace dsv3 {

constexpr int kQueryColumns = 192, kNopeColumns = 128, kRopeColumns = 64, kValueColumns = 128;
constexpr int kQueryTile = 64, kKeyTile = 128;
constexpr int kQuerySubs = kQueryColumns / kSubColumns, kValueSubColumns = kValueColumns / kSubColumns;
constexpr int kBackwardWarps = 2 * kWarpgroupWarps;
constexpr int kDqTile = kQueryTile * kQueryColumns, kRopeTile = kKeyTile * kRopeColumns;  // floats
constexpr int kDqPart = kDqTile / kBackwardWarps;                                         // of a warp
constexpr int kStatsTile = 2 * kQueryTile;                                                // floats

// Sums in fp32 that several blocks add to, in the order of the tensor core's fragments: a warp's part of a tile is
// contiguous, four floats a lane and step. All zeros at the start. dQ goes through a ring that stays in the L2 cache: tile
// t of all heads' packed tiles, of the same sequence beside each other, has place t % ring. The block that finishes a unit
// (one head of one sequence) writes its dQ and leaves its places empty for those that come round next.
struct BackwardWorkspace {
  float* stats;     // [heads, query tiles, 2, 64]: -lse / softmax_scale, -delta
  float* dq;        // [ring, 8 warps, 12, 32, 4]
  float* dk_rope;   // [key tiles, 8 warps, 8, 32, 4]
  int* rope_added;  // [key tiles], heads that have added
  int* arrived;     // [ring], at a unit's first place: blocks that are done
  int* finished;    // [ring], times that the place was emptied
  int* turns;       // [ring, 8 warps], tiles of keys that have added
  int* bad;         // [1], the offsets are wrong
};

struct BackwardParams {
  CUtensorMap q, k_nope, k_rope, v, dout;
  const int* cu_seqlens_q;  // [sequences + 1]
  const int* cu_seqlens_k;
  __nv_bfloat16* dq;       // [rows_q, heads, 192]
  __nv_bfloat16* dkv;      // [rows_k, heads, 256]
  __nv_bfloat16* dk_rope;  // [rows_k, 64]
  BackwardWorkspace work;
  int64_t rows_q, rows_k;
  int heads, sequences, query_tiles, ring, multiprocessors;
  int k_stride, v_stride;  // from a head to the next, in columns
  float scale, scale_log2;
  bool causal;
};

// The last sequence whose number `first_tile` of the tiles of `rows` rows is at most `tile`. By a whole warp.
__device__ __forceinline__ int find_sequence(const int* offsets, int sequences, int rows, int tile) {
  const int lane = threadIdx.x % kWarpSize;
  int begin = 0, count = sequences;
  while (count > 1) {
    const int step = ceil_div(count, kWarpSize), s = begin + lane * step;
    const bool before = lane * step < count && __ldg(offsets + s) / rows + s <= tile;
    const int skipped = max(__popc(__ballot_sync(0xffffffffu, before)) - 1, 0) * step;
    begin += skipped;
    count = min(step, count - skipped);
  }
  return begin;
}

// What a block does: one tile of keys of one head. As many heads as run at once go together, their tiles in turn: those
// with most queries to see them first, so that the short ones fill the end, and queries are read from the L2 cache. Where
// the order of sums is fixed the tiles go backwards: a tile's block adds to dQ before those of earlier tiles come there.
struct BackwardWork {
  int head, tile, tiles;            // tiles: of the sequence's keys
  int query, queries, key, keys;    // first row and number of rows of the sequence
  int packed_queries, packed_keys;  // the sequence's first packed tile of queries; this packed tile of keys
  int place, places, lap;           // of the unit in the ring, and how often the ring has gone round
  int first, end;                   // tiles of queries that see the keys
  bool real;

  __device__ __forceinline__ BackwardWork(const BackwardParams& p, int block, bool descending) {
    const int s = find_sequence(p.cu_seqlens_k, p.sequences, kKeyTile, block / p.heads);
    query = __ldg(p.cu_seqlens_q + s);
    queries = __ldg(p.cu_seqlens_q + s + 1) - query;
    key = __ldg(p.cu_seqlens_k + s);
    keys = __ldg(p.cu_seqlens_k + s + 1) - key;
    const int packed = key / kKeyTile + s, room = (key + keys) / kKeyTile + s + 1 - packed;
    tiles = max(1, ceil_div(keys, kKeyTile));
    const int group = max(1, p.multiprocessors / room), number = block - packed * p.heads;
    const int first_head = number / (group * room) * group, heads = min(group, p.heads - first_head);
    head = first_head + (number - first_head * room) % heads;
    tile = (number - first_head * room) / heads;
    real = number < room * p.heads && tile < tiles;  // rows of no sequence are behind the last one's tiles
    if (descending) tile = tiles - 1 - tile;
    packed_queries = query / kQueryTile + s;
    packed_keys = packed + tile;
    places = (query + queries) / kQueryTile + s + 1 - packed_queries;
    place = packed_queries * p.heads + head * places;
    lap = place / p.ring;
    place %= p.ring;
    end = ceil_div(queries, kQueryTile);
    // Query i sees the keys up to i + keys - queries.
    first = p.causal ? min(max(tile * kKeyTile - (keys - queries), 0) / kQueryTile, end) : 0;
    if (keys == 0) first = end;
    for (int* x : {&head, &tile, &tiles, &query, &queries, &key, &keys, &packed_queries, &packed_keys, &place, &places,
                   &lap, &first, &end}) {
      *x = static_cast<int>(uniform(*x));
    }
  }
  // Where the ring has a tile of queries, and how often it must have been emptied before.
  __device__ __forceinline__ int place_of(const BackwardParams& p, int query_tile) const {
    const int i = place + query_tile;
    return i < p.ring ? i : i - p.ring;
  }
  __device__ __forceinline__ int lap_of(const BackwardParams& p, int query_tile) const {
    return lap + (place + query_tile >= p.ring);
  }
  // Whether another tile will have its place.
  __device__ __forceinline__ bool comes_again(const BackwardParams& p, int query_tile) const {
    return static_cast<int64_t>(lap + 1) * p.ring + place + query_tile < static_cast<int64_t>(p.query_tiles) * p.heads;
  }
  // A warp's part of the sums of a tile of queries, and how many tiles of keys have added to it.
  __device__ __forceinline__ float* dq_part(const BackwardParams& p, int query_tile, int warp) const {
    return p.work.dq + (static_cast<int64_t>(place_of(p, query_tile)) * kBackwardWarps + warp) * kDqPart;
  }
  __device__ __forceinline__ int* turn(const BackwardParams& p, int query_tile, int warp) const {
    return p.work.turns + static_cast<int64_t>(place_of(p, query_tile)) * kBackwardWarps + warp;
  }
  // The last of the tiles of keys that a tile of queries sees: it is the first to add to dQ.
  __device__ __forceinline__ int last_seen(const BackwardParams& p, int query_tile) const {
    if (!p.causal) return tiles - 1;
    return min(tiles - 1, (query_tile * kQueryTile + kQueryTile - 1 + keys - queries) / kKeyTile);
  }
};

__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t* v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
}
__device__ __forceinline__ void add_float4(float* target, const float* x) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(target), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}
__device__ __forceinline__ void store_shared_float4(uint32_t address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}
__device__ __forceinline__ void bulk_add(float* target, uint32_t shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target), "r"(shared),
               "r"(bytes)
               : "memory");
  cute::tma_store_arrive();
}
__device__ __forceinline__ int count_up(int& shared) {
  int before;
  asm volatile("atom.acq_rel.cta.shared.add.s32 %0, [%1], 1;" : "=r"(before) : "r"(shared_pointer(&shared)) : "memory");
  return before;
}
__device__ __forceinline__ int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int* p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// NOTE: a block waits only for blocks with lower numbers, which the device starts first, or for those of its own group of
// heads, which run at once.
__device__ __forceinline__ void wait_until(const int* p, int value) {
  while (load_acquire(p) < value) __nanosleep(64);
}

}  // namespace dsv3
