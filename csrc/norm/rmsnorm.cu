// RMSNorm over the last dimension, forward and backward, with the residual add of a transformer block fused into both;
// and a forward whose output leaves in e4m3 tiles of 1 x 128.
//
//   r = x + residual (rounded to the dtype of x);  rstd_t = 1 / sqrt(mean_h r^2 + eps);  y = r * rstd * weight
//   xhat = r * rstd;  dr = rstd * (w*dy - xhat * mean_h(w*dy*xhat)) + dr_out;  dweight = sum_t dy * xhat
//
// Memory-bound: forward moves x and y once (4 bytes a bf16 element; 8 with the residual; 3 and 7 with y in e4m3),
// backward dy, r and dx once (6; 8). A row stays in registers between the reduction and the write. With the cast, y is
// rounded as it would have been stored, and a tile lies in neighbouring lanes. In the backward a block keeps the fp32
// sums of dweight for its columns over all of its rows, so that only one partial row a multiprocessor reaches memory; a
// second, small kernel adds the partial rows in order. No atomics: results do not change from run to run.
#include "../common/e4m3.cuh"
#include "../common/launch.cuh"
#include "../common/rmsnorm.cuh"
#include "../common/vector.cuh"
#include "../hopper/bulk.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

struct ForwardParams {
  void* y;               // null: not wanted beside the cast
  void* residual_out;    // null: no residual
  float* rstd;           // [T]
  const void* x;         // [T, H]
  const void* residual;  // null: no residual
  const void* weight;    // [H]
  int hidden;
  float eps;
  RowCasts casts;  // where kCast
};

// One block a row; thread i holds vectors i, i + kThreads, ...
template <class T, int kThreads, int kVecs, bool kCast>
__global__ void __launch_bounds__(kThreads) forward_kernel(ForwardParams p) {
  __shared__ float scratch[kThreads / kWarpSize];
  wait_for_inputs();
  release_dependents();
  constexpr int kSize = Vec<T>::kSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const int vecs = p.hidden / kSize;

  Vec<T> x[kVecs], residual[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * kThreads;
    if (v >= vecs) continue;
    x[i] = load(static_cast<const T*>(p.x) + row + v * kSize);
    if (p.residual) residual[i] = load(static_cast<const T*>(p.residual) + row + v * kSize);
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * kThreads;
    if (v >= vecs) continue;
    float values[kSize];
    unpack(x[i], values);
    if (p.residual) {
      float addends[kSize];
      unpack(residual[i], addends);
#pragma unroll
      for (int j = 0; j < kSize; ++j) values[j] += addends[j];
      pack(values, x[i]);
      store(static_cast<T*>(p.residual_out) + row + v * kSize, x[i]);
      unpack(x[i], values);  // what is normalised is the rounded sum
    }
    sum = add_squares(values, sum);
  }
  const float mean = block_reduce<Sum, kThreads>(sum, scratch) / p.hidden;
  const float rstd = rsqrtf(mean + p.eps);
  if (threadIdx.x == 0) p.rstd[blockIdx.x] = rstd;
  Pack<T> rounded[kVecs] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * kThreads;
    if (v >= vecs) continue;
    const Vec<T> weight = load(static_cast<const T*>(p.weight) + v * kSize);
    float values[kSize], weights[kSize];
    unpack(x[i], values);
    unpack(weight, weights);
    normalise(values, rstd, weights);
    pack(values, x[i]);
    if (!kCast || p.y) store(static_cast<T*>(p.y) + row + v * kSize, x[i]);
    rounded[i] = as_pack(x[i]);
  }
  if constexpr (kCast) cast_packs(p.casts, rounded, blockIdx.x, p.hidden, threadIdx.x, kThreads, vecs);
}

struct BackwardParams {
  void* dx;               // [T, H]
  float* partial;         // [blocks, H]
  const void* dy;         // [T, H]
  const void* dresidual;  // [T, H] or null: gradient of r itself, added to dx
  const void* x;          // [T, H]: r, the normalised tensor
  const void* weight;     // [H]
  const float* rstd;      // [T]
  int64_t tokens;
  int hidden;
  int stages;
};

constexpr int kMaxStages = 8;
constexpr int kRingBytes = 200 * 1024;

