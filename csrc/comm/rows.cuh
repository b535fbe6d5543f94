// Rows on their way between ranks: a warp puts a piece of one into a slot in shared memory, bulk copies (TMA) bring it to the slots
// of the ranks that need it, and from there through shared memory to its rows.
#pragma once

#include "../common/e4m3.cuh"
#include "../hopper/bulk.cuh"
#include "peers.cuh"

namespace dsv3 {

// How values travel: as they are (words), or as codes with scales. X: of x and, where they are dequantised, of the rows.
struct Words {
  using X = uint4;
  static constexpr int kColumns = 1, kBytes = 16;  // of a vector, of a column: "columns" are words of 16 bytes
  static constexpr bool kCast = false, kDecode = false;
};
template <class T, bool kDecoded>
struct Codes {
  using X = T;
  static constexpr int kColumns = Pack<T>::kSize, kBytes = 1;
  static constexpr bool kCast = true, kDecode = kDecoded;
};

// Scales of a piece travel, and land, as whole vectors.
__host__ __device__ constexpr int padded_tiles(int tiles) { return (tiles + 3) / 4 * 4; }
constexpr int kPieceStep = 4 * kTile;  // columns of all pieces but a row's last

constexpr int kHeadBytes = offsetof(Slot, data);
template <class Way>
__device__ __forceinline__ int slot_bytes(int columns) {
  return kHeadBytes + columns * Way::kBytes;
}

// What this thread wrote to shared memory is seen by bulk copies, and what it acquired from a peer as well.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Lane j has pair j of a token: its expert's rank, and its place among the token's pairs by rank, then by row.
struct Pair {
  int rank, place, row;
  float weight;
};
__device__ __forceinline__ Pair placed(Pair pair, int topk) {
  pair.place = 0;
  const int lane = threadIdx.x % kWarpSize;
  for (int j = 0; j < topk; ++j) {
    const int rank = __shfl_sync(kAllLanes, pair.rank, j), row = __shfl_sync(kAllLanes, pair.row, j);
    const bool before = rank != pair.rank ? rank < pair.rank : row != pair.row ? row < pair.row : j < lane;
    if (before) ++pair.place;
  }
  return pair;
}

// Fills a slot in shared memory with a piece of a row, and with all of the token's pairs: every rank finds its own. It is the
// work of kParts warps, of which this is one; kBatch vectors a lane are on their way at once.
template <class Way, int kBatch = 8, int kParts = 1>
__device__ __forceinline__ void fill_slot(Slot* slot, ScaleRule rule, const typename Way::X* row, int columns,
                                          const Pair& pair, int token, int topk, int part = 0) {
  const int lane = threadIdx.x % kWarpSize;
  const int vectors = columns / Way::kColumns;
  if constexpr (Way::kCast) {
    using X = typename Way::X;
    constexpr int kStep = kBatch * kWarpSize;
    const RowCasts to{reinterpret_cast<uint8_t*>(slot->data), slot->sf, 1, rule};
    for (int first = lane + part * kStep; first - lane < vectors; first += kParts * kStep) {
      Pack<X> packs[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int v = first + b * kWarpSize;
        packs[b] = load_pack(row + v * Way::kColumns, v < vectors);
      }
      cast_packs(to, packs, 0, 0, first, kWarpSize, vectors);
    }
  } else {
    for (int v = lane + part * kWarpSize; v < vectors; v += kParts * kWarpSize)
      copy_async(shared_pointer(&slot->data[v]), row + v);
  }
  if (part == 0) {
    if (lane < topk) {
      slot->meta.rows[pair.place] = pair.row;
      slot->meta.weights[pair.place] = pair.weight;
      slot->meta.ranks[pair.place] = static_cast<uint8_t>(pair.rank);
    }
    if (lane >= topk && lane < kMaxTopk) slot->meta.ranks[lane] = kNoRank;
    if (lane == 0) slot->meta.token = token;
  }
  if constexpr (!Way::kCast) wait_for_copies();
  fence_proxy();
  __syncwarp();
}

// A rank's pairs among those of a slot.
struct Here {
  int first, count;
};
__device__ __forceinline__ Here pairs_here(const Meta& meta, int rank) {
  const int lane = threadIdx.x % kWarpSize;
  const unsigned found = __ballot_sync(kAllLanes, lane < kMaxTopk && meta.ranks[lane % kMaxTopk] == rank);
  return {__ffs(found) - 1, __popc(found)};
}

// Codes of a vector as values of T.
template <class T>
__device__ __forceinline__ void decode(const uint4& codes, float sf, T* out) {
  const Pack<E4M3> packed{codes.x, codes.y, codes.z, codes.w};
  constexpr int kSize = Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < 16 / kSize; ++i) {
    float values[kSize];
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c) {
      float v[4];
      unpack(packed, i * (kSize / 4) + c, v);
#pragma unroll
      for (int j = 0; j < 4; ++j) values[4 * c + j] = __fmul_rn(v[j], sf);
    }
    Vec<T> vec;
    pack(values, vec);
    store(out + i * kSize, vec);
  }
}

