// What comes behind a dispatch in FP8: the scales, which land row by row, in their order.
#pragma once

#include "rows.cuh"

namespace dsv3::dispatching {

// x_sf[row, tile] = sf[row, tile] with strides (1, sf_stride) and (padded_tiles, 1): written row by row each scale would fill a
// sector of its own.
constexpr int kScaleRows = 128, kScaleThreads = 1024;
template <class Far>  // of those for which it is compiled
__global__ void __launch_bounds__(kScaleThreads)
    order_scales_kernel(float* x_sf, int64_t sf_stride, const float* sf, const int* total, int num_rows, int tiles) {
  extern __shared__ float block[];  // [padded tiles][kScaleRows + 1]
  wait_for_inputs();
  const int rows = min(*total, num_rows);
  for (int first = blockIdx.x * kScaleRows; first < rows; first += gridDim.x * kScaleRows) {
    const int count = min(kScaleRows, rows - first);
    const int vectors = padded_tiles(tiles) / 4;
    for (int i = threadIdx.x; i < count * vectors; i += kScaleThreads) {
      const int row = i / vectors, tile = i % vectors * 4;
      const float4 four = reinterpret_cast<const float4*>(sf)[static_cast<int64_t>(first) * vectors + i];
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) block[(tile + j) * (kScaleRows + 1) + row] = values[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kScaleRows * tiles; i += kScaleThreads) {
      const int row = i % kScaleRows, tile = i / kScaleRows;
      if (row < count) x_sf[tile * sf_stride + first + row] = block[tile * (kScaleRows + 1) + row];
    }
    __syncthreads();
  }
}

}  // namespace dsv3::dispatching