// A block walks over groups of kRows neighbouring rows with the stride of the grid, kRowThreads threads a row. The rows
// of the next groups arrive in a ring of stages in shared memory meanwhile: [dy | x | dresidual], kRows rows each.
template <class T, int kRowThreads, int kRows, int kVecs>
__global__ void __launch_bounds__(kRowThreads* kRows, 1) backward_kernel(BackwardParams p) {
  constexpr int kSize = Vec<T>::kSize;
  constexpr int kRowWarps = kRowThreads / kWarpSize;
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t barriers[kMaxStages];
  TransactionBarrier* const full = reinterpret_cast<TransactionBarrier*>(barriers);
  __shared__ float scratch[2][kRows][kRowWarps];
  const int lane = threadIdx.x % kRowThreads;
  const int group = threadIdx.x / kRowThreads;
  const int vecs = p.hidden / kSize;
  const int tensor_bytes = kRows * p.hidden * static_cast<int>(sizeof(T));
  const int tensors = p.dresidual ? 3 : 2;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRows;
  const auto request = [&](int64_t first, int stage) {
    if (first >= p.tokens) return;
    uint8_t* const base = ring + stage * tensors * tensor_bytes;
    const int64_t rows = p.tokens - first;
    const int bytes = rows < kRows ? static_cast<int>(rows) * p.hidden * static_cast<int>(sizeof(T)) : tensor_bytes;
    full[stage].arrive_and_expect_tx(bytes * tensors);
    bulk_load(base, static_cast<const T*>(p.dy) + first * p.hidden, bytes, full[stage]);
    bulk_load(base + tensor_bytes, static_cast<const T*>(p.x) + first * p.hidden, bytes, full[stage]);
    if (p.dresidual) {
      bulk_load(base + 2 * tensor_bytes, static_cast<const T*>(p.dresidual) + first * p.hidden, bytes, full[stage]);
    }
  };

  if (threadIdx.x == 0) init_barriers(full, p.stages);
  __syncthreads();
  wait_for_inputs();
  release_dependents();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < p.stages; ++stage)
      request(blockIdx.x * static_cast<int64_t>(kRows) + stage * stride, stage);
  }
  Vec<T> weight[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = lane + i * kRowThreads;
    if (v < vecs) weight[i] = load(static_cast<const T*>(p.weight) + v * kSize);
  }
  const auto load_rstd = [&](int64_t t) { return t < p.tokens ? p.rstd[t] : 0.f; };

  float dweight[kVecs][kSize] = {};
  const float inverse_hidden = 1.f / p.hidden;
  int stage = 0, phase = 0,
      parity = 0;  // counted, not divided out: 64-bit divisions cost more than the row's arithmetic
  int64_t first = blockIdx.x * static_cast<int64_t>(kRows);
  float next_rstd = load_rstd(first + group);
  for (; first < p.tokens; first += stride, parity ^= 1) {
    const int64_t t = first + group;
    const bool live = t < p.tokens;
    const T* const rows = reinterpret_cast<const T*>(ring + stage * tensors * tensor_bytes) + group * p.hidden;
    const float rstd = next_rstd;
    next_rstd = load_rstd(t + stride);
    full[stage].wait(phase);
    Vec<T> x[kVecs], dy[kVecs], residual[kVecs] = {};
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int v = lane + i * kRowThreads;
      if (!live || v >= vecs) continue;
      dy[i] = load(rows + v * kSize);
      x[i] = load(rows + kRows * p.hidden + v * kSize);
      if (p.dresidual) residual[i] = load(rows + 2 * kRows * p.hidden + v * kSize);
      float values[kSize], grads[kSize], weights[kSize];
      unpack(x[i], values);
      unpack(dy[i], grads);
      unpack(weight[i], weights);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float product = grads[j] * values[j] * rstd;
        dweight[i][j] += product;
        dot += product * weights[j];
      }
    }
    dot = warp_reduce<Sum>(dot);
    if (lane % kWarpSize == 0) scratch[parity][group][lane / kWarpSize] = dot;
    __syncthreads();
    // Every thread holds its part of this stage in registers.
    if (threadIdx.x == 0) request(first + p.stages * stride, stage);
    if (++stage == p.stages) stage = 0, phase ^= 1;
    dot = 0.f;
