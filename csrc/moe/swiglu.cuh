// SwiGLU of fused gate and up projections, times an optional routing weight a row, a value at a time:
//
//   out = silu(g) * u * w,   g = gate_up[:, :I], u = gate_up[:, I:],   silu(g) = g * s, s = 1 / (1 + exp(-g))
//   dg = dout * w * u * s * (1 + g * (1 - s)),   du = dout * w * silu(g),   dw = sum_i dout * silu(g) * u
#pragma once

#include <optional>

#include "../common/launch.cuh"
#include "../common/tensor.h"
#include "../common/vector.cuh"

namespace dsv3 {

// 1 / (1 + __expf(-x)) without its cases of results below the smallest normal number: as 0 they change nothing beside the 1,
// and make silu 0 where it is above -1e-35.
__device__ __forceinline__ float sigmoid(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + fast_exp2(x * -1.44269504f)));
  return inverse;
}

__device__ __forceinline__ float swiglu_value(float g, float u, float w) { return g * (sigmoid(g) * u * w); }

struct SwigluGradient {
  float dg, du;
};
// Adds the value's share to dw.
__device__ __forceinline__ SwigluGradient swiglu_gradient(float dout, float g, float u, float w, float& dw) {
  const float s = sigmoid(g), silu = g * s;
  dw = __fmaf_rn(dout * silu, u, dw);
  return {dout * w * u * s * __fmaf_rn(g, 1.f - s, 1.f), dout * w * silu};
}

// Checks what all of its ops share; returns I.
inline int64_t check_swiglu(const Tensor& gate_up, const std::optional<Tensor>& weights) {
  DSV3_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "gate_up must be (tokens, 2 * inner), got ", gate_up);
  check_operand("gate_up", gate_up, gate_up.dtype());
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, gate_up.size(0));
  return gate_up.size(1) / 2;
}

}  // namespace dsv3
