// Which output tiles a persistent cluster works on, in which order. Whatever warp walks the sequence finds the same;
// offsets and counts are read on the device.
#pragma once

#include "../common/device_error.cuh"
#include "../common/tensor.h"
#include "../common/vector.cuh"

namespace dsv3 {

constexpr int kBlockK = 128;  // K of one pipeline stage, and of one scale factor
constexpr int kTileRows = 128;
constexpr int kPanel = 8;  // row spans that are worked on together, so that their operands meet in L2

enum class Layout {
  kDense,   // one matrix
  kRows,    // rows sorted by group; offsets [G + 1]
  kDepth,   // K sorted by group, each padded to a multiple of 128; the output is [G, M, N]
  kMasked,  // groups of `rows` rows, the first counts[g] of which count
};

// What a tile of the output needs. Rows and columns are those of the whole tensors.
struct Tile {
  int group, row, row_end, column;
  int depth, depth_blocks;   // first block of K, and their number
  int part = 0, number = 0;  // of the parts that K is cut into, and of the output's tiles
  bool same_rows = false;    // the blocks of the cluster have the same rows and neighbouring columns, not the reverse
};

// Between the wait for a stage and the arrival at it, of which the compiler does not know that they order memory.
template <class T>
__device__ __forceinline__ void put(T& place, const T& value) {
  asm volatile("" ::: "memory");
  place = value;
  asm volatile("" ::: "memory");
}

// Tiles stand in shared memory in turn, one place more than the ring has stages.
template <class C>
__device__ __forceinline__ int next_place(int place) {
  return place == C::kStages ? 0 : place + 1;
}

// Spans of rows by columns of tiles, a panel of kPanel spans at a time, spans fastest.
struct Grid {
  int spans, columns;
  __device__ __forceinline__ int size() const { return spans * columns; }
  __device__ __forceinline__ void place(int index, int& span, int& column) const {
    const int panel = index / (kPanel * columns), height = min(kPanel, spans - panel * kPanel);
    const int within = index - panel * kPanel * columns;
    column = within / height;
    span = panel * kPanel + within - column * height;
  }
};

// Row scales of a K block: fp32 [blocks, stride], the rows contiguous. A bulk copy begins at a multiple of 16 bytes, that
// is at most three rows early, and ends at one too: up to three floats past the rows, within the 16 bytes of the last.
struct RowScales {
  const float* data;
  int stride;

  static constexpr int kEarly = 3;
  static constexpr int size(int rows) { return rows + 4; }  // floats that a stage keeps for them
  __device__ __forceinline__ int bytes(int first, int wanted) const {
    const int begin = first & ~kEarly, end = min((first + wanted + kEarly) & ~kEarly, stride);
    return max(end - begin, 0) * static_cast<int>(sizeof(float));
  }
  __device__ __forceinline__ const float* at(int first, int block) const {
    return data + static_cast<int64_t>(block) * stride + (first & ~kEarly);
  }
};

// Whether the offsets (or counts) make sense; if not, the reporting warp says which does not. By a whole warp.
template <Layout kLayout>
__device__ __forceinline__ bool check_groups(const int* numbers, int groups, int limit, DeviceError* error,
                                             bool reports) {
  const int lane = threadIdx.x % kWarpSize;
  int blocks = 0;
  for (int base = 0; base < groups; base += kWarpSize) {
    const int g = base + lane;
    int first = 0, second = 0;
    bool bad = false;
    if (g < groups) {
      first = __ldg(numbers + g);
      if constexpr (kLayout == Layout::kMasked) {
        bad = first < 0 || first > limit;
      } else {
        second = __ldg(numbers + g + 1);
        bad = second < first || second > limit || (g == 0 && first != 0);
        blocks += ceil_div(second - first, kBlockK);
      }
    }
    if (const uint32_t ballot = __ballot_sync(0xffffffffu, bad)) {
      constexpr auto kCode = kLayout == Layout::kMasked ? DeviceErrorCode::kCounts : DeviceErrorCode::kOffsets;
      if (reports && lane == __ffs(ballot) - 1) report(error, kCode, g, first, second, limit);
      return false;
    }
  }
  if constexpr (kLayout == Layout::kDepth) {
    blocks = __reduce_add_sync(0xffffffffu, blocks);
    if (blocks * kBlockK > limit) {
      if (reports && lane == 0) report(error, DeviceErrorCode::kSlots, groups, blocks * kBlockK, 0, limit);
      return false;
    }
  }
  return true;
}

// The group of a running tile number, 32 groups a look: lane l of the window holds group base + l.
struct GroupWindow {
  int base = -kWarpSize, begin = 0, end = 0;  // groups, and the tiles before and within the window
  int first = 0, length = 0, before = 0;      // of this lane's group: first row, rows, tiles before it

  // tiles(length) is the number of a group's tiles. False past the last group.
  template <Layout kLayout, class Tiles>
  __device__ __forceinline__ bool seek(const int* numbers, int groups, int rows, int index, Tiles tiles, int& group,
                                       int& group_first, int& group_length, int& group_before) {
    const int lane = threadIdx.x % kWarpSize;
    while (index >= end) {
      base += kWarpSize;
      if (base >= groups) return false;
      const int g = base + lane;
      first = length = 0;
      if (g < groups) {
        const int number = __ldg(numbers + g);
        first = kLayout == Layout::kMasked ? g * rows : number;
        length = kLayout == Layout::kMasked ? number : __ldg(numbers + g + 1) - number;
      }
      const int mine = tiles(length);
      int sum = mine;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (lane >= offset) sum += other;
      }
      begin = end;
      before = begin + sum - mine;
      end = begin + __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
    }
    // The last lane whose tiles begin at or before the index holds it: groups without tiles begin where the next does.
    const int holder = 31 - __clz(__ballot_sync(0xffffffffu, before <= index));
    group = base + holder;
    group_first = __shfl_sync(0xffffffffu, first, holder);
    group_length = __shfl_sync(0xffffffffu, length, holder);
    group_before = __shfl_sync(0xffffffffu, before, holder);
    return true;
  }
};

}  // namespace dsv3
