// SwiGLU (swiglu.cuh), forward and backward; and both with their output in e4m3 tiles of 1 x 128.
//
// Memory-bound: forward moves 3 values an output, backward 5; with the cast 5 bytes an output of bf16 instead of 6, and 8
// instead of 10. One block a row (forward, a piece of a long row, or several short ones); the backward's row sum is a block
// reduction in a fixed order. With the cast, values are rounded as they would have been stored, a tile lies in neighbouring
// lanes, and rows past offsets[G] are left alone.
#include <climits>

#include "../common/e4m3.cuh"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"
#include "../quant/both_casts.cuh"
#include "swiglu.cuh"

namespace dsv3 {
namespace {

struct SwigluParams {
  void* out;             // [T, I]; backward: dgate_up [T, 2I]; unless kCast
  float* dweights;       // backward: [T] or null
  const void* dout;      // backward: [T, I]
  const void* gate_up;   // [T, 2I]
  const float* weights;  // [T] or null
  int rows;              // T
  int inner;             // I
  int pieces;            // blocks a row, unless a block takes several
  const int* end;        // where kCast: row from which on there is nothing, or null
  RowCasts casts;        // where kCast: of out
};

// A thread's row and the first of its vectors there, of which the others follow kThreads apart. Rows that are shorter than a
// block (kShort) lie one behind the other, so that few threads are idle.
struct Share {
  int row, first;
};
template <int kThreads, int kVecs, bool kShort>
__device__ __forceinline__ Share share(int vecs, int pieces) {
  const int block = blockIdx.x, thread = threadIdx.x;
  static_assert(!kShort || kVecs == 1);
  if (!kShort) return {block / pieces, block % pieces * (kThreads * kVecs) + thread};
  const int v = block * kThreads + thread;
  return {v / vecs, v % vecs};
}

template <class T, int kThreads, int kVecs, bool kShort, bool kCast>
__global__ void __launch_bounds__(kThreads, 2048 / kThreads) swiglu_kernel(SwigluParams p) {
  constexpr int kSize = Vec<T>::kSize;
  wait_for_inputs();
  release_dependents();
  const auto [row, first] = share<kThreads, kVecs, kShort>(p.inner / kSize, p.pieces);
  // Whole warps cast, so of rows that there are not a lane stays where another's row is one.
  const bool live = (!kShort || row < p.rows) && !(kCast && p.end && row >= *p.end);
  if (kShort ? !__any_sync(0xffffffffu, live) : !live) return;
  const int vecs = !kShort || live ? p.inner / kSize : 0;
  const int64_t t = row;
  const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * p.inner;
  const float weight = p.weights && (!kShort || live) ? p.weights[t] : 1.f;
  Vec<T> g[kVecs], u[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = first + i * kThreads;
    if (v >= vecs) continue;
    g[i] = load(gate + v * kSize);
    u[i] = load(gate + p.inner + v * kSize);
  }
  Pack<T> rounded[kVecs] = {};
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = first + i * kThreads;
    if (v >= vecs) continue;
    float gs[kSize], us[kSize];
    unpack(g[i], gs);
    unpack(u[i], us);
#pragma unroll
    for (int j = 0; j < kSize; ++j) gs[j] = swiglu_value(gs[j], us[j], weight);
    pack(gs, g[i]);
    if constexpr (kCast) {
      rounded[i] = as_pack(g[i]);
    } else {
      store(static_cast<T*>(p.out) + t * p.inner + v * kSize, g[i]);
    }
  }
  if constexpr (kCast) cast_packs(p.casts, rounded, t, p.inner, first, kThreads, vecs);
}

template <class T, int kThreads, bool kCast>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluParams p) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ float scratch[kThreads / kWarpSize];
  wait_for_inputs();
  release_dependents();
  const int64_t t = blockIdx.x;
  if (kCast && p.end && t >= *p.end) return;
  const int vecs = p.inner / kSize;
  const T* const gate = static_cast<const T*>(p.gate_up) + t * 2 * p.inner;
  T* const dgate = static_cast<T*>(p.out) + t * 2 * p.inner;
  const float weight = p.weights ? p.weights[t] : 1.f;
  float sum = 0.f;
  // The cast goes round with whole warps: inner is whole tiles then, but the last ones may not fill a warp.
  const int lane = kCast ? threadIdx.x % kWarpSize : 0;
  for (int v = threadIdx.x; v - lane < vecs; v += kThreads) {
    Pack<T> rounded[2] = {};
    if (v < vecs) {
      Vec<T> g = load(gate + v * kSize);
      Vec<T> u = load(gate + p.inner + v * kSize);
      const Vec<T> dout = load(static_cast<const T*>(p.dout) + t * p.inner + v * kSize);
      float gs[kSize], us[kSize], ds[kSize];
      unpack(g, gs);
      unpack(u, us);
      unpack(dout, ds);
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const SwigluGradient gradient = swiglu_gradient(ds[j], gs[j], us[j], weight, sum);
        gs[j] = gradient.dg;
        us[j] = gradient.du;
      }
      pack(gs, g);
      pack(us, u);
      if constexpr (!kCast) {
        store(dgate + v * kSize, g);
        store(dgate + p.inner + v * kSize, u);
      }
      rounded[0] = as_pack(g);
      rounded[1] = as_pack(u);
    }
    if constexpr (kCast) {
      cast_packs(p.casts, rounded, t, 2 * p.inner, v < vecs ? v : v + 2 * vecs, vecs, 2 * vecs);
    }
  }
  if (p.dweights == nullptr) return;
  sum = block_reduce<Sum, kThreads>(sum, scratch);
  if (threadIdx.x == 0) p.dweights[t] = sum;
}

