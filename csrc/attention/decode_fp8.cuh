// The kernel of mla_decode for an FP8 cache: rows of 656 bytes, 512 e4m3, 4 fp32 scales, 64 bf16. The same pieces and the
// same formula as decode.cuh, but with keys on the M side of the tensor core, whose operand may come from registers:
//   scores^T [64 keys, rows] = K Q^T     out^T [512 columns, rows] = V^T P^T
// So codes lie in shared memory as they lie in the cache, are converted on their way to the tensor core, and few rows (16,
// 32) cost as little as they are. Queries and probabilities, the other side, are in shared memory.
//
// Two warpgroups keep half of the output's columns each, in registers, and make the scores and probabilities of every
// second tile, for both: those of a tile before they multiply the tile before with its values.
//
//   even:  S0 soft 0       P0 V0 left   S2 soft 2  P1 V1 left   P2 V2 left   S4 ...
//   odd:       S1  soft 1  P0 V0 right  P1 V1 right   S3 soft 3  P2 V2 right ...
//
// One warp loads. A tile of a page is one piece of memory, which arrives by a bulk copy, or half of it in each block of a
// cluster of two, to both. Rows 656 bytes apart are read by `ldmatrix` without conflicts: 656 is 16 more than a multiple
// of 128.
#pragma once

#include <cuda_fp16.h>

#include "decode.cuh"
#include "load.cuh"

namespace dsv3 {

constexpr int kFp8Row = 656, kFp8Scales = 512, kFp8Rotated = 528;  // bytes
constexpr int kFp8TileBytes = kTileKeys * kFp8Row;
constexpr int kScaleColumns = 128, kScaleBlocks = kLatent / kScaleColumns;  // columns that share a scale

template <int kRows_, int kCluster_>
struct Fp8Config {
  static constexpr int kRows = kRows_;                    // of a block: 16, 32 or 64
  static constexpr int kCluster = kCluster_;              // blocks
  static constexpr int kWarpgroups = 2;                   // that multiply
  static constexpr int kColumns = kLatent / kWarpgroups;  // of the output, of each
  static constexpr int kStages = kRows == 64 ? 3 : 4;
  static constexpr int kSlots = kWarpgroups + 1;  // tiles whose probabilities are kept
  static constexpr int kThreads = (kWarpgroups + 1) * kWarpgroup;
  // Of 504 a thread of each warpgroup.
  static constexpr int kConsumerRegisters = 240, kLoaderRegisters = 24;
};

constexpr int kPieceFlags = 8;  // more than there are pieces on their way

template <class C>
struct Fp8Shared {
  alignas(1024) uint8_t queries[kSubs][C::kRows * 128];            // fp16 for the codes, bf16 for the rotated columns
  alignas(1024) uint8_t probabilities[C::kSlots][C::kRows * 128];  // fp16, [row, key]
  alignas(128) uint8_t keys[C::kStages][kFp8TileBytes];
  __half scales[C::kSlots][kScaleBlocks][kTileKeys];  // of values, in units
  float factor[C::kRows];                             // from a product of scaled queries to a score, to base 2
  float base[C::kRows];                               // that is subtracted from scores
  float unit[kScaleBlocks];                           // of the output's columns: a power of two
  float row_correction[C::kSlots][C::kRows];          // of what was summed before this tile, where its base has changed
  float unit_correction[C::kSlots][kScaleBlocks];     // or its unit
  float of_warp[C::kWarpgroups * kWarpgroupWarps][C::kRows];  // maxima, and sums in the end
  float scale_of_warp[C::kWarpgroups * kWarpgroupWarps][kScaleBlocks];
  float inverse[C::kRows];  // of the sums
  uint64_t full[C::kStages], empty[C::kStages];
  int changed[C::kSlots];
  int bad[kPieceFlags];  // a piece has a page that the pool does not have
};

template <class C>
__device__ __forceinline__ void init_fp8_barriers(Fp8Shared<C>& s) {
  for (int i = 0; i < C::kStages; ++i) {
    cutlass::arch::ClusterBarrier::init(&s.full[i], 1);
    cutlass::arch::ClusterBarrier::init(&s.empty[i], C::kWarpgroups * kWarpgroupWarps * C::kCluster);
  }
  cutlass::arch::fence_barrier_init();
}

// `bytes` of the cache to the same place in every block of the cluster.
template <class C>
__device__ __forceinline__ void load_codes(void* to, const uint8_t* from, int bytes, uint64_t& full, uint64_t hint) {
  const uint32_t target = shared_pointer(to);
  const uint32_t barrier = shared_pointer(&full);
  if constexpr (C::kCluster == 1) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(target),
        "l"(from), "r"(bytes), "r"(barrier), "l"(hint)
        : "memory");
  } else {
    constexpr uint16_t kAll = (1 << C::kCluster) - 1;
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%0], "
        "[%1], %2, [%3], %4, %5;" ::"r"(target),
        "l"(from), "r"(bytes), "r"(barrier), "h"(kAll), "l"(hint)
        : "memory");
  }
}

// The warp that loads: a tile in parts, of a page each and in a cluster of half a tile at most; a lane looks one up.
template <class C>
__device__ __forceinline__ void produce_codes(const DecodeParams& p, Fp8Shared<C>& s, uint32_t rank) {
  const int lane = threadIdx.x % kWarpSize;
  const int part_rows = min(p.page, kTileKeys / C::kCluster), parts = kTileKeys / part_rows;
  const bool loads = lane / (parts / C::kCluster) == static_cast<int>(rank);
  const auto hint = static_cast<uint64_t>(p.schedule.groups > 1 ? cute::TMA::CacheHintSm90::EVICT_NORMAL
                                                                : cute::TMA::CacheHintSm90::EVICT_FIRST);
  Pieces pieces(p.schedule, p.seq_lens, blockIdx.x / C::kCluster);
  Piece piece;
  const uint32_t full = shared_address(s.full), empty = shared_address(s.empty);
  RingState<C::kStages> ring;
  static_assert(C::kStages + 2 <= kPieceFlags, "a piece's flag may be read after one that comes later is set");
  int number = 0;  // of the pieces that have keys
  while (pieces.next(piece)) {
    if (piece.begin >= piece.end) continue;
    const TileRows lookup(p, piece, lane, part_rows);
    int entry = lookup.entry(piece.begin);
    for (int tile = piece.begin; tile < piece.end; ++tile) {
      const int next = lookup.entry(tile + 1);
      bool bad;
      const int row = lookup.row(tile, entry, bad);
      if (bad && rank == 0) {
        report(p.error, DeviceErrorCode::kPages, piece.batch, entry, (tile * kTileKeys + lookup.key) / p.page, p.pages);
      }
      const bool there = lookup.used(tile) && !bad, any = __any_sync(0xffffffffu, bad);
      const int bytes = part_rows * kFp8Row, arriving = __popc(__ballot_sync(0xffffffffu, there)) * bytes;
      wait_barrier(empty + ring.stage * 8, ring.phase ^ 1);
      if (lane == 0) {
        if (any || tile == piece.begin) s.bad[number % kPieceFlags] = any;
        expect_bytes(full + ring.stage * 8, arriving);
      }
      __syncwarp();
      if (there && loads) {
        load_codes<C>(s.keys[ring.stage] + lookup.key * kFp8Row, p.cache + static_cast<int64_t>(row) * kFp8Row, bytes,
                      s.full[ring.stage], hint);
      }
      __syncwarp();
      ring.advance();
      entry = next;
    }
    ++number;
  }
}

}  // namespace dsv3