#pragma unroll
    for (int w = 0; w < kRowWarps; ++w) dot += scratch[parity][group][w];
    const float mean = dot * inverse_hidden;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int v = lane + i * kRowThreads;
      if (!live || v >= vecs) continue;
      float values[kSize], grads[kSize], weights[kSize], addends[kSize];
      unpack(x[i], values);
      unpack(dy[i], grads);
      unpack(weight[i], weights);
      unpack(residual[i], addends);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        values[j] = rstd * (weights[j] * grads[j] - values[j] * rstd * mean) + addends[j];
      }
      pack(values, x[i]);
      store(static_cast<T*>(p.dx) + t * p.hidden + v * kSize, x[i]);
    }
  }

  // The groups add their sums in order, in the ring, which is free now; the last one writes the block's row. By 16
  // bytes: single floats would lie a vector apart, each in a sector of its own (7 us of 73 at 4096 x 7168 on an H100).
  float* const combined = reinterpret_cast<float*>(ring);
  float* const row = p.partial + static_cast<int64_t>(blockIdx.x) * p.hidden;
  for (int g = 0; g < kRows; ++g) {
    __syncthreads();
    if (group != g) continue;
    float* const target = g == kRows - 1 ? row : combined;
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int v = lane + i * kRowThreads;
      if (v >= vecs) continue;
#pragma unroll
      for (int j = 0; j < kSize; j += 4) {
        float4 sum = {dweight[i][j], dweight[i][j + 1], dweight[i][j + 2], dweight[i][j + 3]};
        if (g > 0) {
          const float4 before = reinterpret_cast<const float4&>(combined[v * kSize + j]);
          sum = {before.x + sum.x, before.y + sum.y, before.z + sum.z, before.w + sum.w};
        }
        reinterpret_cast<float4&>(target[v * kSize + j]) = sum;
      }
    }
  }
}

constexpr int kReduceWarps = 8;
constexpr int kReduceRows = 17;  // loads of a warp in flight: all of its share of 132 rows

// dweight[h] = sum over the partial rows, in an order that depends on their number alone. 32 columns a block.
__global__ void __launch_bounds__(kReduceWarps* kWarpSize)
    reduce_kernel(float* dweight, const float* partial, int rows, int hidden) {
  __shared__ float sums[kReduceWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int column = blockIdx.x * kWarpSize + lane;
  wait_for_inputs();
  release_dependents();
  float sum = 0.f;
  for (int base = warp; base < rows; base += kReduceRows * kReduceWarps) {
    float values[kReduceRows];
#pragma unroll
    for (int i = 0; i < kReduceRows; ++i) {
      const int r = base + i * kReduceWarps;
      values[i] = r < rows && column < hidden ? partial[static_cast<int64_t>(r) * hidden + column] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < kReduceRows; ++i) sum += values[i];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= hidden) return;
  for (int w = 1; w < kReduceWarps; ++w) sum += sums[w][lane];
  dweight[column] = sum;
}

template <class T, bool kCast>
void launch_forward(const ForwardParams& p, int64_t tokens, cudaStream_t stream) {
  const int vecs = p.hidden / Vec<T>::kSize;
  const auto run = [&](auto kernel, int threads) {
    launch(kCast ? "rmsnorm_cast" : "rmsnorm", kernel, {.grid = dim3(tokens), .block = dim3(threads)}, stream, p);
  };
  if (vecs <= 64) return run(forward_kernel<T, 64, 1, kCast>, 64);
  if (vecs <= 128) return run(forward_kernel<T, 128, 1, kCast>, 128);
  if (vecs <= 256) return run(forward_kernel<T, 128, 2, kCast>, 128);
  if (vecs <= 512) return run(forward_kernel<T, 128, 4, kCast>, 128);
  if (vecs <= 1024) return run(forward_kernel<T, 256, 4, kCast>, 256);
  return run(forward_kernel<T, 512, 4, kCast>, 512);
}

template <class T>
void launch_backward(BackwardParams p, int blocks, cudaStream_t stream) {
  constexpr int kThreads = 512;
  const int vecs = p.hidden / Vec<T>::kSize;
  const auto run = [&](auto kernel, int rows) {
    const int stage = (p.dresidual ? 3 : 2) * rows * p.hidden * static_cast<int>(sizeof(T));
    p.stages = std::min(kMaxStages, kRingBytes / stage);
    const size_t smem = std::max<size_t>(p.stages * stage, p.hidden * sizeof(float));
    launch("rmsnorm_backward", kernel, {.grid = dim3(blocks), .block = dim3(kThreads), .smem = smem}, stream, p);
  };
  if (vecs <= 64) return run(backward_kernel<T, 64, 8, 1>, 8);
  if (vecs <= 128) return run(backward_kernel<T, 128, 4, 1>, 4);
  if (vecs <= 256) return run(backward_kernel<T, 256, 2, 1>, 2);
  if (vecs <= 512) return run(backward_kernel<T, 512, 1, 1>, 1);
  if (vecs <= 1024) return run(backward_kernel<T, 512, 1, 2>, 1);
  return run(backward_kernel<T, 512, 1, 4>, 1);
}

constexpr int kMaxVecs = 2048;  // vectors of 16 bytes in a row: hidden <= 16384 in bf16, 8192 in fp32

template <class T>
void check_hidden(int64_t hidden) {
  DSV3_CHECK(hidden > 0 && hidden % Vec<T>::kSize == 0 && hidden / Vec<T>::kSize <= kMaxVecs,
             "hidden must be a positive multiple of ", Vec<T>::kSize, " and at most ", kMaxVecs * Vec<T>::kSize,
             ", got ", hidden);
}

// Checks what the forward ops share.
ForwardParams forward_params(const std::optional<Tensor>& y, const std::optional<Tensor>& residual_out,
                             const Tensor& rstd, const Tensor& x, const std::optional<Tensor>& residual,
                             const Tensor& weight, double eps) {
  DSV3_CHECK(x.dim() == 2, "x must be (tokens, hidden), got ", x);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_operand("x", x, x.dtype());
  if (y) check_operand("y", *y, x.dtype(), tokens, hidden);
  check_operand("weight", weight, x.dtype(), hidden);
  check_operand("rstd", rstd, Dtype::kFloat32, tokens);
  DSV3_CHECK(residual.has_value() == residual_out.has_value(), "residual and residual_out go together");
  if (residual) check_operand("residual", *residual, x.dtype(), tokens, hidden);
  if (residual) check_operand("residual_out", *residual_out, x.dtype(), tokens, hidden);
  return {.y = y ? y->data<void>() : nullptr,
          .residual_out = residual ? residual_out->data<void>() : nullptr,
          .rstd = rstd.data<float>(),
          .x = x.data<void>(),
          .residual = residual ? residual->data<void>() : nullptr,
          .weight = weight.data<void>(),
          .hidden = static_cast<int>(hidden),
          .eps = static_cast<float>(eps),
          .casts = {}};
}

}  // namespace

