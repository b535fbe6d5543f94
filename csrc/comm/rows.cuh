// Rows on their way between ranks: what a warp does with a piece of one that it sends, and with a slot that it has received.
#pragma once

#include "../common/e4m3.cuh"
#include "peers.cuh"

namespace dsv3 {

constexpr int kBatch = 4;  // vectors a lane and turn
constexpr int kStageVectors = kPieceBytes / 16;

// How values travel: as they are (words), or as codes with scales. X: of x and, where they are dequantised, of the rows.
struct Words {
  using X = uint4;
  static constexpr int kColumns = 1;  // a vector: "columns" are words of 16 bytes
  static constexpr bool kCast = false, kDecode = false;
};
template <class T, bool kDecoded>
struct Codes {
  using X = T;
  static constexpr int kColumns = Pack<T>::kSize;
  static constexpr bool kCast = true, kDecode = kDecoded;
};

// The lanes of a tile cast their pack; returns the scale.
template <class X>
__device__ __forceinline__ float cast_pack(const Pack<X>& pack, ScaleRule rule, uint32_t (&words)[Pack<X>::kSize / 4]) {
  float amax = abs_max(pack);
#pragma unroll
  for (int offset = kTile / Pack<X>::kSize / 2; offset > 0; offset /= 2) {
    amax = MaxNan{}(amax, __shfl_xor_sync(kAllLanes, amax, offset));
  }
  const float sf = tile_scale(amax, rule), inverse = __frcp_rn(sf);
#pragma unroll
  for (int c = 0; c < Pack<X>::kSize / 4; ++c) {
    float v[4];
    unpack(pack, c, v);
    words[c] = encode(v, inverse);
  }
  return sf;
}

// Asks for this lane's vectors of a part of a row, from `first` on: as many as the stage holds.
__device__ __forceinline__ void ask(Slot* stage, const uint4* row, int first, int vectors) {
  const int count = min(vectors - first, kStageVectors);
  for (int v = threadIdx.x % kWarpSize; v < count; v += kWarpSize) copy_ahead(&stage->data[v], row + first + v);
}

// Writes a piece of a row, of which the stage has the first part, to the slots of the ranks in `mask`; slot: in lane r that
// of rank r.
template <class Way>
__device__ __forceinline__ void send_piece(ScaleRule rule, const uint4* row, int vectors, unsigned mask, Slot* slot,
                                           Slot* stage) {
  using X = typename Way::X;
  const int lane = threadIdx.x % kWarpSize;
  for (int first = 0; first < vectors; first += kBatch * kWarpSize) {
    if (first % kStageVectors == 0) {
      if (first != 0) ask(stage, row, first, vectors);
      wait_for_copies();  // a lane's own vectors: no other reads them
    }
    uint4 raw[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int v = first + b * kWarpSize + lane;
      raw[b] = v < vectors ? stage->data[v % kStageVectors] : make_uint4(0, 0, 0, 0);
    }
    constexpr int kWords = Way::kCast ? Pack<X>::kSize / 4 : 1, kLanes = Way::kCast ? kTile / Pack<X>::kSize : 1;
    [[maybe_unused]] uint32_t words[kBatch][kWords];
    if constexpr (Way::kCast) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const float sf = cast_pack(Pack<X>{raw[b].x, raw[b].y, raw[b].z, raw[b].w}, rule, words[b]);
        const int v = first + b * kWarpSize + lane;
        if (v < vectors && v % kLanes == 0) stage->sf[v / kLanes] = sf;
      }
    }
    for (unsigned left = mask; left != 0; left &= left - 1) {
      Slot* const to =
          reinterpret_cast<Slot*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), __ffs(left) - 1));
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int v = first + b * kWarpSize + lane;
        if (v >= vectors) continue;
        if constexpr (Way::kCast) {
          store_words(reinterpret_cast<uint8_t*>(to->data) + v * Pack<X>::kSize, words[b]);
        } else {
          to->data[v] = raw[b];
        }
      }
    }
  }
}

