// The arithmetic that the FP8 casts share: maxima, the scale of a tile, conversions between fp32 and e4m3. All of it is
// IEEE, bit for bit what python/dsv3/reference/quant.py does.
#pragma once

#include <cuda_fp8.h>

#include <cfloat>

#include "launch.cuh"
#include "vector.cuh"

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

template <class T>
__device__ __forceinline__ Pack<T> as_pack(const Vec<T>& v) {
  const uint4& raw = reinterpret_cast<const uint4&>(v);
  return {raw.x, raw.y, raw.z, raw.w};
}

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

// Where rows go that are cast in tiles of 1 x 128.
struct RowCasts {
  uint8_t* out;        // [rows, columns]
  float* sf;           // [ceil(columns / 128)][sf_stride]
  uint32_t sf_stride;  // there are fewer than 2^32 scales, though there may be more values
  ScaleRule rule;
};

// Casts a row whose packs lie in neighbouring lanes, so that 16 lanes (32 of fp32) hold a tile. A lane has packs first,
// first + step, ...: kCount of them, of which those before `end` exist; the others are zeros. For whole warps, lane 0
// with the first pack of a tile. The lanes share the work on scales: each makes that of one tile, and kShare the same.
template <class T, int kCount>
__device__ __forceinline__ void cast_packs(const RowCasts& to, const Pack<T> (&x)[kCount], int64_t row, int columns,
                                           int first, int step, int end) {
  constexpr int kSize = Pack<T>::kSize, kLanes = kTile / kSize, kShare = kLanes / kCount;
  const int lane = threadIdx.x % kLanes;
  float amax[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) amax[i] = abs_max(x[i]);
  // While a lane has maxima of several tiles, it hands half of them to the lane that keeps those.
#pragma unroll
  for (int offset = kLanes / 2; offset >= kShare; offset /= 2) {
    const int keep = offset / kShare;
    const bool high = lane & offset;
#pragma unroll
    for (int i = 0; i < keep; ++i) {
      const float other = __shfl_xor_sync(0xffffffffu, high ? amax[i] : amax[i + keep], offset);
      amax[i] = MaxNan{}(high ? amax[i + keep] : amax[i], other);
    }
  }
#pragma unroll
  for (int offset = kShare / 2; offset > 0; offset /= 2) {
    amax[0] = MaxNan{}(amax[0], __shfl_xor_sync(0xffffffffu, amax[0], offset));
  }
  const float sf = tile_scale(amax[0], to.rule), inverse = __frcp_rn(sf);
  const int begin = first - lane + lane / kShare * step;  // the first pack of that tile
  if (lane % kShare == 0 && begin < end) to.sf[begin / kLanes * to.sf_stride + row] = sf;
  uint8_t* const out = to.out + row * columns;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float factor = kCount == 1 ? inverse : __shfl_sync(0xffffffffu, inverse, i * kShare, kLanes);
    uint32_t words[kSize / 4];
#pragma unroll
    for (int c = 0; c < kSize / 4; ++c) {
      float v[4];
      unpack(x[i], c, v);
      words[c] = encode(v, factor);
    }
    if (first + i * step < end) store_words(out + (first + i * step) * kSize, words);
  }
}

inline ScaleRule scale_rule(double floor, bool pow2) {
  DSV3_CHECK(floor >= 0 && floor <= FLT_MAX, "amax_floor must be at least 0 and finite, got ", floor);
  return {static_cast<float>(floor), pow2};
}

// Checks the outputs of a cast in tiles of 1 x 128: `data` e4m3 (rows, columns) and its scales.
inline RowCasts row_casts(const char* data_name, const Tensor& data, const char* sf_name, const Tensor& sf,
                          int64_t rows, int64_t columns, ScaleRule rule) {
  DSV3_CHECK(columns % 16 == 0, data_name, " must have a multiple of 16 columns, got ", data);
  check_operand(data_name, data, Dtype::kE4M3, rows, columns);
  const int64_t stride = check_row_scales(sf_name, sf, rows, ceil_div(columns, kTile));
  return {data.data<uint8_t>(), sf.data<float>(), static_cast<uint32_t>(stride), rule};
}

}  // namespace dsv3
