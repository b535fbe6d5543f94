// How the casts that need a whole tile before they can convert it move it. A warp mostly holds 8 packs of columns of 4
// quads of rows (a pack is 16 bytes of a row, a quad 4 rows): it reads whole lines, each thread can make words of 4 rows of
// a column, and those words go through shared memory without bank conflicts.
#pragma once

#include <algorithm>

#include "../common/e4m3.cuh"
#include "../hopper/shared_memory.cuh"

namespace dsv3 {

constexpr int kLanePacks = 8;

template <class T>
__device__ __forceinline__ Pack<T> load_shared(const uint4& from) {
  return {from.x, from.y, from.z, from.w};
}

// The tiles of `matrices` matrices, columns fastest, dealt to the thread blocks in turn. `step` is from a block's tile
// to its next, so that no division is needed on the way.
struct Tiling {
  struct Place {
    uint32_t column, row, matrix;  // tile numbers
  };
  uint32_t columns = 0, rows = 0, matrices = 0;
  Place step = {};
  uint32_t blocks = 0;

  Tiling() = default;
  Tiling(int64_t matrices, int64_t rows, int64_t columns, int max_blocks)
      : columns(columns), rows(rows), matrices(matrices) {
    blocks = static_cast<uint32_t>(std::min<int64_t>(max_blocks, matrices * rows * columns));
    if (blocks > 0) step = place(blocks);
  }
  __host__ __device__ __forceinline__ Place place(uint32_t index) const {
    return {index % columns, index / columns % rows, index / columns / rows};
  }
  __device__ __forceinline__ Place next(Place at) const {
    at.column += step.column;
    const bool row_carry = at.column >= columns;
    if (row_carry) at.column -= columns;
    at.row += step.row + row_carry;
    const bool matrix_carry = at.row >= rows;
    if (matrix_carry) at.row -= rows;
    at.matrix += step.matrix + matrix_carry;
    return at;
  }
  __device__ __forceinline__ bool holds(const Place& at) const { return at.matrix < matrices; }
};

// kPacks packs of columns by 128 rows of bytes in shared memory, written a word of a quad at a time and read along the
// columns, 16 rows at a time. The word of a quad lies at quad ^ 4 * pack: 8 packs of 4 quads are 32 banks, and so are
// the words of a column, which eight lanes read.
template <class T, int kPacks>
struct alignas(16) ByteTile {
  static constexpr int kSize = Pack<T>::kSize;
  uint32_t words[kPacks * kSize][kTile / 4];

  __device__ __forceinline__ void put(int column, int quad, uint32_t word) {
    words[column][quad ^ 4 * (column / kSize % kLanePacks)] = word;
  }

  // Writes column c to out + c * stride. Columns from `columns` on, and rows from `rows` on (a multiple of 16), do not
  // exist.
  template <int kThreads>
  __device__ __forceinline__ void store(uint8_t* out, int64_t stride, int columns, int rows) const {
    constexpr int kChunks = kTile / 16;
    const int chunk = threadIdx.x % kChunks, first = threadIdx.x / kChunks;
    out += first * stride + chunk * 16;
#pragma unroll
    for (int i = 0; i < kPacks * kSize; i += kThreads / kChunks, out += kThreads / kChunks * stride) {
      const int column = first + i;
      if (column >= columns || chunk * 16 >= rows) continue;
      const uint32_t* const source = &words[column][4 * (chunk ^ column / kSize % kLanePacks)];
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(source);
    }
  }
};

}  // namespace dsv3
