// Cast of activations (and their gradients) to e4m3 in tiles of 1 x 128.
//
//   sf[t, c] = max(max |x[t, 128 c : 128 c + 128]|, floor) / 448 (or the power of two above);  q = e4m3(x * (1 / sf))
//
// x [T, K], K a multiple of 16; q [T, K]; sf [T, ceil(K / 128)] with the tokens contiguous. Memory-bound: 3 bytes a
// bf16 value (read once, kept in registers between the maximum and the conversion) and 4 a tile. Eight lanes hold a
// tile, each 64 bytes of loads in flight; a block takes 16 tokens so that the scales of a column leave as whole
// sectors.
#include "../common/e4m3.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;                         // a tile
constexpr int kRows = 16;                         // tokens a block
constexpr int kStep = kThreads / kLanes / kRows;  // tiles of a row that the block covers at a time
constexpr int kInFlight = 4;                      // loads a thread

struct PerTokenParams {
  uint8_t* out;   // [T, K]
  float* sf;      // [ceil(K / 128)][sf_stride]
  const void* x;  // [T, K]
  int tokens, hidden;
  uint32_t sf_stride;  // there are fewer than 2^32 scales, though there may be more values
  int pieces;          // blocks a row
  ScaleRule rule;
};

template <class T>
constexpr int kPacks = kTile / kLanes / Pack<T>::kSize;  // a lane and tile
template <class T>
constexpr int kTiles = kInFlight / kPacks<T>;  // a group of lanes

// Lanes that differ in `mask` trade words: the one without it in its number keeps a and gets the other's a as b.
__device__ __forceinline__ void trade(uint32_t& a, uint32_t& b, int lane, int mask) {
  const bool high = lane & mask;
  const uint32_t other = __shfl_xor_sync(0xffffffffu, high ? a : b, mask);
  if (high) {
    a = other;
  } else {
    b = other;
  }
}

// The words of a lane are its kCount vectors, kLanes vectors apart; afterwards they are 16 consecutive bytes of the
// tile. Returns where these begin.
template <int kCount>
__device__ __forceinline__ int gather_words(uint32_t (&words)[4], int lane) {
  static_assert(kCount == 2 || kCount == 4);
  if constexpr (kCount == 4) {
    trade(words[0], words[1], lane, 1);
    trade(words[2], words[3], lane, 1);
  }
  trade(words[0], words[2], lane, kCount / 2);
  trade(words[1], words[3], lane, kCount / 2);
  return lane / kCount * 16 + lane % kCount * (kTile / kCount);
}

template <class T>
__global__ void __launch_bounds__(kThreads) per_token_cast_kernel(PerTokenParams p) {
  constexpr int kSize = Pack<T>::kSize;
  wait_for_inputs();
  release_dependents();
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int row = blockIdx.x / p.pieces * kRows + group % kRows;
  const int first = blockIdx.x % p.pieces * (kTiles<T> * kStep) + group / kRows;
  const int limit = row < p.tokens ? p.hidden : 0;
  const int64_t start = static_cast<int64_t>(row) * p.hidden;

  Pack<T> packs[kTiles<T>][kPacks<T>];
#pragma unroll
  for (int i = 0; i < kTiles<T>; ++i) {
#pragma unroll
    for (int j = 0; j < kPacks<T>; ++j) {
      const int column = (first + i * kStep) * kTile + (lane + j * kLanes) * kSize;
      packs[i][j] = load_pack(static_cast<const T*>(p.x) + start + column, column < limit);
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles<T>; ++i) {
    const int tile = first + i * kStep;
    Pack<T> maxima = packs[i][0];
#pragma unroll
    for (int j = 1; j < kPacks<T>; ++j) abs_max(maxima, packs[i][j]);
    float amax = abs_max(maxima);
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
      amax = MaxNan{}(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
    }
    const float sf = tile_scale(amax, p.rule), inverse = __frcp_rn(sf);
    if (lane == 0 && tile * kTile < limit) p.sf[tile * p.sf_stride + row] = sf;
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < kPacks<T>; ++j) {
#pragma unroll
      for (int c = 0; c < kSize / 4; ++c) {
        float v[4];
        unpack(packs[i][j], c, v);
        words[j * (kSize / 4) + c] = encode(v, inverse);
      }
    }
    const int column = tile * kTile + gather_words<kPacks<T>>(words, lane);
    if (column < limit) {
      uint4* const target = reinterpret_cast<uint4*>(p.out + start + column);
      *target = make_uint4(words[0], words[1], words[2], words[3]);
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
                                   .tokens = static_cast<int>(tokens),
                                   .hidden = static_cast<int>(hidden),
                                   .sf_stride = static_cast<uint32_t>(sf_stride),
                                   .pieces = static_cast<int>(pieces),
                                   .rule = scale_rule(amax_floor, pow2_scale)};
    launch("per_token_cast", per_token_cast_kernel<T>,
           {.grid = dim3(ceil_div(tokens, kRows) * pieces), .block = dim3(kThreads)}, stream, params);
  });
}

}  // namespace dsv3
