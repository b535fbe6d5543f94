// What precedes the products of mla_attention_backward: a tile of 64 queries and 4 heads a block, numbers that the scores
// and their gradients start from. 512 bytes in and 8 out a query and head.
#pragma once

#include "backward.cuh"

namespace dsv3 {

constexpr int kStatsHeads = 4, kStatsThreads = 256, kRowLanes = kValueColumns / Vec<__nv_bfloat16>::kSize;

struct StatsParams {
  float* stats;  // [heads, query_tiles, 2, 64]
  int* bad;
  const __nv_bfloat16* out;   // [rows, heads, 128]
  const __nv_bfloat16* dout;  // [rows, heads, 128]
  const float* lse;           // [heads, rows]
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  DeviceError* error;
  int64_t rows_q, rows_k;
  int heads, sequences, query_tiles, max_queries;
  float scale;
};

// Offsets that decrease or exceed the rows, or a sequence longer than announced. By one block, for the kernel after it.
__device__ __forceinline__ void check_offsets(const StatsParams& p, const int* offsets, int64_t rows, int longest) {
  for (int s = threadIdx.x; s < p.sequences; s += kStatsThreads) {
    const int begin = offsets[s], end = offsets[s + 1];
    if (end >= begin && end <= rows && (s > 0 || begin == 0) && end - begin <= longest) continue;
    report(p.error, DeviceErrorCode::kOffsets, s, begin, end, rows);
    *p.bad = 1;
  }
}

__global__ void __launch_bounds__(kStatsThreads) backward_stats_kernel(StatsParams p) {
  wait_for_inputs();
  release_dependents();
  if (blockIdx.x == 0 && blockIdx.y == 0) {
    check_offsets(p, p.cu_seqlens_q, p.rows_q, p.max_queries);
    check_offsets(p, p.cu_seqlens_k, p.rows_k, INT_MAX);
  }
  const int tile = blockIdx.x, s = find_sequence(p.cu_seqlens_q, p.sequences, kQueryTile, tile);
  const int begin = p.cu_seqlens_q[s], first = begin + (tile - begin / kQueryTile - s) * kQueryTile;
  const int64_t end = min(static_cast<int64_t>(p.cu_seqlens_q[s + 1]), p.rows_q);
  if (first < 0 || first >= end) return;
  const int head = blockIdx.y * kStatsHeads + threadIdx.x / kRowLanes % kStatsHeads;
  if (head >= p.heads) return;
  constexpr int kStep = kStatsThreads / kRowLanes / kStatsHeads;
  float* const target = p.stats + (static_cast<int64_t>(head) * p.query_tiles + tile) * kStatsTile;
#pragma unroll 4
  for (int i = threadIdx.x / kRowLanes / kStatsHeads; i < kQueryTile; i += kStep) {
    const int row = first + i;
    float delta = 0.f, start = -INFINITY;  // behind the end: probability 0
    if (row < end) {
      const int64_t at = (static_cast<int64_t>(row) * p.heads + head) * kValueColumns + threadIdx.x % kRowLanes * 8;
      float x[8], y[8];
      unpack(load(p.out + at), x);
      unpack(load(p.dout + at), y);
#pragma unroll
      for (int j = 0; j < 8; ++j) delta = fmaf(x[j], y[j], delta);
      const float lse = p.lse[head * p.rows_q + row];
      if (lse != -INFINITY) start = -lse / p.scale;
    }
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, offset);
    if (threadIdx.x % kRowLanes == 0) {
      target[i] = start;
      target[kQueryTile + i] = -delta;
    }
  }
}

}  // namespace dsv3
