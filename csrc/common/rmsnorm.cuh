// The arithmetic of RMSNorm on a vector of a row, for all kernels that normalise: y = x * (rstd * weight), rstd = 1 / sqrt(
// mean x^2 + eps). Where their threads hold the same vectors, their results are the same bits.
#pragma once

#include "vector.cuh"

namespace dsv3 {

// sum + the squares of x, one after the other.
template <int kSize>
__device__ __forceinline__ float add_squares(const float (&x)[kSize], float sum) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) sum = __fmaf_rn(x[i], x[i], sum);
  return sum;
}

template <int kSize>
__device__ __forceinline__ void normalise(float (&x)[kSize], float rstd, const float (&weight)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] *= rstd * weight[i];
}

}  // namespace dsv3
