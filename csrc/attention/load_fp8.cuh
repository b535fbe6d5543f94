// The warpgroup of mla_decode_kernel that loads an FP8 cache: rows of 656 bytes, 512 e4m3, 4 fp32 scales, 64 bf16. The
// tensor cores read bf16 all the same: four warps load codes to registers, multiply by their scales and store keys as TMA
// would have, a half of the columns after the other, while the codes of the next half are on their way. In a cluster each
// block converts half of a tile's keys and stores them in both. The rotated columns, which are bf16, come by TMA.
//
// Of every group of 8 rows warp w has rows 2w and 2w + 1, so that a lane's place under the swizzle is the same in every
// group. A load takes 256 codes of both: lane l the 16 from 64 (l / 8) + 16 (l % 4) on, of row 2w + l / 4 % 2, which
// makes eight neighbouring lanes store to different banks.
#pragma once

#include "../common/e4m3.cuh"
#include "load.cuh"

namespace dsv3 {

constexpr int kFp8Row = 656, kFp8Scales = 512, kFp8Rotated = 528;  // bytes
constexpr int kGroupRows = 8, kTileGroups = kTileKeys / kGroupRows;
constexpr int kHalfSubs = kValueSubs / 2;

// A tile that has been looked up.
struct Fp8Tile {
  int row;      // of the cache, where the lane's group of rows begins
  int queries;  // their first row, if the tile is the first of its piece, otherwise -1
  bool exists, bad;
};

// The tiles of a worker, of one piece after the other. Lane i < 8 looks up a group of rows, the ones of this block first.
template <class C>
class Fp8Tiles {
 public:
  __device__ __forceinline__ Fp8Tiles(const DecodeParams& params, uint32_t rank, bool leads)
      : p(params), pieces_(params.schedule, params.seq_lens, blockIdx.x / C::kCluster), rank_(rank), leads_(leads) {
    const int lane = threadIdx.x % kWarpSize, first = static_cast<int>(rank) * C::kGroups;
    group_ = lane < kTileGroups ? (first + lane) % kTileGroups : kTileGroups;
    find_tile();
  }
  // The next one, whose entry of the table was asked for by the call before. One warp reports, and asks the L2 cache for
  // the rows: they are loaded a tile later.
  __device__ __forceinline__ Fp8Tile next() {
    if (tile_ >= piece_.end) return {0, -1, false, false};
    const TileRows lookup(p, piece_, group_, kGroupRows);
    bool bad;
    const int row = lookup.row(tile_, entry_, bad), key = tile_ * kTileKeys + lookup.key;
    if (leads_ && bad) {
      report(p.error, DeviceErrorCode::kPages, piece_.batch, entry_, key / p.page, p.pages);
    } else if (leads_ && lookup.used(tile_) && threadIdx.x % kWarpSize < C::kGroups) {
      prefetch(row, min(kGroupRows, piece_.length - key));
    }
    const int group = piece_.group * C::kCluster + static_cast<int>(rank_);
    const int queries = tile_ == piece_.begin ? piece_.batch * p.rows + group * kBlockRows : -1;
    // What is in no page, or behind the end of the sequence, is not looked at: any row will do.
    const Fp8Tile found{row < p.pages * p.page ? row : 0, queries, true, __any_sync(0xffffffffu, bad) != 0};
    ++tile_;
    find_tile();
    return found;
  }

 private:
  // To a piece that has a tile left, and its entry.
  __device__ __forceinline__ void find_tile() {
    while (tile_ >= piece_.end) {
      if (!pieces_.next(piece_)) return;
      tile_ = piece_.begin;
    }
    entry_ = TileRows(p, piece_, group_, kGroupRows).entry(tile_);
  }
  __device__ __forceinline__ void prefetch(int row, int rows) const {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p.cache + static_cast<int64_t>(row) * kFp8Row),
                 "r"(rows * kFp8Row)
                 : "memory");
  }

  const DecodeParams& p;
  Pieces pieces_;
  Piece piece_{};
  const uint32_t rank_;
  const bool leads_;
  int group_, tile_ = 0, entry_ = 0;
};

