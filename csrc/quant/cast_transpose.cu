// Cast to e4m3 and transpose for weight gradients: tiles of 128 tokens x 1, tokens contiguous in the output.
//
//   qt[k, s] = e4m3(x[t(s), k] * (1 / sft[k, s / 128])),  sft = max(max over the tile |x[t, k]|, floor) / 448 (or pow2)
//
// x [T, K] bf16 or fp32, or already cast: e4m3 with one scale a token and 128 columns (x = q * sf in fp32); K a
// multiple of 16. qt [K, Tp]; sft [K, Tp / 128] with the columns contiguous. With offsets int32 [G + 1] the rows of
// group g go to P[g], P[g + 1] = P[g] + 128 * ceil(len_g / 128), so that no tile mixes groups; the slots that have no
// token are 0, and a tile without tokens has scale 1. A thread block finds the rows of its tile by a scan over the
// group lengths on the device, so the host never waits for the counts. Rows past offsets[G] are not read.
//
// With source int64 [R] x is the tokens of which R rows were copies, row r of token source[r] / topk, and the rows are
// transposed without being there: a token's columns are read by k experts' tiles, which find them in the L2 cache, since tiles of
// the same columns follow each other.
//
// With both casts also that of x in tiles of 1 x 128, as per_token_cast makes it, from the same read: what a gradient
// needs, for dgrad and for wgrad. Rows past offsets[G] are not written there either.
//
// Memory-bound: 3 bytes a bf16 value, 2 an e4m3 one; 4 with both casts. A thread holds 4 tokens of a pack (16 bytes of
// columns): converting the 4 tokens of a column gives a word of the output, and the words leave through shared memory
// as rows of 128 bytes.
//
// A block takes one tile, or two of tokens that it has to look up. cast_transpose_kernel: 128 tokens by 128 bytes, of which a warp
// takes one pack of all tokens, so that after the copy to shared memory no warp needs another. both_casts_kernel: both_casts.cuh.
#include <cutlass/fast_math.h>

#include "../ops.h"
#include "both_casts.cuh"

