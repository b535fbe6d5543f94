// The warps of mla_decode_kernel that load: two the keys, a half of a tile each, and one the queries. They walk over the
// same pieces as the warpgroups that multiply and wait for nothing but room.
#pragma once

#include "decode.cuh"

namespace dsv3 {

// Where the keys of a piece lie: a lane looks up one part of a tile, rows of one page.
struct TileRows {
  const DecodeParams& p;
  const int* table;
  int length, end, page_shift, key;  // key: the lane's first, within a tile; beyond it for lanes without a part

  __device__ __forceinline__ TileRows(const DecodeParams& params, const Piece& piece, int part, int part_rows)
      : p(params), table(params.block_table + piece.batch * params.table_stride) {
    length = piece.length;
    end = piece.end;
    page_shift = 31 - __clz(p.page);
    key = min(part * part_rows, kTileKeys);
  }
  __device__ __forceinline__ bool used(int tile) const {
    return key < kTileKeys && tile < end && tile * kTileKeys + key < length;
  }
  // The table's entry, asked for ahead of its use, where a key of the part is attended to.
  __device__ __forceinline__ int entry(int tile) const {
    if (!used(tile)) return 0;
    const int index = (tile * kTileKeys + key) >> page_shift;
    return index < p.table_width ? table[index] : -1;
  }
  // The row of the cache; rows past its end read as zeros. `bad`: the entry is no page of the pool.
  __device__ __forceinline__ int row(int tile, int entry, bool& bad) const {
    bad = used(tile) && (entry < 0 || entry >= p.pages);
    if (bad || !used(tile)) return p.pages * p.page;
    return entry * p.page + ((tile * kTileKeys + key) & (p.page - 1));
  }
};

template <class C>
__device__ __forceinline__ void produce_queries(const DecodeParams& p, DecodeShared& s, uint32_t rank) {
  Pieces pieces(p.schedule, p.seq_lens, blockIdx.x / C::kCluster);
  Piece piece;
  uint32_t phase = 0;
  while (pieces.next(piece)) {
    if (piece.begin >= piece.end) continue;
    const int row = piece.batch * p.rows + (piece.group * C::kCluster + static_cast<int>(rank)) * kBlockRows;
    wait_barrier(shared_address(&s.queries_empty), phase ^ 1);
    phase ^= 1;
    if (threadIdx.x % kWarpSize == 0) {
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.queries_full, sizeof(s.queries));
#pragma unroll
      for (int i = 0; i < kSubs; ++i) tma_load(s.queries[i], p.queries, s.queries_full, i * kSubColumns, row);
    }
    __syncwarp();
  }
}

// Sub-blocks of values that a block loads of a half.
template <class C>
constexpr int kSubsAtOnce = kValueSubs / 2 / C::kCluster;

// One thread: a half of a tile as soon as its place is free; where a cluster shares it, half of that, for both. NOTE: each
// request takes the thread some 150 clocks, so a tile of one page is asked for in few.
template <class C>
__device__ __forceinline__ void load_half(const DecodeParams& p, DecodeShared& s, int buffer, int half, uint32_t phase,
                                          const int (&rows)[4], int parts, uint32_t rank) {
  // Keys of one group of rows are read once; those of several are wanted again at about the same time.
  const auto hint =
      p.schedule.groups > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL : cute::TMA::CacheHintSm90::EVICT_FIRST;
  const int slot = buffer * 2 + half;
  uint64_t& full = s.full[slot];
  wait_barrier(shared_pointer(&s.empty[slot]), phase ^ 1);
  expect_bytes(shared_pointer(&full), half_subs(buffer, half) * kSubBytes);
  if (parts == 1) {
    const int sub = half * 4 + static_cast<int>(rank) * kSubsAtOnce<C>;
    uint8_t* const target = s.keys[buffer][sub];
    uint8_t* const rotated = s.keys[buffer][kSubs - 1];
    const auto policy = static_cast<uint64_t>(hint);
    if constexpr (C::kCluster == 1) {
      if (buffer != half) tma_load(rotated, p.keys, full, (kSubs - 1) * kSubColumns, rows[0], hint);
      cute::SM90_TMA_LOAD_3D::copy(&p.key_subs, &full, policy, target, 0, rows[0], sub);
    } else {
      if (buffer != half && rank == 0) {
        tma_load_multicast(rotated, p.keys, full, (kSubs - 1) * kSubColumns, rows[0], 3, hint);
      }
      cute::SM90_TMA_LOAD_MULTICAST_3D::copy(&p.key_subs, &full, 3, policy, target, 0, rows[0], sub);
    }
    return;
  }
#pragma unroll
  for (int i = 4; i >= 0; --i) {
    const int sub = i == 4 ? kSubs - 1 : half * 4 + i;
    if (i == 4 && buffer == half) continue;
    if (C::kCluster == 2 && sub % 2 != static_cast<int>(rank)) continue;
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      if (part > 0 && part >= parts) break;
      uint8_t* const target = s.keys[buffer][sub] + part * (kSubBytes / parts);
      if constexpr (C::kCluster == 1) {
        tma_load(target, p.keys, full, sub * kSubColumns, rows[part], hint);
      } else {
        tma_load_multicast(target, p.keys, full, sub * kSubColumns, rows[part], 3, hint);
      }
    }
  }
}

