// SwiGLU of fused gate and up projections, times an optional routing weight a row, forward and backward; and both with
// their output in e4m3 tiles of 1 x 128.
//
//   out = silu(g) * u * w,   g = gate_up[:, :I], u = gate_up[:, I:],   silu(g) = g * s, s = 1 / (1 + exp(-g))
//   dg = dout * w * u * s * (1 + g * (1 - s)),   du = dout * w * silu(g),   dw = sum_i dout * silu(g) * u
//
// Memory-bound: forward moves 3 values an output, backward 5; with the cast 5 bytes an output of bf16 instead of 6, and 8
// instead of 10 (12 where the bf16 gradient is wanted too, 1 more where the forward output is). One block a row (and, forward, a piece of a long row); the
// backward's row sum is a block reduction in a fixed order. With the cast, values are rounded as they would have been
// stored, a tile lies in neighbouring lanes, and rows past offsets[G] are left alone.
#include "../common/e4m3.cuh"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

struct SwigluParams {
  void* out;             // [T, I]; backward: dgate_up [T, 2I], null where only the cast is wanted
  float* dweights;       // backward: [T] or null
  const void* dout;      // backward: [T, I]
  const void* gate_up;   // [T, 2I]
  const float* weights;  // [T] or null
  int inner;             // I
  int pieces;            // blocks a row
  const int* end;        // where kCast: row from which on there is nothing, or null
  RowCasts casts;        // where kCast: of out
  RowCasts again;        // Casts::kBoth: of the forward output
};

constexpr double kOutFloor = 1e-4;  // of the forward output's cast, made again: swiglu_cast's own default

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.f, 1.f + __expf(-x)); }

template <class T, int kThreads, int kVecs, bool kCast>
__global__ void __launch_bounds__(kThreads) swiglu_kernel(SwigluParams p) {
  constexpr int kSize = Vec<T>::kSize;
  wait_for_inputs();
  release_dependents();
  const int64_t t = blockIdx.x / p.pieces;
  if (kCast && p.end && t >= *p.end) return;
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
  Pack<T> rounded[kVecs] = {};
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
    if constexpr (kCast) {
      rounded[i] = as_pack(g[i]);
    } else {
      store(static_cast<T*>(p.out) + t * p.inner + v * kSize, g[i]);
    }
  }
  if constexpr (kCast) cast_packs(p.casts, rounded, t, p.inner, first, kThreads, vecs);
}

// What goes out in FP8: nothing, the gradient, or with it the forward output again. NOTE: a template argument, since what the
// last needs in registers, even where it was a branch not taken, cost the second a quarter of its bandwidth.
enum class Casts { kNone, kGradient, kBoth };

template <class T, int kThreads, Casts kCasts>
__global__ void __launch_bounds__(kThreads) swiglu_backward_kernel(SwigluParams p) {
  constexpr bool kCast = kCasts != Casts::kNone;
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
    [[maybe_unused]] Pack<T> again[1] = {};
    if (v < vecs) {
      Vec<T> g = load(gate + v * kSize);
      Vec<T> u = load(gate + p.inner + v * kSize);
      const Vec<T> dout = load(static_cast<const T*>(p.dout) + t * p.inner + v * kSize);
      float gs[kSize], us[kSize], ds[kSize];
      unpack(g, gs);
      unpack(u, us);
      unpack(dout, ds);
      if constexpr (kCasts == Casts::kBoth) {
        float out[kSize];
#pragma unroll
        for (int j = 0; j < kSize; ++j) out[j] = gs[j] * (sigmoid(gs[j]) * us[j] * weight);  // as the forward kernel
        Vec<T> packed;
        pack(out, packed);
        again[0] = as_pack(packed);
      }
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        const float s = sigmoid(gs[j]), silu = gs[j] * s;
        sum = __fmaf_rn(ds[j] * silu, us[j], sum);
        gs[j] = ds[j] * weight * us[j] * s * __fmaf_rn(gs[j], 1.f - s, 1.f);
        us[j] = ds[j] * weight * silu;
      }
      pack(gs, g);
      pack(us, u);
      if (!kCast || p.out) {
        store(dgate + v * kSize, g);
        store(dgate + p.inner + v * kSize, u);
      }
      rounded[0] = as_pack(g);
      rounded[1] = as_pack(u);
    }
    if constexpr (kCast) {
      cast_packs(p.casts, rounded, t, 2 * p.inner, v < vecs ? v : v + 2 * vecs, vecs, 2 * vecs);
      if constexpr (kCasts == Casts::kBoth) cast_packs(p.again, again, t, p.inner, v, vecs, vecs);
    }
  }
  if (p.dweights == nullptr) return;
  sum = block_reduce<Sum, kThreads>(sum, scratch);
  if (threadIdx.x == 0) p.dweights[t] = sum;
}

// Checks what all of them share; returns I.
int64_t check_swiglu(const Tensor& gate_up, const std::optional<Tensor>& weights) {
  DSV3_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up must be (tokens, 2 * inner), got ", gate_up);
  check_operand("gate_up", gate_up, gate_up.dtype());
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, gate_up.size(0));
  return gate_up.size(1) / 2;
}