// Four codes times a power of two as bf16: exact, of subnormal codes too, and NaN of NaN.
__device__ __forceinline__ uint2 dequantise(const Pack<E4M3>& codes, int chunk, __nv_bfloat162 scale) {
  float x[4];
  unpack(codes, chunk, x);
  const __nv_bfloat162 low = __hmul2(__floats2bfloat162_rn(x[0], x[1]), scale);
  const __nv_bfloat162 high = __hmul2(__floats2bfloat162_rn(x[2], x[3]), scale);
  return {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}

template <class C>
class Fp8Loader {
 public:
  __device__ __forceinline__ Fp8Loader(const DecodeParams& params, DecodeShared& shared, uint32_t rank)
      : p(params), s(shared), rank_(rank), warp_(uniform_warp() % kWarpgroupWarps), lane_(threadIdx.x % kWarpSize) {
    const int row = 2 * warp_ + lane_ / 4 % 2, scales_row = 2 * warp_ + lane_ % 2;
    from_codes_ = p.cache + row * kFp8Row + lane_ / 8 * kSubColumns + lane_ % 4 * 16;
    from_scales_ = p.cache + scales_row * kFp8Row + kFp8Scales + lane_ / (2 * kGroups) * sizeof(float);
    to_ = shared_address(s.keys) + rank * (kGroups * kGroupRows * 128) + lane_ / 8 * kSubBytes + row * 128 +
          ((lane_ % 4 * 2) ^ row) * 16;
    full_ = shared_address(s.full);
    empty_ = shared_address(s.empty);
    if constexpr (C::kCluster == 2) {
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(peer_) : "r"(full_), "r"(rank ^ 1));
      peer_ -= full_;
    }
  }

  __device__ __forceinline__ void run() {
    Fp8Tiles<C> tiles(p, rank_, warp_ == 0);
    Fp8Tile next = tiles.next();
    if (!next.exists) return;
    load_rotated(next);
    fetch_codes(0, next.row);
    fetch_scales(next.row);
    uint32_t phases = 0;         // bit b: of buffer b
    int buffer = 0, parity = 1;  // parity: of the pieces
    while (next.exists) {
      const Fp8Tile now = next;
      next = tiles.next();
      const bool first = now.queries >= 0;
      if (first) load_queries(now.queries);
      buffer = first ? 0 : buffer ^ 1;
      parity ^= first;
#pragma unroll
      for (int i = 0; i < kScales; ++i) factors_[i] = __float2bfloat162_rn(scales_[i]);
      const uint32_t phase = (phases >> buffer & 1) ^ 1;
      wait_barrier(empty_ + buffer * 16, phase);
      if (warp_ == 0 && lane_ == 0 && (now.bad || first)) s.bad[parity] = now.bad;
      store_half(0, buffer * 2);
      fetch_codes(1, now.row);
      wait_barrier(empty_ + buffer * 16 + 8, phase);
      store_half(1, buffer * 2 + 1);
      fetch_codes(0, next.row);
      fetch_scales(next.row);
      phases ^= 1u << buffer;
      load_rotated(next);
    }
    // A block must not end while another can arrive at its barriers.
    for (int slot = 0; slot < 4; ++slot) wait_barrier(empty_ + slot * 8, (phases >> (slot / 2) & 1) ^ 1);
  }

 private:
  static constexpr int kGroups = C::kGroups, kScales = kGroups / 4;  // kScales: a lane

  // Where a group is in the cache.
  static __device__ __forceinline__ int64_t offset(int group, int row) {
    return static_cast<int64_t>(__shfl_sync(0xffffffffu, row, group)) * kFp8Row;
  }
  __device__ __forceinline__ void fetch_codes(int half, int row) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      auto& w = codes_[group].words;
      asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                   : "l"(from_codes_ + offset(group, row) + half * kHalfColumns)
                   : "memory");
    }
  }
  // Number i * 32 + lane of [column of scales][group][row].
  __device__ __forceinline__ void fetch_scales(int row) {
    const auto* const from = reinterpret_cast<const float*>(from_scales_ + offset(lane_ / 2 % kGroups, row));
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(scales_[i]) : "l"(from + 2 * i) : "memory");
    }
  }

  __device__ __forceinline__ void load_queries(int row) {
    if (warp_ != 3) return;
    wait_barrier(shared_address(&s.queries_empty), queries_phase_ ^ 1);
    queries_phase_ ^= 1;
    if (lane_ == 0) {
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.queries_full, sizeof(s.queries));
      for (int i = 0; i < kSubs; ++i) tma_load(s.queries[i], p.queries, s.queries_full, i * kSubColumns, row);
    }
    __syncwarp();
  }

  // Of a whole tile, in each block of a cluster; the lane whose group begins a page loads that.
  __device__ __forceinline__ void load_rotated(const Fp8Tile& tile) {
    if (warp_ != 2 || !tile.exists) return;
    const int groups = min(p.page, kTileKeys) / kGroupRows;
    const int group = (lane_ + static_cast<int>(rank_) * kGroups) % kTileGroups;
    wait_barrier(shared_address(&s.rotated_empty[ring_.stage]), ring_.phase ^ 1);
    if (lane_ == 0) {
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.rotated_full[ring_.stage], kSubBytes);
    }
    __syncwarp();
    if (lane_ < kTileGroups && group % groups == 0) {
      uint8_t* const to = s.keys[2 * kValueSubs + ring_.stage] + group * (kGroupRows * 128);
      tma_load(to, p.keys, s.rotated_full[ring_.stage], 0, tile.row);
    }
    __syncwarp();
    ring_.advance();
  }

  // This warp's rows of a half, whose codes have arrived.
  __device__ __forceinline__ void store_half(int half, int slot) {
    const uint32_t to = to_ + slot * (kHalfSubs * kSubBytes), full = full_ + slot * 8;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const int index = half * (4 * kGroups) + group * 2;  // of the scale of lane 0
      const int source = index % kWarpSize + lane_ / 16 * (2 * kGroups) + lane_ / 4 % 2;
      const __nv_bfloat162 factor = __shfl_sync(0xffffffffu, factors_[index / kWarpSize], source);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint2 low = dequantise(codes_[group], 2 * k, factor), high = dequantise(codes_[group], 2 * k + 1, factor);
        put((to ^ (k * 16)) + group * (kGroupRows * 128), make_uint4(low.x, low.y, high.x, high.y), full);
      }
    }
    __syncwarp();
    if (lane_ == 0) {
      if (C::kCluster == 2 && warp_ == 0) {
        expect_bytes(full, kGroups * kGroupRows * kHalfColumns * sizeof(__nv_bfloat16));  // from the other block
      } else {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(full) : "memory");
      }
    }
    __syncwarp();
  }

  // To the key tile, here and in the other block of the cluster, whose barrier counts the bytes.
  __device__ __forceinline__ void put(uint32_t to, const uint4& v, uint32_t full) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
    if constexpr (C::kCluster == 2) {
      asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                       to + peer_),
                   "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(full + peer_)
                   : "memory");
    }
  }

  const DecodeParams& p;
  DecodeShared& s;
  const uint32_t rank_;
  const int warp_, lane_;
  const uint8_t *from_codes_, *from_scales_;
  uint32_t to_, full_, empty_, peer_ = 0, queries_phase_ = 0;  // peer_: from an address here to that of the other block
  RingState<kRotated> ring_;
  Pack<E4M3> codes_[kGroups];        // of the next half
  float scales_[kScales];            // of the next tile
  __nv_bfloat162 factors_[kScales];  // of this one
};

}  // namespace dsv3
