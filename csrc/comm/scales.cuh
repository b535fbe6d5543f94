// What comes behind a dispatch in FP8: the scales, which land row by row, in their order.
#pragma once

#include "rows.cuh"

namespace dsv3::dispatching {

// x_sf[row, tile] = sf[row, tile] with strides (1, sf_stride) and (padded_tiles, 1): written row by row each scale would fill a
// sector of its own. A warp takes a few tiles of 32 rows at a time, a row a lane: at the sizes of models it reads whole sectors
// and writes whole lines, and no warp waits for another.
constexpr int kScaleThreads = 1024, kScaleVectors = 4;
template <class Far>  // of those for which it is compiled
__global__ void __launch_bounds__(kScaleThreads)
    order_scales_kernel(float* x_sf, int64_t sf_stride, const float* sf, const int* total, int num_rows, int tiles) {
  wait_for_inputs();
  const int rows = min(*total, num_rows), vectors = padded_tiles(tiles) / 4;
  const int parts = ceil_div(vectors, kScaleVectors), jobs = ceil_div(rows, kWarpSize) * parts;
  const int lane = threadIdx.x % kWarpSize, warps = gridDim.x * kScaleThreads / kWarpSize;
  for (int job = (blockIdx.x * kScaleThreads + threadIdx.x) / kWarpSize; job < jobs; job += warps) {
    const int row = job / parts * kWarpSize + lane, first = job % parts * kScaleVectors;
    if (row >= rows) continue;
    const float4* const from = reinterpret_cast<const float4*>(sf) + static_cast<int64_t>(row) * vectors + first;
    float4 four[kScaleVectors];
#pragma unroll
    for (int i = 0; i < kScaleVectors; ++i) {
      if (first + i < vectors) four[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < kScaleVectors; ++i) {
      const float values[4] = {four[i].x, four[i].y, four[i].z, four[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int tile = (first + i) * 4 + j;
        if (tile < tiles) x_sf[tile * sf_stride + row] = values[j];
      }
    }
  }
}

}  // namespace dsv3::dispatching
