// What mla_schedule writes and mla_decode reads: which worker (a cluster of blocks) attends to which tiles of which
// sequences. A sequence here is one of the batch or, where its steps times heads exceed the rows of a cluster, one group
// of its rows; all first groups come before all second ones, so that workers which take the same keys do so at about the
// same time and all but one find them in the L2 cache. A worker takes what lies between its begin and the next worker's;
// what it takes of a sequence is a piece, and the pieces of a sequence that has several leave partial results, which are
// then combined in their order. Where no sequence is cut they may be taken in another order, which is then part of the schedule.
#pragma once

#include <cstdint>

#include "../common/tensor.h"

namespace dsv3 {

constexpr int kTileKeys = 64;        // keys of a tile
constexpr int kBlockRows = 64;       // rows (a step and a head each) of a block
constexpr int kInvariantTiles = 16;  // of a piece, where the order of sums must not depend on the batch

// Blocks of a cluster, which share what they read: as many as a sequence's rows can use.
constexpr int cluster_blocks(int64_t rows) { return rows > kBlockRows ? 2 : 1; }

struct Begin {
  int sequence, tile, piece;  // with an order: the place in it, 0, and which sequence has that place
};

// The parts of the int32 tensor, whose size depends on the batch and on the device alone.
struct DecodeSchedule {
  static constexpr int kHeader = 4;
  int* data;
  int workers, batch, groups;

  static constexpr int64_t size(int64_t workers, int64_t sequences) {
    return kHeader + 3 * (workers + 1) + 2 * sequences + 1;
  }
  __host__ __device__ int sequences() const { return batch * groups; }
  __host__ __device__ int& splits() const { return data[0]; }       // sequences of several pieces
  __host__ __device__ int& piece_tiles() const { return data[1]; }  // the most in a piece
  __host__ __device__ int& ordered() const { return data[2]; }      // whether there is an order
  __host__ __device__ Begin* begin() const { return reinterpret_cast<Begin*>(data + kHeader); }
  // The first of a sequence's partial results, [sequences() + 1]; and the numbers of the split sequences.
  __host__ __device__ int* first_partial() const { return data + kHeader + 3 * (workers + 1); }
  __host__ __device__ int* split() const { return first_partial() + sequences() + 1; }
  // In the same place, since nothing is split where there is one.
  __host__ __device__ int* order() const { return split(); }
};

struct Piece {
  int batch, group;  // its sequence and the group of rows
  int length;        // keys
  int begin, end;    // tiles
  int partial;       // where its result goes, or -1: it is the sequence's only piece
};

// Keys of a sequence: none of a negative number, and no more than can be counted in tiles.
__device__ __forceinline__ int num_keys(const int* seq_lens, int i) { return min(max(seq_lens[i], 0), 1 << 30); }

// A worker's pieces, in order. Every thread that asks gets the same answers.
class Pieces {
 public:
  __device__ __forceinline__ Pieces(const DecodeSchedule& schedule, const int* seq_lens, int worker)
      : schedule_(schedule), seq_lens_(seq_lens) {
    at_ = schedule.begin()[worker];
    end_ = schedule.begin()[worker + 1];
    piece_tiles_ = schedule.piece_tiles();
    ordered_ = schedule.ordered() != 0;
  }
  __device__ __forceinline__ bool next(Piece& piece) {
    if (at_.sequence > end_.sequence || (at_.sequence == end_.sequence && at_.tile >= end_.tile)) return false;
    if (at_.sequence >= schedule_.sequences()) return false;
    const int sequence = ordered_ ? at_.piece : at_.sequence;
    piece.batch = sequence % schedule_.batch;
    piece.group = sequence / schedule_.batch;
    piece.length = num_keys(seq_lens_, piece.batch);
    const int tiles = ceil_div(piece.length, kTileKeys);
    piece.begin = at_.tile;
    const int last = at_.sequence == end_.sequence ? end_.tile : tiles;
    piece.end = min(last, at_.tile - at_.tile % piece_tiles_ + piece_tiles_);
    const bool whole = piece.begin == 0 && piece.end == tiles;
    piece.partial = whole ? -1 : schedule_.first_partial()[at_.sequence] + at_.piece;
    if (piece.end >= tiles) {
      at_ = {at_.sequence + 1, 0, 0};
      if (ordered_ && at_.sequence < end_.sequence) at_.piece = schedule_.order()[at_.sequence];
    } else {
      at_.tile = piece.end;
      ++at_.piece;
    }
    return true;
  }

 private:
  DecodeSchedule schedule_;
  const int* seq_lens_;
  int piece_tiles_;
  bool ordered_;
  Begin at_, end_;
};

}  // namespace dsv3
