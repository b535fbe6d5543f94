// SwiGLU of fused gate and up projections, times an optional routing weight a row, forward and backward.
//
//   out = silu(g) * u * w,   g = gate_up[:, :I], u = gate_up[:, I:],   silu(g) = g * s, s = 1 / (1 + exp(-g))
//   dg = dout * w * u * s * (1 + g * (1 - s)),   du = dout * w * silu(g),   dw = sum_i dout * silu(g) * u
//
// Memory-bound: forward moves 3 values an output, backward 5. One block a row (and, forward, a piece of a long row);
// the backward's row sum is a block reduction in a fixed order.
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

struct SwigluParams {
  void* out;             // [T, I]; backward: dgate_up [T, 2I]
  float* dweights;       // backward: [T] or null
  const void* dout;      // backward: [T, I]
  const void* gate_up;   // [T, 2I]
  const float* weights;  // [T] or null
  int inner;             // I
  int pieces;            // blocks a row
};

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <class T, int kThreads, int kVecs>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluParams p) {
  constexpr int kSize = Vec<T>::kSize;
  wait_for_inputs();
  release_dependents();
  const int64_t t = blockIdx.x / p.pieces;
  const int first = (blockIdx.x % p.pieces) * (kThreads * kVecs) + threadIdx.x;
  const int vecs = p.inner / kSize;
  const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * p.inner;
  const float weight = p.weights ? p.weights[t] : 1.f;
  Vec<T> g[kVecs], u[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = first + i * kThreads;
    if (v >= vecs) continue;
    g[i] = load(gate + v * kSize);
    u[i] = load(gate + p.inner + v * kSize);
  }
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = first + i * kThreads;
    if (v >= vecs) continue;
    float gs[kSize], us[kSize];
    unpack(g[i], gs);
    unpack(u[i], us);
#pragma unroll
    for (int j = 0; j < kSize; ++j) gs[j] *= sigmoid(gs[j]) * us[j] * weight;
    pack(gs, g[i]);
    store(static_cast<T*>(p.out) + t * p.inner + v * kSize, g[i]);
  }
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluParams p) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ float scratch[kThreads / kWarpSize];
  wait_for_inputs();
  release_dependents();
  const int64_t t = blockIdx.x;
  const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * p.inner;
  T* const dgate = static_cast<T*>(p.out) + t * 2 * p.inner;
  const float weight = p.weights ? p.weights[t] : 1.f;
  float sum = 0.f;
  for (int v = threadIdx.x; v < p.inner / kSize; v += kThreads) {
    Vec<T> g = load(gate + v * kSize);
    Vec<T> u = load(gate + p.inner + v * kSize);
    const Vec<T> dout = load(static_cast<const T*>(p.dout) + t * p.inner + v * kSize);
    float gs[kSize], us[kSize], ds[kSize];
    unpack(g, gs);
    unpack(u, us);
    unpack(dout, ds);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float s = sigmoid(gs[j]), silu = gs[j] * s;
      sum += ds[j] * silu * us[j];
      gs[j] = ds[j] * weight * us[j] * s * (1.f + gs[j] * (1.f - s));
      us[j] = ds[j] * weight * silu;
    }
    pack(gs, g);
    pack(us, u);
    store(dgate + v * kSize, g);
    store(dgate + p.inner + v * kSize, u);
  }
  if (p.dweights == nullptr) return;
  sum = block_reduce<Sum, kThreads>(sum, scratch);
  if (threadIdx.x == 0) p.dweights[t] = sum;
}

// Checks what forward and backward share; narrow has I columns, gate_up 2I.
int64_t check_swiglu(const Tensor& narrow, const char* name, const Tensor& gate_up,
                     const std::optional<Tensor>& weights) {
  DSV3_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up must be (tokens, 2 * inner), got ", gate_up);
  check_operand("gate_up", gate_up, gate_up.dtype());
  check_operand(name, narrow, gate_up.dtype(), gate_up.size(0), gate_up.size(1) / 2);
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, gate_up.size(0));
  return gate_up.size(1) / 2;
}

template <class T>
void check_inner(int64_t inner) {
  DSV3_CHECK(inner % Vec<T>::kSize == 0, "inner must be a multiple of ", Vec<T>::kSize, ", got ", inner);
}

}  // namespace

void swiglu(Tensor out, Tensor gate_up, std::optional<Tensor> weights, cudaStream_t stream) {
  const int64_t inner = check_swiglu(out, "out", gate_up, weights);
  const DeviceGuard guard(out);
  visit_float("gate_up", gate_up.dtype(), [&](auto zero) {
    using T = decltype(zero);
    check_inner<T>(inner);
    const int vecs = static_cast<int>(inner / Vec<T>::kSize);
    const auto run = [&](auto kernel, int threads, int piece) {
      const int pieces = (vecs + piece - 1) / piece;
      const SwigluParams p{.out = out.data<T>(),
                           .gate_up = gate_up.data<T>(),
                           .weights = weights ? weights->data<float>() : nullptr,
                           .inner = static_cast<int>(inner),
                           .pieces = pieces};
      launch("swiglu", kernel, {.grid = dim3(out.size(0) * pieces), .block = dim3(threads)}, stream, p);
    };
    if (vecs <= 64) return run(swiglu_kernel<T, 64, 1>, 64, 64);
    return run(swiglu_kernel<T, 128, 2>, 128, 256);
  });
}

void swiglu_backward(Tensor dgate_up, std::optional<Tensor> dweights, Tensor dout, Tensor gate_up,
                     std::optional<Tensor> weights, cudaStream_t stream) {
  const int64_t inner = check_swiglu(dout, "dout", gate_up, weights);
  check_operand("dgate_up", dgate_up, gate_up.dtype(), gate_up.size(0), gate_up.size(1));
  if (dweights) check_operand("dweights", *dweights, Dtype::kFloat32, gate_up.size(0));
  const DeviceGuard guard(dout);
  visit_float("gate_up", gate_up.dtype(), [&](auto zero) {
    using T = decltype(zero);
    check_inner<T>(inner);
    const SwigluParams p{.out = dgate_up.data<T>(),
                         .dweights = dweights ? dweights->data<float>() : nullptr,
                         .dout = dout.data<T>(),
                         .gate_up = gate_up.data<T>(),
                         .weights = weights ? weights->data<float>() : nullptr,
                         .inner = static_cast<int>(inner)};
    const auto run = [&](auto kernel, int threads) {
      launch("swiglu_backward", kernel, {.grid = dim3(dout.size(0)), .block = dim3(threads)}, stream, p);
    };
    if (inner / Vec<T>::kSize <= 64) return run(swiglu_backward_kernel<T, 64>, 64);
    return run(swiglu_backward_kernel<T, 256>, 256);
  });
}

}  // namespace dsv3
