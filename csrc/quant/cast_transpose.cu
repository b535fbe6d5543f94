// Cast to e4m3 and transpose for weight gradients: tiles of 128 tokens x 1, tokens contiguous in the output.
//
//   qt[k, s] = e4m3(x[t(s), k] * (1 / sft[k, s / 128])),  sft = max(max over the tile |x[t, k]|, floor) / 448 (or pow2)
//
// x [T, K] bf16 or fp32, or already cast: e4m3 with one scale a token and 128 columns (x = q * sf in fp32); K a
// multiple of 16. qt [K, Tp]; sft [K, Tp / 128] with the columns contiguous. With offsets int32 [G + 1] the rows of
// group g go to P[g], P[g + 1] = P[g] + 128 * ceil(len_g / 128), so that no tile mixes groups; the slots that have no
// token are 0, and a tile without tokens has scale 1. Every thread block finds its tile's rows by a scan over the group
// lengths on the device, so the host never waits for the counts. Rows past offsets[G] are not read. Memory-bound: 3
// bytes a bf16 value, 2 an e4m3 one. A block holds 128 x 128 values in registers, a thread 4 tokens of 16-byte vectors:
// the maxima go over its warp, then through shared memory; converting the 4 tokens of a column gives a word of the
// output, and the words leave through shared memory as rows of 128 bytes.
#include "../ops.h"
#include "e4m3.cuh"

namespace dsv3 {
namespace {

struct CastTransposeParams {
  uint8_t* out;        // [K, Tp]
  float* out_sf;       // [Tp / 128][out_sf_stride]
  const void* x;       // [T, K]
  const float* x_sf;   // e4m3: [ceil(K / 128)][x_sf_stride]
  const int* offsets;  // [G + 1], or null: one group of all tokens
  uint32_t x_sf_stride;
  uint32_t out_sf_stride;
  int64_t out_stride;  // Tp
  int tokens, hidden;
  int groups;
  int column_tiles;
  ScaleRule rule;
};

struct Rows {
  int first, count;
};

// The rows of x that tile `tile` of the output holds; count 0 for a tile of padding. Called by whole warps. Offsets
// that are not what they should be give wrong rows, but none outside of x.
__device__ __forceinline__ Rows find_rows(const CastTransposeParams& p, int tile) {
  if (p.offsets == nullptr) return {tile * kTile, min(kTile, p.tokens - tile * kTile)};
  const int lane = threadIdx.x % kWarpSize;
  int before = 0;  // tiles of the groups before this warp-wide step
  for (int start = 0; start < p.groups; start += kWarpSize) {
    const int g = start + lane;
    const int begin = g < p.groups ? max(p.offsets[g], 0) : 0;
    const int end = g < p.groups ? min(p.offsets[g + 1], p.tokens) : 0;
    const int tiles = (max(end - begin, 0) + kTile - 1) / kTile;
    int up_to = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, up_to, offset);
      if (lane >= offset) up_to += other;
    }
    const uint32_t after = __ballot_sync(0xffffffffu, before + up_to > tile);
    if (after != 0) {
      const int owner = __ffs(after) - 1;
      const int first = __shfl_sync(0xffffffffu, begin + (tile - before - up_to + tiles) * kTile, owner);
      return {first, min(kTile, __shfl_sync(0xffffffffu, end, owner) - first)};
    }
    before += __shfl_sync(0xffffffffu, up_to, kWarpSize - 1);
  }
  return {0, 0};
}

template <class T>
constexpr int kThreads = sizeof(T) == 1 ? 256 : 512;
template <class T>
constexpr int kBlocks = sizeof(T) == 1   ? 4
                        : sizeof(T) == 2 ? 3
                                         : 2;  // a multiprocessor
template <class T>
constexpr int kRowPacks = kTile / Pack<T>::kSize;
template <class T>
constexpr int kQuadStep = kThreads<T> / kRowPacks<T>;  // quads of tokens that the block covers at a time
template <class T>
constexpr int kParts = kTile / 4 / kQuadStep<T>;  // pieces of 4 tokens x kSize columns a thread

// What a thread holds: 4 tokens of 16 bytes of columns, with their scales where x is e4m3.
template <class T>
struct Piece {
  static constexpr bool kIsCast = sizeof(T) == 1;
  Pack<T> packs[4];
  float sf[4];