// Where rows land.
struct RowTarget {
  void* rows;      // [num_rows, hidden], as they travelled or decoded
  uint8_t* codes;  // the same where rows stay FP8
  float* sf;       // [num_rows, sf_stride], padded tiles; or null
  int64_t sf_stride;
  int num_rows, hidden;
};

// What a warp receives into: a slot in shared memory, and the barrier on which it arrives.
struct Box {
  Slot* const slot;
  TransactionBarrier* const there;
  uint32_t phase = 0;

  __device__ __forceinline__ Box(Slot* slot, uint64_t* there)
      : slot(slot), there(reinterpret_cast<TransactionBarrier*>(there)) {}

  // Brings a slot here, for the whole warp, once the last one has left.
  __device__ __forceinline__ void take(const Slot* from, int bytes) {
    wait_bulk_stores_read<0>();
    __syncwarp();
    if (threadIdx.x % kWarpSize == 0) {
      fence_proxy();
      there->arrive_and_expect_tx(bytes);
      bulk_load(slot, from, bytes, *there);
    }
    there->wait(phase);
    phase ^= 1;
  }
};

// By one thread, before a __syncthreads.
template <int kBoxes>
__device__ __forceinline__ void init_boxes(uint64_t (&there)[kBoxes]) {
  init_barriers(reinterpret_cast<TransactionBarrier*>(there), kBoxes);
}

// Brings a slot's columns to its rows, of which lane i of `count` holds the i-th; rows beyond the last there is are left out. The
// slot is in use until this lane's bulk stores have read it.
template <class Way>
__device__ __forceinline__ void write_rows(const RowTarget& to, Slot* slot, int begin, int columns, int count, int row,
                                           bool spoiled) {
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (Way::kDecode) {
    using X = typename Way::X;
    for (int i = 0; i < count; ++i) {
      const int64_t at = __shfl_sync(kAllLanes, row, i);
      if (at >= to.num_rows) continue;
      X* const out = static_cast<X*>(to.rows) + at * to.hidden + begin;
      for (int v = lane; v < columns / 16; v += kWarpSize) decode(slot->data[v], slot->sf[v / 8], out + v * 16);
    }
    return;
  }
  const int tiles = ceil_div(columns, kTile);
  if (spoiled) {
    if constexpr (Way::kCast) {
      for (int tile = lane; tile < tiles; tile += kWarpSize) slot->sf[tile] = __uint_as_float(kNanWord);
    } else {
      for (int v = lane; v < columns; v += kWarpSize) {
        slot->data[v] = make_uint4(kNanWord, kNanWord, kNanWord, kNanWord);
      }
    }
    fence_proxy();
    __syncwarp();
  }
  if (lane < count && row < to.num_rows) {
    const int64_t at = static_cast<int64_t>(row) * to.hidden + begin;
    if constexpr (Way::kCast) {
      bulk_store(to.codes + at, slot->data, columns);
      if (to.sf != nullptr) {
        float* const sf = to.sf + row * to.sf_stride + begin / kTile;
        bulk_store(sf, slot->sf, padded_tiles(tiles) * static_cast<int>(sizeof(float)));
      }
    } else {
      bulk_store(static_cast<uint4*>(to.rows) + at, slot->data, columns * 16);
    }
  }
}

}  // namespace dsv3