namespace dsv3 {
namespace {

struct CastTransposeParams {
  const void* x;      // [T, K]
  const float* x_sf;  // e4m3: [ceil(K / 128)][x_sf_stride]
  uint32_t x_sf_stride;
  const int64_t* source;  // [R], or null: the rows are those of x
  cutlass::FastDivmod topk;
  int tokens;
  int hidden;
  Groups groups;
  ColumnCasts columns;
  RowCasts rows;  // both casts
  uint32_t column_tiles;
};

// The tiles of a block, columns fastest; of rows that are copies, tokens fastest.
struct Place {
  uint32_t column, row;
};
template <bool kGathered = false>
__device__ __forceinline__ Place place(const CastTransposeParams& p) {
  if constexpr (kGathered) {
    const uint32_t rows = gridDim.x / p.column_tiles;
    return {blockIdx.x / rows, blockIdx.x % rows};
  }
  return {blockIdx.x % p.column_tiles, blockIdx.x / p.column_tiles};
}

constexpr int kThreads = kLanePacks * kWarpSize;
// Blocks a multiprocessor that registers must be left for: while one waits for its tile, the others convert theirs. On
// an H100 6 are best from e4m3, and 4 from bf16 (6: 33.4 us against 31.9 at 4096 x 7168).
template <class T>
constexpr int kBlocks = kIsCast<T> ? 6 : 4;

// A tile: pack j of token t lies at [t][j ^ t / 4 % 8], so that the 8 packs of a token, which are copied together,
// share a line, and the same pack of 8 quads, which are read together, lies in different banks.
template <class T>
struct SharedTile {
  uint4 packs[kTile][kLanePacks];
  float sf[kIsCast<T> ? kTile : 4];
};
template <class T, bool kGathered>
struct Shared {
  static constexpr int kTiles = kGathered ? 2 : 1;  // one beside the other
  SharedTile<T> tiles[kTiles];
  int tokens[kGathered ? kTile : 1];                     // that the rows are copies of
  alignas(16) float scales[kLanePacks][Pack<T>::kSize];  // of a warp's columns: maxima, then inverses
};

// The row of x that row t of the tile is a copy of; any where there is none.
__device__ __forceinline__ int token_of(const CastTransposeParams& p, const Rows& rows, int t) {
  if (t >= rows.count) return 0;
  const int token = p.topk.div(static_cast<int>(p.source[rows.first + t]));
  return min(max(token, 0), p.tokens - 1);  // whatever source says, it is one of x
}

// Asks for a tile; row t of it is row_of(t) of x.
template <class T, class F>
__device__ __forceinline__ void copy_tile(SharedTile<T>& shared, const CastTransposeParams& p, uint32_t column_tile,
                                          const Rows& rows, F&& row_of) {
  const int pack = threadIdx.x % kLanePacks, row = threadIdx.x / kLanePacks;
  const int column = (column_tile * kLanePacks + pack) * Pack<T>::kSize;
  const int live = column < p.hidden ? rows.count : 0;
  const T* const x = static_cast<const T*>(p.x) + column;
  constexpr int kStep = kThreads / kLanePacks;  // a multiple of 32 tokens: the place in the line stays the same
#pragma unroll
  for (int i = 0; i < kTile; i += kStep) {
    const int64_t from = row_of(row + i);
    copy_async(shared_pointer(&shared.packs[row + i][pack ^ row / 4 % 8]), x + from * p.hidden, row + i < live);
  }
  if constexpr (kIsCast<T>) {
    static_assert(kLanePacks * Pack<T>::kSize == kTile && kThreads >= kTile);
    const int t = threadIdx.x;
    const bool exists = t < rows.count && column_tile * kTile < p.hidden;
    const float* const sf = p.x_sf + column_tile * p.x_sf_stride;
    if (t < kTile) copy_float_async(shared_pointer(&shared.sf[t]), sf + row_of(t), exists);
  }
  commit_copies();
}

// Casts a tile that is in shared memory; each warp for itself. scales: the warp's.
template <class T>
__device__ __forceinline__ void cast_tile(SharedTile<T>& shared, float (&scales)[Pack<T>::kSize],
                                          const CastTransposeParams& p, uint32_t column_tile, uint32_t row_tile,
                                          bool empty) {
  constexpr int kSize = Pack<T>::kSize;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  // Lane q has tokens 4 q to 4 q + 3 of the warp's pack.
  Piece<T> piece;
#pragma unroll
  for (int r = 0; r < 4; ++r) piece.packs[r] = load_shared<T>(shared.packs[4 * lane + r][warp ^ lane % 8]);
  if constexpr (kIsCast<T>) reinterpret_cast<float4&>(piece.sf) = reinterpret_cast<const float4*>(shared.sf)[lane];
#pragma unroll
  for (int c = 0; c < kSize; c += 4) {
    float x[4][4], max[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) piece.values(r, c / 4, x[r]);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      // The bits of absolute values order like the values, NaN above all.
      const float four = abs_max(abs_max(x[0][v], x[1][v]), abs_max(x[2][v], x[3][v]));
      max[v] = __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(four)));
    }
    if (lane == 0) *reinterpret_cast<float4*>(scales + c) = make_float4(max[0], max[1], max[2], max[3]);
  }
  if constexpr (kIsCast<T>) {
#pragma unroll
    for (int r = 0; r < 4; ++r) forget(piece.packs[r]);
  }
  __syncwarp();

  const int first = (column_tile * kLanePacks + warp) * kSize;  // column; all of the warp's exist or none
  const bool live = first < p.hidden;
  if (lane < kSize) {
    const float sf = empty ? 1.f : tile_scale(scales[lane], p.columns.rule);
    scales[lane] = __frcp_rn(sf);
    if (live) p.columns.sf[row_tile * p.columns.sf_stride + first + lane] = sf;
  }
  __syncwarp();

  // The words take the place of the warp's packs: that of quad q and column c goes where token 32 (c / 4) + 4 (q / 4) +
  // c % 4 was, which puts the words of a column into different banks.
  auto* const words = reinterpret_cast<uint32_t*>(&shared.packs[lane / 4 * 4][warp ^ lane / 4]) + lane % 4;