// Lane j has pair j of a token: its expert's rank, and its place among the token's rows there.
struct Pair {
  int rank, place, row;
  float weight;
};
// Pairs of which the place is not known yet: rows ascend.
__device__ __forceinline__ Pair placed(Pair pair, int topk) {
  pair.place = 0;
  for (int j = 0; j < topk; ++j) {
    const int rank = __shfl_sync(kAllLanes, pair.rank, j), other = __shfl_sync(kAllLanes, pair.row, j);
    if (rank == pair.rank && other < pair.row) ++pair.place;
  }
  return pair;
}

constexpr int kRestVectors = (sizeof(Slot) - offsetof(Slot, sf)) / 16;  // scales and meta
static_assert(kRestVectors <= kWarpSize && offsetof(Slot, sf) % 16 == 0);
__device__ __forceinline__ uint4* rest_of(Slot* slot) { return reinterpret_cast<uint4*>(slot->sf); }

// What is no data, from the stage, where the scales lie, to the slots: as whole vectors, since the L2 cache takes its time
// over parts of a sector.
__device__ __forceinline__ void send_meta(const Pair& pair, int token, unsigned mask, Slot* slot, Slot* stage) {
  const int lane = threadIdx.x % kWarpSize;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int rank = __ffs(left) - 1;
    const int count = __popc(__ballot_sync(kAllLanes, pair.rank == rank));
    if (pair.rank == rank) {
      stage->meta.rows[pair.place] = pair.row;
      stage->meta.weights[pair.place] = pair.weight;
    }
    if (lane == 0) {
      stage->meta.token = token;
      stage->meta.count = count;
    }
    Slot* const to = reinterpret_cast<Slot*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), rank));
    __syncwarp();
    if (lane < kRestVectors) rest_of(to)[lane] = rest_of(stage)[lane];
    __syncwarp();
  }
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
  float* sf;       // with the strides
  int64_t sf_row_stride, sf_tile_stride;
  int num_rows, hidden;
};

// Writes a slot's columns to its rows, of which lane i holds the i-th; rows beyond the last there is are left out.
template <class Way>
__device__ __forceinline__ void write_rows(const RowTarget& to, const Slot* slot, int begin, int columns, int row,
                                           bool spoiled) {
  const int lane = threadIdx.x % kWarpSize;
  const int vectors = Way::kCast ? ceil_div(columns, 16) : columns;
  const int count = slot->meta.count;
  for (int first = 0; first < vectors; first += kBatch * kWarpSize) {
    uint4 raw[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int v = first + b * kWarpSize + lane;
      if (v < vectors) raw[b] = slot->data[v];
      if (!Way::kCast && spoiled) raw[b] = make_uint4(kNanWord, kNanWord, kNanWord, kNanWord);
    }
    for (int i = 0; i < count; ++i) {
      const int64_t at = __shfl_sync(kAllLanes, row, i);
      if (at >= to.num_rows) continue;
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int v = first + b * kWarpSize + lane;
        if (v >= vectors) continue;
        if constexpr (Way::kDecode) {
          using X = typename Way::X;
          decode(raw[b], slot->sf[v / 8], static_cast<X*>(to.rows) + at * to.hidden + begin + v * 16);
        } else if constexpr (Way::kCast) {
          *reinterpret_cast<uint4*>(to.codes + at * to.hidden + begin + v * 16) = raw[b];
        } else {
          static_cast<uint4*>(to.rows)[at * to.hidden + begin + v] = raw[b];
        }
      }
    }
  }
  if constexpr (Way::kCast && !Way::kDecode) {
    const int tiles = ceil_div(columns, kTile);
    for (int i = 0; i < count; ++i) {
      const int64_t at = __shfl_sync(kAllLanes, row, i);
      if (at >= to.num_rows) continue;
      float* const sf = to.sf + at * to.sf_row_stride + begin / kTile * to.sf_tile_stride;
      for (int tile = lane; tile < tiles; tile += kWarpSize) {
        sf[tile * to.sf_tile_stride] = spoiled ? __uint_as_float(kNanWord) : slot->sf[tile];
      }
    }
  }
}

// Brings a slot, of whose data so many vectors are in use, to shared memory, for the whole warp.
__device__ __forceinline__ void take(Slot* stage, const Slot* slot, int vectors) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane < kRestVectors) copy_ahead(rest_of(stage) + lane, reinterpret_cast<const uint4*>(slot->sf) + lane);
  ask(stage, slot->data, 0, vectors);
  wait_for_copies();
  __syncwarp();
}

}  // namespace dsv3