// Of the lane's part of a tile, this block's half, into the L2 cache.
__device__ __forceinline__ void prefetch_rows(const DecodeParams& p, const TileRows& lookup, int tile, int entry,
                                              int part_rows, uint32_t rank) {
  bool bad;
  const int row = lookup.row(tile, entry, bad);
  if (row >= p.pages * p.page) return;
  const uint32_t bytes = part_rows / 2 * (kKeyColumns * 2);
  const uint8_t* const from = p.cache + (static_cast<int64_t>(row) * (kKeyColumns * 2) + rank * bytes);
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

template <class C>
__device__ __forceinline__ void produce_keys(const DecodeParams& p, DecodeShared& s, uint32_t rank, int half) {
  const int lane = threadIdx.x % kWarpSize;
  Pieces pieces(p.schedule, p.seq_lens, blockIdx.x / C::kCluster);
  Piece piece;
  uint32_t phases = 0;  // bit b: of buffer b
  int parity = 1;       // of the pieces that have keys
  const int part_rows = min(p.page, kTileKeys), parts = kTileKeys / part_rows;
  while (pieces.next(piece)) {
    if (piece.begin >= piece.end) continue;
    parity ^= 1;
    const TileRows lookup(p, piece, lane, part_rows);
    int entry = lookup.entry(piece.begin), next = lookup.entry(piece.begin + 1);
    for (int tile = piece.begin; tile < piece.end; ++tile) {
      const int buffer = (tile - piece.begin) & 1, after = lookup.entry(tile + 2);
      bool bad;
      const int row = lookup.row(tile, entry, bad);
      if (bad && half == 0) {
        report(p.error, DeviceErrorCode::kPages, piece.batch, entry, (tile * kTileKeys + lookup.key) / p.page, p.pages);
      }
      if (half == 0) {
        wait_barrier(shared_address(&s.empty[buffer * 2]), (phases >> buffer & 1) ^ 1);
        const bool any = __any_sync(0xffffffffu, bad);
        if (lane == 0 && (any || tile == piece.begin)) s.bad[parity] = any;
      }
      int rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(0xffffffffu, row, i);
      if (lane == 0) load_half<C>(p, s, buffer, half, phases >> buffer & 1, rows, parts, rank);
      __syncwarp();
      phases ^= 1u << buffer;
      // The next two tiles, behind this warp's loads of these two: for a while it asks for nothing else. Not behind the first
      // two, which all blocks want at once.
      if (C::kCluster == 2 && half == 1 && buffer == 1 && tile > piece.begin + 1) {
        prefetch_rows(p, lookup, tile + 1, next, part_rows, rank);
        prefetch_rows(p, lookup, tile + 2, after, part_rows, rank);
      }
      entry = next;
      next = after;
    }
  }
  // A block must not end while another can arrive at its barriers.
  for (int buffer = 0; buffer < 2; ++buffer) {
    wait_barrier(shared_address(&s.empty[buffer * 2 + half]), (phases >> buffer & 1) ^ 1);
  }
}

}  // namespace dsv3