#pragma unroll
  for (int c = 0; c < kSize; c += 4) {
    uint32_t codes[4];
    column_codes(piece, c, scales + c, codes);
#pragma unroll
    for (int v = 0; v < 4; ++v) words[(8 * c + v) * 4 * kLanePacks] = codes[v];
  }
  __syncwarp();
  if (!live) return;
  const int column = lane / 8, chunk = lane % 8;
  const int64_t slots = p.columns.slots;
  uint8_t* out = p.columns.out + (first + column) * slots + row_tile * kTile + chunk * 16;
#pragma unroll
  for (int c = 0; c < kSize; c += 4, out += 4 * slots)
    *reinterpret_cast<uint4*>(out) = shared.packs[8 * c + 4 * chunk + column][warp ^ chunk];
}

template <class T, bool kGathered>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) cast_transpose_kernel(CastTransposeParams p) {
  using S = Shared<T, kGathered>;
  extern __shared__ __align__(128) uint8_t memory[];
  S& shared = *reinterpret_cast<S*>(memory);
  wait_for_inputs();
  release_dependents();
  const Place at = place<kGathered>(p);
  const Rows rows = p.groups.of_tile(at.row);
  if constexpr (kGathered) {
    if (threadIdx.x < kTile) shared.tokens[threadIdx.x] = token_of(p, rows, threadIdx.x);
    __syncthreads();
  }
  const auto row_of = [&](int t) { return kGathered ? shared.tokens[t] : rows.first + t; };
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i) copy_tile(shared.tiles[i], p, at.column * S::kTiles + i, rows, row_of);
#pragma unroll 1
  for (int i = 0; i < S::kTiles; ++i) {
    i + 1 < S::kTiles ? wait_for_copies<1>() : wait_for_copies<0>();
    __syncthreads();
    cast_tile(shared.tiles[i], shared.scales[threadIdx.x / kWarpSize], p, at.column * S::kTiles + i, at.row,
              rows.count == 0);
  }
}

template <class T>
struct BothShared {
  ColumnScales<T> columns;
  RowScales<T> rows;
  ByteTile<T, Shape<T>::kPacks> bytes;
};

template <class T>
__device__ __forceinline__ Piece<T> load_piece(const CastTransposeParams& p, int column, const Rows& rows) {
  const int quad = thread_quad(), live = column < p.hidden ? rows.count - 4 * quad : 0;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(rows.first + 4 * quad) * p.hidden + column;
  Piece<T> piece;
#pragma unroll
  for (int r = 0; r < 4; ++r, x += p.hidden) piece.packs[r] = load_pack(x, r < live);
  return piece;
}

template <class T>
__global__ void __launch_bounds__(Shape<T>::kThreads, Shape<T>::kBlocks) both_casts_kernel(CastTransposeParams p) {
  using S = Shape<T>;
  constexpr int kSize = Pack<T>::kSize;
  __shared__ BothShared<T> shared;
  wait_for_inputs();
  release_dependents();
  const Place at = place(p);
  const Rows rows = p.groups.of_tile(at.row);
  const int first = at.column * kTile, column = thread_column<T>();
  const Piece<T> piece = load_piece<T>(p, first + column, rows);
  shared.columns.collect(piece);
  shared.rows.collect(piece);
  __syncthreads();
  const int t = threadIdx.x;
  if (t < kTile) shared.columns.scale(p.columns, t, first + t, p.hidden, at.row, rows.count == 0);
  if (t >= kTile && t < 2 * kTile) shared.rows.scale(p.rows, t - kTile, at.column, rows);
  __syncthreads();
  uint32_t words[kSize];
  shared.columns.codes(piece, words);
#pragma unroll
  for (int c = 0; c < kSize; ++c) shared.bytes.put(column + c, thread_quad(), words[c]);
  shared.rows.store(p.rows, piece, first + column, p.hidden, rows);
  __syncthreads();
  const ColumnCasts& to = p.columns;
  shared.bytes.template store<S::kThreads>(to.out + first * to.slots + at.row * kTile, to.slots, p.hidden - first,
                                           kTile);
}

template <class T, bool kGathered = false>
void launch_cast_transpose(CastTransposeParams p, cudaStream_t stream) {
  using S = Shared<T, kGathered>;
  p.column_tiles = ceil_div(p.hidden, S::kTiles * kLanePacks * Pack<T>::kSize);
  launch("cast_transpose", cast_transpose_kernel<T, kGathered>,
         {.grid = dim3(p.column_tiles * (p.columns.slots / kTile)), .block = dim3(kThreads), .smem = sizeof(S)}, stream,
         p);
}

