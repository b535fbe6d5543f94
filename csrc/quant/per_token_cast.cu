// Cast of activations (and their gradients) to e4m3 in tiles of 1 x 128.
//
//   sf[t, c] = max(max |x[t, 128 c : 128 c + 128]|, floor) / 448 (or the power of two above);  q = e4m3(x * (1 / sf))
//
// x [T, K], K a multiple of 16; q [T, K]; sf [T, ceil(K / 128)] with the tokens contiguous. Memory-bound: 3 bytes a bf16
// value (read once, kept in registers between the maximum and the conversion) and 4 a tile. Eight lanes hold a tile, each
// 64 bytes of loads in flight; a block takes 16 tokens so that the scales of a column leave as whole sectors.
#include "../ops.h"
#include "e4m3.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;                          // a tile
constexpr int kRows = 16;                          // tokens a block
constexpr int kStep = kThreads / kLanes / kRows;   // tiles of a row that the block covers at a time
constexpr int kVecsInFlight = 4;                   // a thread

struct PerTokenParams {
  uint8_t* out;   // [T, K]
  float* sf;      // [ceil(K / 128)][sf_stride]
  const void* x;  // [T, K]
  int64_t tokens;
  int64_t sf_stride;
  int hidden;
  int pieces;  // blocks a row
  ScaleRule rule;
};

template <class T>
constexpr int kVecs = kTile / kLanes / Vec<T>::kSize;  // a lane and tile
template <class T>
constexpr int kTiles = kVecsInFlight / kVecs<T>;  // a group of lanes

template <class T>
__global__ void __launch_bounds__(kThreads) per_token_cast_kernel(PerTokenParams p) {
  constexpr int kSize = Vec<T>::kSize;
  wait_for_inputs();
  release_dependents();
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.pieces) * kRows + group % kRows;
  const int first = blockIdx.x % p.pieces * (kTiles<T> * kStep) + group / kRows;
  const int limit = row < p.tokens ? p.hidden : 0;
  const T* const x = static_cast<const T*>(p.x) + row * p.hidden;

  Vec<T> vecs[kTiles<T>][kVecs<T>];
#pragma unroll
  for (int i = 0; i < kTiles<T>; ++i) {
#pragma unroll
    for (int j = 0; j < kVecs<T>; ++j) {
      const int column = (first + i * kStep) * kTile + (lane + j * kLanes) * kSize;
      vecs[i][j] = column < limit ? load_streaming(x + column) : Vec<T>{};
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles<T>; ++i) {
    const int tile = first + i * kStep;
    float amax = 0.f;
#pragma unroll
    for (int j = 0; j < kVecs<T>; ++j) {
      float values[kSize];
      unpack(vecs[i][j], values);
#pragma unroll
      for (int v = 0; v < kSize; ++v) amax = abs_max(amax, values[v]);
    }
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      amax = MaxNan{}(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
    }
    if (tile * kTile >= limit) continue;
    const float sf = tile_scale(amax, p.rule), inverse = __frcp_rn(sf);
    if (lane == 0) p.sf[tile * p.sf_stride + row] = sf;
#pragma unroll
    for (int j = 0; j < kVecs<T>; ++j) {
      const int column = tile * kTile + (lane + j * kLanes) * kSize;
      if (column >= limit) continue;
      float values[kSize];
      unpack(vecs[i][j], values);
      uint32_t words[kSize / 4];
#pragma unroll
      for (int v = 0; v < kSize; v += 4) {
        words[v / 4] = encode(__fmul_rn(values[v], inverse), __fmul_rn(values[v + 1], inverse),
                              __fmul_rn(values[v + 2], inverse), __fmul_rn(values[v + 3], inverse));
      }
      store_words(p.out + row * p.hidden + column, words);
    }
  }
}

}  // namespace

void per_token_cast(Tensor x_fp8, Tensor x_sf, Tensor x, bool pow2_scale, double amax_floor, cudaStream_t stream) {
  DSV3_CHECK(x.dim() == 2 && x.size(1) % 16 == 0, "x must be (tokens, a multiple of 16), got ", x);
  const int64_t tokens = x.size(0), hidden = x.size(1), tiles = ceil_div(hidden, kTile);
  check_operand("x", x, x.dtype());
  check_operand("x_fp8", x_fp8, Dtype::kE4M3, tokens, hidden);
  const int64_t sf_stride = check_row_scales("x_sf", x_sf, tokens, tiles);
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t pieces = ceil_div(tiles, kTiles<T> * kStep);
    const PerTokenParams params = {.out = x_fp8.data<uint8_t>(),
                                   .sf = x_sf.data<float>(),
                                   .x = x.data<T>(),
                                   .tokens = tokens,
                                   .sf_stride = sf_stride,
                                   .hidden = static_cast<int>(hidden),
                                   .pieces = static_cast<int>(pieces),
                                   .rule = scale_rule(amax_floor, pow2_scale)};
    launch("per_token_cast", per_token_cast_kernel<T>,
           {.grid = dim3(ceil_div(tokens, kRows) * pieces), .block = dim3(kThreads)}, stream, params);
  });
}

}  // namespace dsv3