// Where the last group ends.
const int* end_of_groups(const std::optional<Tensor>& offsets, const Tensor& gate_up) {
  const Groups groups = check_groups(offsets, gate_up.size(0));
  return offsets ? groups.offsets + groups.count : nullptr;
}

template <bool kCast>
void launch_swiglu(SwigluParams p, const Tensor& gate_up, cudaStream_t stream) {
  visit_float("gate_up", gate_up.dtype(), [&](auto zero) {
    using T = decltype(zero);
    DSV3_CHECK(p.inner % Vec<T>::kSize == 0, "inner must be a multiple of ", Vec<T>::kSize, ", got ", p.inner);
    const int64_t vecs = p.inner / Vec<T>::kSize, all = vecs * p.rows;
    const auto run = [&](auto kernel, int threads, int64_t blocks) {
      launch(kCast ? "swiglu_cast" : "swiglu", kernel, {.grid = dim3(blocks), .block = dim3(threads)}, stream, p);
    };
    // A tile of the cast lies in neighbouring lanes, so rows that follow one another must be whole tiles.
    if (vecs < 256 && (!kCast || p.inner % kTile == 0) && all <= INT_MAX - 256) {
      return run(swiglu_kernel<T, 256, 1, true, kCast>, 256, ceil_div(all, 256));
    }
    p.pieces = static_cast<int>(ceil_div(vecs, 256));
    run(swiglu_kernel<T, 128, 2, false, kCast>, 128, int64_t{p.rows} * p.pieces);
  });
}

template <bool kCast>
void launch_swiglu_backward(const SwigluParams& p, const Tensor& gate_up, cudaStream_t stream) {
  visit_float("gate_up", gate_up.dtype(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int kMultiple = kCast ? kTile : Vec<T>::kSize;  // a tile must not have values of both halves
    DSV3_CHECK(p.inner % kMultiple == 0, "inner must be a multiple of ", kMultiple, ", got ", p.inner);
    const auto run = [&](auto kernel, int threads) {
      launch(kCast ? "swiglu_cast_backward" : "swiglu_backward", kernel,
             {.grid = dim3(gate_up.size(0)), .block = dim3(threads)}, stream, p);
    };
    if (p.inner / Vec<T>::kSize <= 64) return run(swiglu_backward_kernel<T, 64, kCast>, 64);
    return run(swiglu_backward_kernel<T, 256, kCast>, 256);
  });
}