template <class T>
void launch_both_casts(CastTransposeParams p, cudaStream_t stream) {
  p.column_tiles = ceil_div(p.hidden, kTile);
  launch("per_token_cast_and_transpose", both_casts_kernel<T>,
         {.grid = dim3(p.column_tiles * (p.columns.slots / kTile)), .block = dim3(Shape<T>::kThreads)}, stream, p);
}

// Checks what both ops share; `rows` are transposed.
CastTransposeParams transpose_params(const Tensor& xt_fp8, const Tensor& xt_sf, const Tensor& x, int64_t rows,
                                     const std::optional<Tensor>& offsets, ScaleRule rule) {
  DSV3_CHECK(x.dim() == 2 && x.size(1) % 16 == 0, "x must be (tokens, a multiple of 16), got ", x);
  const int64_t hidden = x.size(1);
  check_operand("x", x, x.dtype());
  const Groups groups = check_groups(offsets, rows);
  const int64_t slots = transposed_slots(rows, offsets);
  return {.x = x.data<void>(),
          .x_sf = nullptr,
          .x_sf_stride = 0,
          .source = nullptr,
          .topk = cutlass::FastDivmod(1),
          .tokens = static_cast<int>(x.size(0)),
          .hidden = static_cast<int>(hidden),
          .groups = groups,
          .columns = column_casts("xt_fp8", xt_fp8, "xt_sf", xt_sf, hidden, slots, rule),
          .rows = {},
          .column_tiles = 0};
}

}  // namespace

void cast_transpose(Tensor xt_fp8, Tensor xt_sf, Tensor x, std::optional<Tensor> x_sf, std::optional<Tensor> offsets,
                    std::optional<Tensor> source, int64_t topk, bool pow2_scale, double amax_floor,
                    cudaStream_t stream) {
  const int64_t rows = source ? source->numel() : x.size(0);
  CastTransposeParams params = transpose_params(xt_fp8, xt_sf, x, rows, offsets, scale_rule(amax_floor, pow2_scale));
  DSV3_CHECK(x_sf.has_value() == (x.dtype() == Dtype::kE4M3), "x_sf goes with an x in float8_e4m3fn, got ", x);
  const DeviceGuard guard(x);
  if (x_sf) {
    const int64_t stride = check_row_scales("x_sf", *x_sf, x.size(0), ceil_div(x.size(1), kTile));
    params.x_sf = x_sf->data<float>();
    params.x_sf_stride = static_cast<uint32_t>(stride);
    if (source) {
      check_operand("source", *source, Dtype::kInt64, rows);
      DSV3_CHECK(topk >= 1 && rows <= INT32_MAX && (rows == 0 || x.size(0) > 0), "source of ", rows, " rows of ", topk,
                 " a token does not fit ", x);
      params.source = source->data<int64_t>();
      params.topk = cutlass::FastDivmod(static_cast<int>(topk));
      return launch_cast_transpose<E4M3, true>(params, stream);
    }
    return launch_cast_transpose<E4M3>(params, stream);
  }
  DSV3_CHECK(!source, "source goes with an x in float8_e4m3fn, got ", x);
  visit_float("x", x.dtype(), [&](auto zero) { launch_cast_transpose<decltype(zero)>(params, stream); });
}

void per_token_cast_and_transpose(Tensor x_fp8, Tensor x_sf, Tensor xt_fp8, Tensor xt_sf, Tensor x,
                                  std::optional<Tensor> offsets, bool pow2_scale, double amax_floor,
                                  cudaStream_t stream) {
  const ScaleRule rule = scale_rule(amax_floor, pow2_scale);
  CastTransposeParams params = transpose_params(xt_fp8, xt_sf, x, x.size(0), offsets, rule);
  params.rows = row_casts("x_fp8", x_fp8, "x_sf", x_sf, x.size(0), x.size(1), rule);
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) { launch_both_casts<decltype(zero)>(params, stream); });
}

}  // namespace dsv3