  __device__ __forceinline__ void load(const CastTransposeParams& p, const Rows& rows, int quad, int column) {
    const int row = rows.first + 4 * quad;
    const int live = column < p.hidden ? rows.count - 4 * quad : 0;
    const T* const x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.hidden + column;
#pragma unroll
    for (int r = 0; r < 4; ++r) packs[r] = load_pack(x + static_cast<int64_t>(r) * p.hidden, r < live);
    if constexpr (kIsCast) {
      const float* const x_sf = p.x_sf + static_cast<uint32_t>(column / kTile) * p.x_sf_stride + row;
#pragma unroll
      for (int r = 0; r < 4; ++r) sf[r] = r < live ? x_sf[r] : 0.f;
    }
  }
  // Columns 4 * chunk to 4 * chunk + 3 of token r.
  __device__ __forceinline__ void values(int r, int chunk, float (&x)[4]) const {
    unpack(packs[r], chunk, x);
#pragma unroll
    for (int v = 0; kIsCast && v < 4; ++v) x[v] = __fmul_rn(x[v], sf[r]);
  }
};

// Absolute maxima, with any sign, of a warp's columns over the tokens that it holds: in lane l, those of pack
// l % kRowPacks.
template <class T>
__device__ __forceinline__ void column_maxima(Piece<T> (&pieces)[kParts<T>], float (&amax)[Pack<T>::kSize]) {
  if constexpr (Piece<T>::kIsCast) {
    static_assert(kParts<T> == 1);
#pragma unroll
    for (int c = 0; c < Pack<T>::kSize; c += 4) {
      float x[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) pieces[0].values(r, c / 4, x[r]);
#pragma unroll
      for (int v = 0; v < 4; ++v) amax[c + v] = abs_max(abs_max(x[0][v], x[1][v]), abs_max(x[2][v], x[3][v]));
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int offset = kRowPacks<T>; offset < kWarpSize; offset *= 2) {
          amax[c + v] = abs_max(amax[c + v], __shfl_xor_sync(0xffffffffu, amax[c + v], offset));
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) forget(pieces[0].packs[r]);
  } else {
    Pack<T> maxima{};
#pragma unroll
    for (int i = 0; i < kParts<T>; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) abs_max(maxima, pieces[i].packs[r]);
    }
#pragma unroll
    for (int offset = kRowPacks<T>; offset < kWarpSize; offset *= 2) {
      Pack<T> other;
#pragma unroll
      for (int i = 0; i < 4; ++i) other.words[i] = __shfl_xor_sync(0xffffffffu, maxima.words[i], offset);
      abs_max(maxima, other);
    }
#pragma unroll
    for (int c = 0; c < Pack<T>::kSize; c += 4) unpack(maxima, c / 4, reinterpret_cast<float (&)[4]>(amax[c]));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads<T>, kBlocks<T>) cast_transpose_kernel(CastTransposeParams p) {
  constexpr int kSize = Pack<T>::kSize, kWarps = kThreads<T> / kWarpSize;
  __shared__ ByteTile tile;
  __shared__ alignas(16) float maxima[kWarps][kTile];
  __shared__ alignas(16) float inverses[kTile];
  wait_for_inputs();
  release_dependents();
  const int column_tile = blockIdx.x % p.column_tiles, row_tile = blockIdx.x / p.column_tiles;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int column = threadIdx.x % kRowPacks<T> * kSize, quad = threadIdx.x / kRowPacks<T>;
  const Rows rows = find_rows(p, row_tile);
  Piece<T> pieces[kParts<T>];
#pragma unroll
  for (int i = 0; i < kParts<T>; ++i) pieces[i].load(p, rows, quad + i * kQuadStep<T>, column_tile * kTile + column);

  float amax[kSize];
  column_maxima<T>(pieces, amax);
  if (lane < kRowPacks<T>) {
#pragma unroll
    for (int c = 0; c < kSize; c += 4) {
      *reinterpret_cast<float4*>(&maxima[warp][column + c]) =
          make_float4(amax[c], amax[c + 1], amax[c + 2], amax[c + 3]);
    }
  }
  __syncthreads();
  if (threadIdx.x < kTile) {
    float max = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = abs_max(max, maxima[w][threadIdx.x]);
    const float sf = rows.count > 0 ? tile_scale(max, p.rule) : 1.f;
    inverses[threadIdx.x] = __frcp_rn(sf);
    const int k = column_tile * kTile + threadIdx.x;
    if (k < p.hidden) p.out_sf[row_tile * p.out_sf_stride + k] = sf;
  }
  __syncthreads();

  // The 4 tokens of a column are a word of the output.
#pragma unroll
  for (int c = 0; c < kSize; c += 4) {
    const float4 inverse = *reinterpret_cast<const float4*>(&inverses[column + c]);
    const float factors[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
#pragma unroll
    for (int i = 0; i < kParts<T>; ++i) {
      float x[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) pieces[i].values(r, c / 4, x[r]);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const float tokens[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
        tile.put(column + c + v, quad + i * kQuadStep<T>, encode(tokens, factors[v]));
      }
    }
  }
  __syncthreads();
  uint8_t* const out = p.out + static_cast<int64_t>(column_tile) * kTile * p.out_stride + row_tile * kTile;
  store_transposed<kThreads<T>>(tile, out, p.out_stride, p.hidden - column_tile * kTile, kTile);
}

template <class T>
void launch_cast_transpose(const CastTransposeParams& p, cudaStream_t stream) {
  const int64_t row_tiles = p.out_stride / kTile;
  launch("cast_transpose", cast_transpose_kernel<T>,
         {.grid = dim3(row_tiles * p.column_tiles), .block = dim3(kThreads<T>)}, stream, p);
}

}  // namespace