// Checks what both backward ops share.
SwigluParams backward_params(const std::optional<Tensor>& dweights, const Tensor& dout, const Tensor& gate_up,
                             const std::optional<Tensor>& weights) {
  const int64_t inner = check_swiglu(gate_up, weights);
  check_operand("dout", dout, gate_up.dtype(), gate_up.size(0), inner);
  if (dweights) check_operand("dweights", *dweights, Dtype::kFloat32, gate_up.size(0));
  return {.dweights = dweights ? dweights->data<float>() : nullptr,
          .dout = dout.data<void>(),
          .gate_up = gate_up.data<void>(),
          .weights = weights ? weights->data<float>() : nullptr,
          .rows = static_cast<int>(gate_up.size(0)),
          .inner = static_cast<int>(inner)};
}

}  // namespace

void swiglu(Tensor out, Tensor gate_up, std::optional<Tensor> weights, cudaStream_t stream) {
  const int64_t inner = check_swiglu(gate_up, weights);
  check_operand("out", out, gate_up.dtype(), gate_up.size(0), inner);
  const DeviceGuard guard(out);
  launch_swiglu<false>({.out = out.data<void>(),
                        .gate_up = gate_up.data<void>(),
                        .weights = weights ? weights->data<float>() : nullptr,
                        .rows = static_cast<int>(gate_up.size(0)),
                        .inner = static_cast<int>(inner)},
                       gate_up, stream);
}

void swiglu_cast(Tensor out_fp8, Tensor out_sf, Tensor gate_up, std::optional<Tensor> weights,
                 std::optional<Tensor> offsets, bool pow2_scale, double amax_floor, cudaStream_t stream) {
  const int64_t inner = check_swiglu(gate_up, weights);
  const ScaleRule rule = scale_rule(amax_floor, pow2_scale);
  const DeviceGuard guard(out_fp8);
  launch_swiglu<true>({.gate_up = gate_up.data<void>(),
                       .weights = weights ? weights->data<float>() : nullptr,
                       .rows = static_cast<int>(gate_up.size(0)),
                       .inner = static_cast<int>(inner),
                       .end = end_of_groups(offsets, gate_up),
                       .casts = row_casts("out_fp8", out_fp8, "out_sf", out_sf, gate_up.size(0), inner, rule)},
                      gate_up, stream);
}

void swiglu_backward(Tensor dgate_up, std::optional<Tensor> dweights, Tensor dout, Tensor gate_up,
                     std::optional<Tensor> weights, cudaStream_t stream) {
  SwigluParams params = backward_params(dweights, dout, gate_up, weights);
  check_operand("dgate_up", dgate_up, gate_up.dtype(), gate_up.size(0), gate_up.size(1));
  params.out = dgate_up.data<void>();
  const DeviceGuard guard(dout);
  launch_swiglu_backward<false>(params, gate_up, stream);
}

void swiglu_cast_backward(Tensor dgate_up_fp8, Tensor dgate_up_sf, std::optional<Tensor> dweights, Tensor dout,
                          Tensor gate_up, std::optional<Tensor> weights, std::optional<Tensor> offsets, bool pow2_scale,
                          double amax_floor, cudaStream_t stream) {
  SwigluParams params = backward_params(dweights, dout, gate_up, weights);
  params.end = end_of_groups(offsets, gate_up);
  params.casts = row_casts("dgate_up_fp8", dgate_up_fp8, "dgate_up_sf", dgate_up_sf, gate_up.size(0), gate_up.size(1),
                           scale_rule(amax_floor, pow2_scale));
  const DeviceGuard guard(dout);
  launch_swiglu_backward<true>(params, gate_up, stream);
}

}  // namespace dsv3
