// How few_attention divides what sequences have in the paged cache: into pages of 64 tokens, chunks of pages, and pieces, each
// the work of one block at a time.
//
// The first 16 chunks of a sequence have two pages each, the next 16 four, and so on. A piece is a page where all tables are
// small, so that many multiprocessors share a sequence, and otherwise a chunk.
#pragma once

#include <cstdint>

#include "../common/tensor.h"
#include "../common/vector.cuh"

namespace dsv3 {
namespace {

constexpr int kPage = 64;
constexpr unsigned kAll = 0xffffffffu;                            // lanes
constexpr int kChunksASize = 16, kPagesASize = 2 * kChunksASize;  // of two pages each; then as many of four, ...
// Pages of all tables up to which they are pieces, and of one: where the combination knows only chunks of two and four.
constexpr int kMaxPagesApart = 264, kMaxWidthApart = 3 * kPagesASize;

inline bool are_pages_apart(int64_t batch, int64_t width) {
  return width <= kMaxWidthApart && batch * width <= kMaxPagesApart;
}

// Chunks of so many pages.
__host__ __device__ __forceinline__ int num_chunks(int pages) {
  int smaller = 0, size = 2;
  for (; pages > kChunksASize * size; size *= 2) {
    pages -= kChunksASize * size;
    smaller += kChunksASize;
  }
  return smaller + ceil_div(pages, size);
}

// Pages that so many tokens need.
__device__ __forceinline__ int pages_of(int length) { return length / kPage + (length % kPage != 0); }

// What the batch's sequences have in the cache. NOTE: it may be read before the wait for the kernel ahead, so past L1, which
// keeps no order with other grids.
struct Tables {
  const int *entries, *seq_lens;  // [batch, width], rows `stride` apart; [batch]
  int64_t stride;
  int64_t pages;  // of the cache
  int batch, width;
  bool pages_apart;  // a piece is a page

  __device__ __forceinline__ int length(int sequence) const { return max(__ldcg(seq_lens + sequence), 0); }
  __device__ __forceinline__ int page(int sequence, int entry) const {
    return __ldcg(entries + sequence * stride + entry);
  }
  // Of those that a sequence needs, the pages that its table has room for, and their pieces.
  __device__ __forceinline__ int pages_in_table(int length) const { return min(pages_of(length), width); }
  __device__ __forceinline__ int pieces(int length) const {
    const int pages = pages_in_table(length);
    return pages_apart ? pages : num_chunks(pages);
  }
};

// A page that a block is to attend to.
struct Stage {
  int sequence, piece;  // no sequence: -1
  int entry, end;       // of the table: the page, and where the piece ends
  int length;           // of the sequence
  int page;
  __device__ __forceinline__ bool is_last() const { return entry + 1 == end; }
};

// The pages of the block's pieces one by one; a block takes every gridDim.x-th piece of all sequences. Lane l of each warp
// keeps sequence first + l: its length, and how many pieces lie before its end.
class Stages {
 public:
  __device__ __forceinline__ explicit Stages(const Tables& tables) : t(tables), piece(static_cast<int>(blockIdx.x)) {
    look(0);
  }

  // The first page of the block's next piece.
  __device__ __forceinline__ Stage first() {
    for (int total; piece - before >= (total = __shfl_sync(kAll, end, kWarpSize - 1));) {
      if (first_sequence + kWarpSize >= t.batch) return {.sequence = -1};
      before += total;
      look(first_sequence + kWarpSize);
    }
    const int n = piece - before, owner = __ffs(__ballot_sync(kAll, end > n)) - 1;
    Stage at{.sequence = first_sequence + owner, .piece = n - __shfl_sync(kAll, end - mine, owner)};
    at.length = __shfl_sync(kAll, length, owner);
    const int level = t.pages_apart ? 0 : at.piece / kChunksASize, size = t.pages_apart ? 1 : 2 << level;
    at.entry = t.pages_apart ? at.piece : kPagesASize * ((1 << level) - 1) + at.piece % kChunksASize * size;
    at.end = min(at.entry + size, t.pages_in_table(at.length));
    at.page = t.page(at.sequence, at.entry);
    piece += static_cast<int>(gridDim.x);
    return at;
  }
  // The page behind `at`, maybe of the next piece.
  __device__ __forceinline__ Stage next(Stage at) {
    if (at.sequence < 0) return at;
    if (at.is_last()) return first();
    ++at.entry;
    at.page = t.page(at.sequence, at.entry);
    return at;
  }

 private:
  __device__ __forceinline__ void look(int sequence) {
    const int lane = threadIdx.x % kWarpSize;
    first_sequence = sequence;
    mine = length = 0;
    if (sequence + lane < t.batch) {
      length = t.length(sequence + lane);
      mine = t.pieces(length);
    }
    end = mine;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int others = __shfl_up_sync(kAll, end, distance);
      if (lane >= distance) end += others;
    }
  }

  const Tables& t;
  int piece, before = 0, first_sequence;  // the next piece, and how many lie before the first sequence
  int mine, end, length;
};

}  // namespace
}  // namespace dsv3
