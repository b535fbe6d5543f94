// The end of a block and the beginning of the next: out = residual + sum_j y[:, j], h = rmsnorm(out) * weight.
//
// residual, out, h [T, H], y [T, S, H]; the sum is fp32, rounded once, slots in order. Latency-bound at few tokens: a block
// a token, a thread a vector of its row.
#include "../common/launch.cuh"
#include "../common/rmsnorm.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kThreads = 256, kVectors = 4;  // vectors of 8 a thread: rows of up to 8192
constexpr int kBatch = 3;                    // slots in flight

struct CombineParams {
  bf16 *out, *h;
  const bf16 *residual, *y, *weight;
  int hidden, slots;
  float eps;
};

__global__ void __launch_bounds__(kThreads) combine_norm_kernel(CombineParams p) {
  __shared__ float scratch[kThreads / kWarpSize];
  wait_for_inputs();
  release_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const bf16* const y = p.y + row * p.slots;
  float sum[kVectors][8], squares = 0.f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = (i * kThreads + threadIdx.x) * 8;
    if (column >= p.hidden) break;
    unpack(load(p.residual + row + column), sum[i]);
    for (int first = 0; first < p.slots; first += kBatch) {
      Vec<bf16> values[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j < p.slots) values[j] = load(y + static_cast<int64_t>(first + j) * p.hidden + column);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= p.slots) continue;
        float x[8];
        unpack(values[j], x);
#pragma unroll
        for (int k = 0; k < 8; ++k) sum[i][k] += x[k];
      }
    }
    Vec<bf16> rounded;
    pack(sum[i], rounded);
    store(p.out + row + column, rounded);
    unpack(rounded, sum[i]);
    squares = add_squares(sum[i], squares);
  }
  const float rstd = rsqrtf(block_reduce<Sum, kThreads>(squares, scratch) / p.hidden + p.eps);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int column = (i * kThreads + threadIdx.x) * 8;
    if (column >= p.hidden) break;
    float factors[8];
    unpack(load(p.weight + column), factors);
    normalise(sum[i], rstd, factors);
    Vec<bf16> rounded;
    pack(sum[i], rounded);
    store(p.h + row + column, rounded);
  }
}

}  // namespace

void combine_norm(Tensor out, Tensor h, Tensor residual, Tensor y, Tensor weight, double eps, cudaStream_t stream) {
  check_operand("residual", residual, Dtype::kBFloat16);
  DSV3_CHECK(residual.dim() == 2 && y.dim() == 3,
             "residual must be (tokens, hidden) and y (tokens, slots, hidden), got ", residual, " and ", y);
  const int64_t tokens = residual.size(0), hidden = residual.size(1);
  check_operand("y", y, Dtype::kBFloat16, tokens, y.size(1), hidden);
  check_operand("out", out, Dtype::kBFloat16, tokens, hidden);
  check_operand("h", h, Dtype::kBFloat16, tokens, hidden);
  check_operand("weight", weight, Dtype::kBFloat16, hidden);
  DSV3_CHECK(hidden % 8 == 0 && hidden <= kThreads * kVectors * 8, "hidden must be a multiple of 8 up to ",
             kThreads * kVectors * 8, ", got ", hidden);
  const DeviceGuard guard(residual);
  const CombineParams p{.out = out.data<bf16>(),
                        .h = h.data<bf16>(),
                        .residual = residual.data<bf16>(),
                        .y = y.data<bf16>(),
                        .weight = weight.data<bf16>(),
                        .hidden = static_cast<int>(hidden),
                        .slots = static_cast<int>(y.size(1)),
                        .eps = static_cast<float>(eps)};
  launch("combine_norm", combine_norm_kernel, {.grid = dim3(tokens), .block = dim3(kThreads)}, stream, p);
}

}  // namespace dsv3