void rmsnorm(Tensor y, std::optional<Tensor> residual_out, Tensor rstd, Tensor x, std::optional<Tensor> residual,
             Tensor weight, double eps, cudaStream_t stream) {
  const ForwardParams params = forward_params(y, residual_out, rstd, x, residual, weight, eps);
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    check_hidden<T>(params.hidden);
    launch_forward<T, false>(params, x.size(0), stream);
  });
}

void rmsnorm_cast(Tensor y_fp8, Tensor y_sf, std::optional<Tensor> y, std::optional<Tensor> residual_out, Tensor rstd,
                  Tensor x, std::optional<Tensor> residual, Tensor weight, double eps, bool pow2_scale,
                  double amax_floor, cudaStream_t stream) {
  ForwardParams params = forward_params(y, residual_out, rstd, x, residual, weight, eps);
  params.casts = row_casts("y_fp8", y_fp8, "y_sf", y_sf, x.size(0), x.size(1), scale_rule(amax_floor, pow2_scale));
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    check_hidden<T>(params.hidden);
    launch_forward<T, true>(params, x.size(0), stream);
  });
}

void rmsnorm_backward(Tensor dx, Tensor dweight, Tensor partial, Tensor dy, std::optional<Tensor> dresidual, Tensor x,
                      Tensor weight, Tensor rstd, cudaStream_t stream) {
  DSV3_CHECK(x.dim() == 2, "x must be (tokens, hidden), got ", x);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  check_operand("x", x, x.dtype());
  check_operand("dy", dy, x.dtype(), tokens, hidden);
  check_operand("dx", dx, x.dtype(), tokens, hidden);
  check_operand("weight", weight, x.dtype(), hidden);
  check_operand("rstd", rstd, Dtype::kFloat32, tokens);
  check_operand("dweight", dweight, Dtype::kFloat32, hidden);
  check_operand("partial", partial, Dtype::kFloat32, partial.size(0), hidden);
  if (dresidual) check_operand("dresidual", *dresidual, x.dtype(), tokens, hidden);
  const DeviceGuard guard(x);
  const int blocks = static_cast<int>(partial.size(0));
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    check_hidden<T>(hidden);
    launch_backward<T>({.dx = dx.data<T>(),
                        .partial = partial.data<float>(),
                        .dy = dy.data<T>(),
                        .dresidual = dresidual ? dresidual->data<T>() : nullptr,
                        .x = x.data<T>(),
                        .weight = weight.data<T>(),
                        .rstd = rstd.data<float>(),
                        .tokens = tokens,
                        .hidden = static_cast<int>(hidden)},
                       blocks, stream);
  });
  launch("rmsnorm_backward", reduce_kernel,
         {.grid = dim3((hidden + kWarpSize - 1) / kWarpSize), .block = dim3(kReduceWarps * kWarpSize)}, stream,
         dweight.data<float>(), partial.data<float>(), blocks, static_cast<int>(hidden));
}

}  // namespace dsv3