// Where the last group ends, of offsets [G + 1].
const int* check_offsets(const std::optional<Tensor>& offsets) {
  if (!offsets) return nullptr;
  const int64_t entries = offsets->numel();
  DSV3_CHECK(entries >= 2, "offsets must have at least two entries, got ", entries);
  check_operand("offsets", *offsets, Dtype::kInt32, entries);
  return offsets->data<int>() + entries - 1;
}

template <bool kCast>
void launch_swiglu(SwigluParams p, const Tensor& gate_up, cudaStream_t stream) {
  visit_float("gate_up", gate_up.dtype(), [&](auto zero) {
    using T = decltype(zero);
    DSV3_CHECK(p.inner % Vec<T>::kSize == 0, "inner must be a multiple of ", Vec<T>::kSize, ", got ", p.inner);
    const int vecs = p.inner / Vec<T>::kSize;
    const auto run = [&](auto kernel, int threads, int piece) {
      p.pieces = (vecs + piece - 1) / piece;
      launch(kCast ? "swiglu_cast" : "swiglu", kernel,
             {.grid = dim3(gate_up.size(0) * p.pieces), .block = dim3(threads)}, stream, p);
    };
    if (vecs <= 64) return run(swiglu_kernel<T, 64, 1, kCast>, 64, 64);
    return run(swiglu_kernel<T, 128, 2, kCast>, 128, 256);
  });
}

template <Casts kCasts>
void launch_swiglu_backward(const SwigluParams& p, const Tensor& gate_up, cudaStream_t stream) {
  constexpr bool kCast = kCasts != Casts::kNone;
  visit_float("gate_up", gate_up.dtype(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int kMultiple = kCast ? kTile : Vec<T>::kSize;  // a tile must not have values of both halves
    DSV3_CHECK(p.inner % kMultiple == 0, "inner must be a multiple of ", kMultiple, ", got ", p.inner);
    const auto run = [&](auto kernel, int threads) {
      launch(kCast ? "swiglu_cast_backward" : "swiglu_backward", kernel,
             {.grid = dim3(gate_up.size(0)), .block = dim3(threads)}, stream, p);
    };
    if (p.inner / Vec<T>::kSize <= 64) return run(swiglu_backward_kernel<T, 64, kCasts>, 64);
    return run(swiglu_backward_kernel<T, 256, kCasts>, 256);
  });
}

// Checks what both backward ops share.
SwigluParams backward_params(const std::optional<Tensor>& dgate_up, const std::optional<Tensor>& dweights,
                             const Tensor& dout, const Tensor& gate_up, const std::optional<Tensor>& weights) {
  const int64_t inner = check_swiglu(gate_up, weights);
  check_operand("dout", dout, gate_up.dtype(), gate_up.size(0), inner);
  if (dgate_up) check_operand("dgate_up", *dgate_up, gate_up.dtype(), gate_up.size(0), gate_up.size(1));
  if (dweights) check_operand("dweights", *dweights, Dtype::kFloat32, gate_up.size(0));
  return {.out = dgate_up ? dgate_up->data<void>() : nullptr,
          .dweights = dweights ? dweights->data<float>() : nullptr,
          .dout = dout.data<void>(),
          .gate_up = gate_up.data<void>(),
          .weights = weights ? weights->data<float>() : nullptr,
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
                       .inner = static_cast<int>(inner),
                       .end = check_offsets(offsets),
                       .casts = row_casts("out_fp8", out_fp8, "out_sf", out_sf, gate_up.size(0), inner, rule)},
                      gate_up, stream);
}

void swiglu_backward(Tensor dgate_up, std::optional<Tensor> dweights, Tensor dout, Tensor gate_up,
                     std::optional<Tensor> weights, cudaStream_t stream) {
  const SwigluParams params = backward_params(dgate_up, dweights, dout, gate_up, weights);
  const DeviceGuard guard(dout);
  launch_swiglu_backward<Casts::kNone>(params, gate_up, stream);
}

void swiglu_cast_backward(Tensor dgate_up_fp8, Tensor dgate_up_sf, std::optional<Tensor> dgate_up,
                          std::optional<Tensor> dweights, std::optional<Tensor> out_fp8, std::optional<Tensor> out_sf,
                          Tensor dout, Tensor gate_up, std::optional<Tensor> weights, std::optional<Tensor> offsets,
                          bool pow2_scale, double amax_floor, cudaStream_t stream) {
  SwigluParams params = backward_params(dgate_up, dweights, dout, gate_up, weights);
  params.end = check_offsets(offsets);
  params.casts = row_casts("dgate_up_fp8", dgate_up_fp8, "dgate_up_sf", dgate_up_sf, gate_up.size(0), gate_up.size(1),
                           scale_rule(amax_floor, pow2_scale));
  DSV3_CHECK(out_fp8.has_value() == out_sf.has_value(), "out_fp8 goes with out_sf");
  const DeviceGuard guard(dout);
  if (!out_fp8) return launch_swiglu_backward<Casts::kGradient>(params, gate_up, stream);
  const ScaleRule rule = scale_rule(kOutFloor, false);
  params.again = row_casts("out_fp8", *out_fp8, "out_sf", *out_sf, gate_up.size(0), params.inner, rule);
  launch_swiglu_backward<Casts::kBoth>(params, gate_up, stream);
}

}  // namespace dsv3
