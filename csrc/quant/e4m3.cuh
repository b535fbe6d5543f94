// The arithmetic that the FP8 casts share: maxima, the scale of a tile, conversions between fp32 and e4m3. All of it is
// IEEE, bit for bit what python/dsv3/reference/quant.py does.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>

#include "../common/launch.cuh"
#include "../common/vector.cuh"

namespace dsv3 {

constexpr int kTile = 128;  // values that share a scale, in one dimension or in both
constexpr float kE4M3Max = 448.f;

// A byte of this type is one e4m3 value; so that Pack<E4M3> has 16 of them.
enum class E4M3 : uint8_t {};

// 16 bytes of T as whole words: a load under a condition, or a conversion, then never takes a word apart.
template <class T>
struct Pack {
  static constexpr int kSize = 16 / sizeof(T);
  uint32_t words[4];
};

// Zeros where not `live`.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p, bool live) {
  const uint4 v = live ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
  return {v.x, v.y, v.z, v.w};
}

// Values 4 * chunk to 4 * chunk + 3; chunk is known at compile time where this is called.
__device__ __forceinline__ void unpack(const Pack<float>& v, int, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(v.words[i]);
}
__device__ __forceinline__ void unpack(const Pack<__nv_bfloat16>& v, int chunk, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x[2 * i] = __uint_as_float(v.words[2 * chunk + i] << 16);
    x[2 * i + 1] = __uint_as_float(v.words[2 * chunk + i] & 0xffff0000u);
  }
}
__device__ __forceinline__ void unpack(const Pack<E4M3>& v, int chunk, float (&x)[4]) {
  __half2 low, high;  // exact
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(reinterpret_cast<uint32_t&>(low)), "=r"(reinterpret_cast<uint32_t&>(high))
      : "r"(v.words[chunk]));
  const float2 first = __half22float2(low), second = __half22float2(high);
  x[0] = first.x;
  x[1] = first.y;
  x[2] = second.x;
  x[3] = second.y;
}

// The compiler forgets what it derived from v: converting again is cheaper than four times as many registers.
template <class T>
__device__ __forceinline__ void forget(Pack<T>& v) {
  asm volatile("" : "+r"(v.words[0]), "+r"(v.words[1]), "+r"(v.words[2]), "+r"(v.words[3]));
}

// Maximum that a NaN survives, unlike fmaxf.
struct MaxNan {
  __device__ __forceinline__ float operator()(float a, float b) const {
    float max;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(max) : "f"(a), "f"(b));
    return max;
  }
  static constexpr float kIdentity = 0.f;  // of absolute values
};

__device__ __forceinline__ float abs_max(float a, float b) { return MaxNan{}(fabsf(a), fabsf(b)); }

// The larger of the absolute values, a value at a time, with a sign that means nothing.
__device__ __forceinline__ uint32_t abs_max_words(uint32_t a, uint32_t b, float) {
  return __float_as_uint(abs_max(__uint_as_float(a), __uint_as_float(b)));
}
__device__ __forceinline__ uint32_t abs_max_words(uint32_t a, uint32_t b, __nv_bfloat16) {
  uint32_t max;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(max) : "r"(a), "r"(b));
  return max;
}
template <class T>
__device__ __forceinline__ void abs_max(Pack<T>& max, const Pack<T>& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) max.words[i] = abs_max_words(max.words[i], v.words[i], T{});
}
template <class T>
__device__ __forceinline__ float abs_max(const Pack<T>& v) {
  const uint32_t low = abs_max_words(v.words[0], v.words[1], T{}), high = abs_max_words(v.words[2], v.words[3], T{});
  const uint32_t max = abs_max_words(low, high, T{});
  if constexpr (sizeof(T) == 4) return __uint_as_float(max);
  return abs_max(__uint_as_float(max << 16), __uint_as_float(max & 0xffff0000u));
}

struct ScaleRule {
  float floor;
  bool pow2;
};

// max(amax, floor) / 448, at least the smallest normal number so that 1 / sf is finite; 1 where that maximum is 0.
// pow2: rounded up to a power of two on the exponent bits. Infinity and NaN are kept.
__device__ __forceinline__ float tile_scale(float amax, ScaleRule rule) {
  const float bound = MaxNan{}(amax, rule.floor);
  if (bound == 0.f) return 1.f;
  if (!(bound < INFINITY)) return bound;
  // bound / 448: a quotient within an ulp and one step from its exact remainder, as the IEEE division does it, without
  // the cases that can not happen here (a quotient below the smallest normal number need not be right).
  constexpr float kReciprocal = 1.f / kE4M3Max;
  const float quotient = __fmul_rn(bound, kReciprocal);
  const float sf = fmaxf(__fmaf_rn(__fmaf_rn(-kE4M3Max, quotient, bound), kReciprocal, quotient), FLT_MIN);
  if (!rule.pow2) return sf;
  return __uint_as_float((__float_as_uint(sf) + 0x007fffffu) & 0xff800000u);
}

// Four values times 1 / sf to e4m3, the first in the lowest byte: nearest even, beyond +-448 (and infinity) to +-448,
// NaN to 0x7f.
__device__ __forceinline__ uint32_t encode(const float (&x)[4], float inverse) {
  const float2 low = make_float2(__fmul_rn(x[0], inverse), __fmul_rn(x[1], inverse));
  const float2 high = make_float2(__fmul_rn(x[2], inverse), __fmul_rn(x[3], inverse));
  return __nv_cvt_float2_to_fp8x2(low, __NV_SATFINITE, __NV_E4M3) |
         static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(high, __NV_SATFINITE, __NV_E4M3)) << 16;
}

__device__ __forceinline__ void store_words(uint8_t* p, const uint32_t (&words)[1]) {
  *reinterpret_cast<uint32_t*>(p) = words[0];
}
__device__ __forceinline__ void store_words(uint8_t* p, const uint32_t (&words)[2]) {
  *reinterpret_cast<uint2*>(p) = make_uint2(words[0], words[1]);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scales of rows of tiles: fp32 (rows, tiles) with the rows contiguous and a column stride that is a multiple of 16
// bytes. Returns the stride.
inline int64_t check_row_scales(const char* name, const Tensor& sf, int64_t rows, int64_t tiles) {
  const int64_t stride = ceil_div(rows, 4) * 4;
  DSV3_CHECK(sf.is_cuda(), name, " must be on a CUDA device, got a CPU tensor of shape ", sf);
  DSV3_CHECK(sf.dtype() == Dtype::kFloat32, name, " must be float32, got ", sf);
  check_shape(name, sf, rows, tiles);
  const bool strided = (rows <= 1 || sf.stride(0) == 1) && (tiles <= 1 || sf.stride(1) == stride);
  DSV3_CHECK(strided || sf.numel() == 0, name, " must have strides (1, ", stride, "), got (", sf.stride(0), ", ",
             sf.stride(1), ")");
  return stride;
}

inline ScaleRule scale_rule(double floor, bool pow2) {
  DSV3_CHECK(floor >= 0 && floor <= FLT_MAX, "amax_floor must be at least 0 and finite, got ", floor);
  return {static_cast<float>(floor), pow2};
}

}  // namespace dsv3
