// Adds up the partial results of the sequences that mla_decode_kernel has split, in the order of their pieces:
//   lse = log sum_i exp(lse_i),  out = sum_i exp(lse_i - lse) out_i
// Bound by reading the partial results, which are still in the L2 cache.
#pragma once

#include "decode.cuh"

namespace dsv3 {

constexpr int kCombineThreads = 128, kCombineColumns = 4 * kWarpSize;

// A row of a split sequence; and of its columns, what a warp takes: kVectors times 128.
struct CombineItem {
  int sequence, row, column, first, last;  // the row within its group; the partial results

  template <int kRows, int kVectors>
  static __device__ __forceinline__ CombineItem at(const DecodeParams& p, int index, int items) {
    constexpr int kParts = kLatent / (kVectors * kCombineColumns);
    if (index >= items) return {};
    CombineItem item;
    item.column = index % kParts * (kVectors * kCombineColumns);
    item.row = index / kParts % kRows;
    item.sequence = p.schedule.split()[index / (kParts * kRows)];
    item.first = p.schedule.first_partial()[item.sequence];
    item.last = p.schedule.first_partial()[item.sequence + 1];
    return item;
  }
};

template <int kRows, int kVectors>
__device__ __forceinline__ void combine(const DecodeParams& p, const CombineItem& item) {
  constexpr int kPieces = 8 / kVectors;  // asked for at once
  const int lane = threadIdx.x % kWarpSize;
  const int batch = item.sequence % p.schedule.batch, group = item.sequence / p.schedule.batch;
  const int group_row = group * kRows + item.row;
  if (group_row >= p.rows) return;
  const bool lost = item.last > p.partials;  // what a sequence longer than its table left had no place
  const float* const from = p.partial + item.row * kLatent + item.column + lane * 4;
  float4 total[kVectors] = {};
  float highest = -INFINITY, sum = 0.f;
  for (int base = item.first; base < item.last && !lost; base += kWarpSize) {
    // Values and lse are asked for together; what came before is rescaled, as between tiles.
    const int mine = base + lane, pieces = min(item.last - base, kWarpSize);
    float4 values[kPieces][kVectors];
    const auto load = [&](int j) {
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        const int64_t piece = base + min(j + k, pieces - 1);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          values[k][v] = *reinterpret_cast<const float4*>(from + piece * (kRows * kLatent) + v * kCombineColumns);
        }
      }
    };
    load(0);
    const float lse = mine < item.last ? p.partial_lse[static_cast<int64_t>(mine) * kRows + item.row] : -INFINITY;
    const float higher = fmaxf(highest, warp_reduce<Max>(lse)), factor = exp2f(highest - finite(higher));
    const float weights = exp2f(lse - finite(higher));
    highest = higher;
    sum = sum * factor + warp_reduce<Sum>(weights);
#pragma unroll
    for (float4& t : total) t = make_float4(t.x * factor, t.y * factor, t.z * factor, t.w * factor);
    for (int j = 0; j < pieces; j += kPieces) {
      if (j > 0) load(j);
#pragma unroll
      for (int k = 0; k < kPieces; ++k) {
        const float weight = __shfl_sync(0xffffffffu, weights, (j + k) % kWarpSize);
        if (j + k >= pieces) continue;
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          total[v].x += weight * values[k][v].x;
          total[v].y += weight * values[k][v].y;
          total[v].z += weight * values[k][v].z;
          total[v].w += weight * values[k][v].w;
        }
      }
    }
  }
  const float inverse = lost ? NAN : sum == 0.f ? 0.f : 1.f / sum;
  const int64_t to = (static_cast<int64_t>(batch) * p.rows + group_row) * kLatent + item.column + lane * 4;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const float4& t = total[v];
    *reinterpret_cast<uint2*>(p.out + to + v * kCombineColumns) =
        make_uint2(pack_bf16(t.x * inverse, t.y * inverse), pack_bf16(t.z * inverse, t.w * inverse));
  }
  if (item.column == 0 && lane == 0) {
    const int step = group_row / p.heads, head = group_row % p.heads;
    p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.steps + step] = lost ? NAN
                                                                             : sum == 0.f
                                                                                 ? -INFINITY
                                                                                 : (highest + log2f(sum)) * kLn2;
  }
}

// NOTE: the schedule is read before the wait. It is older than the kernel ahead, which began after its own wait for it; a
// schedule made by that kernel's successor could not be in this place.
template <int kRows, int kVectors>
__device__ __forceinline__ void combine_all(const DecodeParams& p) {
  const int items = p.schedule.splits() * kRows * (kLatent / (kVectors * kCombineColumns));
  const int warps = gridDim.x * (kCombineThreads / kWarpSize);
  int index = threadIdx.x / kWarpSize * gridDim.x + blockIdx.x;
  CombineItem item = CombineItem::at<kRows, kVectors>(p, index, items);
  wait_for_inputs();
  // NOTE: where nothing is split this made decoding 3% slower; why is not known.
  if (items > 0) release_dependents();
  for (; index < items; index += warps) {
    const CombineItem next = CombineItem::at<kRows, kVectors>(p, index + warps, items);
    combine<kRows, kVectors>(p, item);
    item = next;
  }
}

template <int kRows>
__global__ void __launch_bounds__(kCombineThreads) mla_combine_kernel(const __grid_constant__ DecodeParams p) {
  // Whole rows where there are many; of few, parts, so that more multiprocessors have some.
  if (p.schedule.splits() * kRows >= static_cast<int>(gridDim.x)) {
    combine_all<kRows, 4>(p);
  } else {
    combine_all<kRows, 1>(p);
  }
}

}  // namespace dsv3