void cast_transpose(Tensor xt_fp8, Tensor xt_sf, Tensor x, std::optional<Tensor> x_sf, std::optional<Tensor> offsets,
                    bool pow2_scale, double amax_floor, cudaStream_t stream) {
  DSV3_CHECK(x.dim() == 2 && x.size(1) % 16 == 0, "x must be (tokens, a multiple of 16), got ", x);
  const int64_t tokens = x.size(0), hidden = x.size(1), column_tiles = ceil_div(hidden, kTile);
  const int64_t groups = offsets ? offsets->numel() - 1 : 1;
  check_operand("x", x, x.dtype());
  DSV3_CHECK(groups >= 1, "offsets must have at least two entries, got ", groups + 1);
  if (offsets) check_operand("offsets", *offsets, Dtype::kInt32, groups + 1);
  const int64_t slots = ceil_div(tokens + (offsets ? (kTile - 1) * groups : 0), kTile) * kTile;
  check_operand("xt_fp8", xt_fp8, Dtype::kE4M3, hidden, slots);
  const int64_t out_sf_stride = check_row_scales("xt_sf", xt_sf, hidden, slots / kTile);
  DSV3_CHECK(x_sf.has_value() == (x.dtype() == Dtype::kE4M3), "x_sf goes with an x in float8_e4m3fn, got ", x);
  const int64_t x_sf_stride = x_sf ? check_row_scales("x_sf", *x_sf, tokens, column_tiles) : 0;
  const DeviceGuard guard(x);
  const CastTransposeParams params = {.out = xt_fp8.data<uint8_t>(),
                                      .out_sf = xt_sf.data<float>(),
                                      .x = x.data<char>(),
                                      .x_sf = x_sf ? x_sf->data<float>() : nullptr,
                                      .offsets = offsets ? offsets->data<int>() : nullptr,
                                      .x_sf_stride = static_cast<uint32_t>(x_sf_stride),
                                      .out_sf_stride = static_cast<uint32_t>(out_sf_stride),
                                      .out_stride = slots,
                                      .tokens = static_cast<int>(tokens),
                                      .hidden = static_cast<int>(hidden),
                                      .groups = static_cast<int>(groups),
                                      .column_tiles = static_cast<int>(column_tiles),
                                      .rule = scale_rule(amax_floor, pow2_scale)};
  if (x_sf) return launch_cast_transpose<E4M3>(params, stream);
  visit_float("x", x.dtype(), [&](auto zero) { launch_cast_transpose<decltype(zero)>(params, stream); });
}

}  // namespace dsv3
