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
// With both casts also that of x in tiles of 1 x 128, as per_token_cast makes it, from the same read: what a gradient
// needs, for dgrad and for wgrad. Rows past offsets[G] are not written there either.
//
// Memory-bound: 3 bytes a bf16 value, 2 an e4m3 one; 4 with both casts. A thread holds 4 tokens of a pack (16 bytes of
// columns): converting the 4 tokens of a column gives a word of the output, and the words leave through shared memory
// as rows of 128 bytes.
//
// A block takes one tile. cast_transpose_kernel: 128 tokens by 128 bytes, of which a warp takes one pack of all tokens,
// so that after the copy to shared memory no warp needs another. both_casts_kernel: 128 by 128; maxima of columns and
// rows go over a warp of 8 packs by 16 tokens, then through shared memory.
#include "../ops.h"
#include "tile.cuh"

namespace dsv3 {
namespace {

constexpr int kQuads = kTile / 4;  // of tokens

struct CastTransposeParams {
  uint8_t* out;        // [K, Tp]
  float* out_sf;       // [Tp / 128][out_sf_stride]
  const void* x;       // [T, K]
  const float* x_sf;   // e4m3: [ceil(K / 128)][x_sf_stride]
  const int* offsets;  // [G + 1], or null: one group of all tokens
  RowCasts rows;       // both casts: [T, K] and its scales
  uint32_t x_sf_stride;
  uint32_t out_sf_stride;
  int64_t slots;  // Tp
  int tokens, hidden;
  int groups;
  uint32_t column_tiles;
  ScaleRule rule;
};

template <class T>
constexpr bool kIsCast = sizeof(T) == 1;

// The tile of a block, columns fastest.
struct Place {
  uint32_t column, row;
};
__device__ __forceinline__ Place place(const CastTransposeParams& p) {
  return {blockIdx.x % p.column_tiles, blockIdx.x / p.column_tiles};
}

// Rows of x: of a group, or of a tile of the output.
struct Rows {
  int first, count;
  __device__ __forceinline__ int tiles() const { return (count + kTile - 1) / kTile; }
};

// Offsets that are not what they should be give wrong rows, but none outside of x.
__device__ __forceinline__ Rows group_rows(const CastTransposeParams& p, int g) {
  const int first = min(max(p.offsets[g], 0), p.tokens), end = min(max(p.offsets[g + 1], 0), p.tokens);
  return {first, max(end - first, 0)};
}

// Which rows of x a tile of the output holds; count 0: it is padding. For whole warps, a lane of which counts the tiles
// of its share of the groups.
__device__ __forceinline__ Rows find_rows(const CastTransposeParams& p, int tile) {
  if (p.offsets == nullptr) return {tile * kTile, min(kTile, p.tokens - tile * kTile)};
  const int lane = threadIdx.x % kWarpSize, share = (p.groups + kWarpSize - 1) / kWarpSize;
  int tiles = 0;
#pragma unroll 4
  for (int g = lane * share; g < min((lane + 1) * share, p.groups); ++g) tiles += group_rows(p, g).tiles();
  int end = tiles;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, end, offset);
    if (lane >= offset) end += other;
  }
  const uint32_t after = __ballot_sync(0xffffffffu, end > tile);
  if (after == 0) return {0, 0};
  const int owner = __ffs(after) - 1;
  tile -= __shfl_sync(0xffffffffu, end - tiles, owner);
  int g = owner * share;
  Rows rows = group_rows(p, g);
  for (; tile >= rows.tiles(); rows = group_rows(p, ++g)) tile -= rows.tiles();
  return {rows.first + tile * kTile, min(kTile, rows.count - tile * kTile)};
}

// What a thread holds: 4 tokens of 16 bytes of columns, with their scales where x is e4m3.
template <class T>
struct Piece {
  Pack<T> packs[4];
  float sf[4];

  // Columns 4 * chunk to 4 * chunk + 3 of token r.
  __device__ __forceinline__ void values(int r, int chunk, float (&x)[4]) const {
    unpack(packs[r], chunk, x);
#pragma unroll
    for (int v = 0; kIsCast<T> && v < 4; ++v) x[v] = __fmul_rn(x[v], sf[r]);
  }
};

constexpr int kThreads = kLanePacks * kWarpSize;
// Blocks a multiprocessor that registers must be left for: while one waits for its tile, the others convert theirs. On
// an H100 6 are best from e4m3, and 4 from bf16 (6: 33.4 us against 31.9 at 4096 x 7168).
template <class T>
constexpr int kBlocks = kIsCast<T> ? 6 : 4;

// A tile: pack j of token t lies at [t][j ^ t / 4 % 8], so that the 8 packs of a token, which are copied together,
// share a line, and the same pack of 8 quads, which are read together, lies in different banks.
template <class T>
struct Shared {
  uint4 packs[kTile][kLanePacks];
  float sf[kIsCast<T> ? kTile : 4];
  float scales[kLanePacks][Pack<T>::kSize];  // of a warp's columns: maxima, then inverses
};

template <class T>
__device__ __forceinline__ void copy_tile(Shared<T>& shared, const CastTransposeParams& p, uint32_t column_tile,
                                          const Rows& rows) {
  const int pack = threadIdx.x % kLanePacks, row = threadIdx.x / kLanePacks;
  const int column = (column_tile * kLanePacks + pack) * Pack<T>::kSize;
  const int live = column < p.hidden ? rows.count : 0;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(rows.first + row) * p.hidden + column;
  constexpr int kStep = kThreads / kLanePacks;  // a multiple of 32 tokens: the place in the line stays the same
#pragma unroll
  for (int i = 0; i < kTile; i += kStep, x += static_cast<int64_t>(kStep) * p.hidden)
    copy_async(&shared.packs[row + i][pack ^ row / 4 % 8], x, row + i < live);
  if constexpr (kIsCast<T>) {
    static_assert(kLanePacks * Pack<T>::kSize == kTile && kThreads >= kTile);
    const int t = threadIdx.x;
    const float* const sf = p.x_sf + column_tile * p.x_sf_stride + rows.first;
    if (t < kTile) copy_async(&shared.sf[t], sf + t, t < rows.count);
  }
  wait_for_copies();
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) cast_transpose_kernel(CastTransposeParams p) {
  constexpr int kSize = Pack<T>::kSize;
  __shared__ Shared<T> shared;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  wait_for_inputs();
  release_dependents();
  const Place at = place(p);
  const Rows rows = find_rows(p, at.row);
  copy_tile(shared, p, at.column, rows);

  // Lane q has tokens 4 q to 4 q + 3 of the warp's pack.
  Piece<T> piece;
#pragma unroll
  for (int r = 0; r < 4; ++r) piece.packs[r] = load_shared<T>(shared.packs[4 * lane + r][warp ^ lane % 8]);
  if constexpr (kIsCast<T>) reinterpret_cast<float4&>(piece.sf) = reinterpret_cast<const float4*>(shared.sf)[lane];
  float* const scales = shared.scales[warp];
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

  const int first = (at.column * kLanePacks + warp) * kSize;  // column; all of the warp's exist or none
  const bool live = first < p.hidden;
  if (lane < kSize) {
    const float sf = rows.count == 0 ? 1.f : tile_scale(scales[lane], p.rule);
    scales[lane] = __frcp_rn(sf);
    if (live) p.out_sf[at.row * p.out_sf_stride + first + lane] = sf;
  }
  __syncwarp();

  // The words take the place of the warp's packs: that of quad q and column c goes where token 32 (c / 4) + 4 (q / 4) +
  // c % 4 was, which puts the words of a column into different banks.
  auto* const words = reinterpret_cast<uint32_t*>(&shared.packs[lane / 4 * 4][warp ^ lane / 4]) + lane % 4;
#pragma unroll
  for (int c = 0; c < kSize; c += 4) {
    const float4 inverse = *reinterpret_cast<const float4*>(scales + c);
    const float factors[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
    float x[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) piece.values(r, c / 4, x[r]);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float tokens[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
      words[(8 * c + v) * 4 * kLanePacks] = encode(tokens, factors[v]);
    }
  }
  __syncwarp();
  if (!live) return;
  const int column = lane / 8, chunk = lane % 8;
  uint8_t* out = p.out + (first + column) * p.slots + at.row * kTile + chunk * 16;
#pragma unroll
  for (int c = 0; c < kSize; c += 4, out += 4 * p.slots)
    *reinterpret_cast<uint4*>(out) = shared.packs[8 * c + 4 * chunk + column][warp ^ chunk];
}

constexpr int kWarpRows = kTile / 16;  // warps that share columns; each has 16 tokens of 8 packs

// With both casts: the tile of a thread block has whole tiles of 1 x 128.
template <class T>
struct Shape {
  static constexpr int kPacks = kTile / Pack<T>::kSize;  // of columns
  static constexpr int kParts = kPacks / kLanePacks;     // warps that share rows
  static constexpr int kThreads = kPacks * kQuads;
  static constexpr int kBlocks = 1024 / kThreads;  // a multiprocessor
};

template <class T>
struct BothShared {
  using S = Shape<T>;
  float maxima[kWarpRows][kTile];
  float inverses[kTile];
  float row_maxima[S::kParts][kTile];
  float row_inverses[kTile];
  ByteTile<T, S::kPacks> bytes;
};

// The thread's quad of tokens, which of the warps that share rows it is in, and its first column in the tile.
__device__ __forceinline__ int thread_quad() { return threadIdx.x / kLanePacks % kQuads; }
__device__ __forceinline__ int thread_part() { return threadIdx.x / (kLanePacks * kQuads); }
template <class T>
__device__ __forceinline__ int thread_column() {
  return (threadIdx.x % kLanePacks + thread_part() * kLanePacks) * Pack<T>::kSize;
}

template <class T>
__device__ __forceinline__ Piece<T> load_piece(const CastTransposeParams& p, uint32_t column_tile, const Rows& rows) {
  const int quad = thread_quad(), row = rows.first + 4 * quad;
  const int column = column_tile * kTile + thread_column<T>();
  const int live = column < p.hidden ? rows.count - 4 * quad : 0;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.hidden + column;
  Piece<T> piece;
#pragma unroll
  for (int r = 0; r < 4; ++r, x += p.hidden) piece.packs[r] = load_pack(x, r < live);
  return piece;
}

// Absolute maxima, with any sign, of a warp's columns over its 16 tokens: in every lane those of its own columns.
template <class T>
__device__ __forceinline__ void column_maxima(const Piece<T>& piece, float (&amax)[Pack<T>::kSize]) {
  Pack<T> maxima = piece.packs[0];
#pragma unroll
  for (int r = 1; r < 4; ++r) abs_max(maxima, piece.packs[r]);
#pragma unroll
  for (int offset = kLanePacks; offset < kWarpSize; offset *= 2) {
    Pack<T> other;
#pragma unroll
    for (int i = 0; i < 4; ++i) other.words[i] = __shfl_xor_sync(0xffffffffu, maxima.words[i], offset);
    abs_max(maxima, other);
  }
#pragma unroll
  for (int c = 0; c < Pack<T>::kSize; c += 4) unpack(maxima, c / 4, reinterpret_cast<float (&)[4]>(amax[c]));
}

// Absolute maxima, with any sign, of the thread's 4 tokens over the 8 packs of its warp.
__device__ __forceinline__ void row_maxima(const Piece<__nv_bfloat16>& piece, float (&amax)[4]) {
  constexpr __nv_bfloat16 kPairs{};
  uint32_t max[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t (&words)[4] = piece.packs[r].words;
    max[r] =
        abs_max_words(abs_max_words(words[0], words[1], kPairs), abs_max_words(words[2], words[3], kPairs), kPairs);
  }
#pragma unroll
  for (int r = 0; r < 4; r += 2) {
    const uint32_t even = __byte_perm(max[r], max[r + 1], 0x5410), odd = __byte_perm(max[r], max[r + 1], 0x7632);
    uint32_t two = abs_max_words(even, odd, kPairs);
#pragma unroll
    for (int offset = kLanePacks / 2; offset > 0; offset /= 2) {
      two = abs_max_words(two, __shfl_xor_sync(0xffffffffu, two, offset), kPairs);
    }
    amax[r] = __uint_as_float(two << 16);
    amax[r + 1] = __uint_as_float(two & 0xffff0000u);
  }
}
__device__ __forceinline__ void row_maxima(const Piece<float>& piece, float (&amax)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    amax[r] = abs_max(piece.packs[r]);
#pragma unroll
    for (int offset = kLanePacks / 2; offset > 0; offset /= 2) {
      amax[r] = abs_max(amax[r], __shfl_xor_sync(0xffffffffu, amax[r], offset));
    }
  }
}

// The scales of the tile's columns, from the maxima of the warps; their inverses stay in shared memory.
template <class T>
__device__ __forceinline__ void column_scales(BothShared<T>& shared, const CastTransposeParams& p, const Place& at,
                                              bool padding) {
  if (threadIdx.x >= kTile) return;
  float max = 0.f;
#pragma unroll
  for (int w = 0; w < kWarpRows; ++w) max = abs_max(max, shared.maxima[w][threadIdx.x]);
  const float sf = padding ? 1.f : tile_scale(max, p.rule);
  shared.inverses[threadIdx.x] = __frcp_rn(sf);
  const int column = at.column * kTile + threadIdx.x;
  if (column < p.hidden) p.out_sf[at.row * p.out_sf_stride + column] = sf;
}

// The same of its rows, by the threads after those.
template <class T>
__device__ __forceinline__ void row_scales(BothShared<T>& shared, const CastTransposeParams& p, const Place& at,
                                           const Rows& rows) {
  const int row = threadIdx.x - kTile;
  if (row < 0 || row >= kTile) return;
  float max = 0.f;
#pragma unroll
  for (int part = 0; part < Shape<T>::kParts; ++part) max = abs_max(max, shared.row_maxima[part][row]);
  const float sf = tile_scale(max, p.rule);
  shared.row_inverses[row] = __frcp_rn(sf);
  if (row < rows.count) p.rows.sf[at.column * p.rows.sf_stride + rows.first + row] = sf;
}

// Converts what a thread holds, by the scales of the columns and by those of the rows, whose codes are written.
template <class T>
__device__ __forceinline__ void convert(BothShared<T>& shared, const CastTransposeParams& p, const Piece<T>& piece,
                                        const Place& at, const Rows& rows) {
  constexpr int kWords = Pack<T>::kSize / 4;
  const int column = thread_column<T>(), quad = thread_quad();
  const float4 row_inverse = reinterpret_cast<const float4&>(shared.row_inverses[4 * quad]);
  const float row_factors[4] = {row_inverse.x, row_inverse.y, row_inverse.z, row_inverse.w};
  uint32_t words[4][kWords];  // of the rows
#pragma unroll
  for (int c = 0; c < kWords; ++c) {
    const float4 inverse = *reinterpret_cast<const float4*>(&shared.inverses[column + 4 * c]);
    const float factors[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
    float x[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      piece.values(r, c, x[r]);
      words[r][c] = encode(x[r], row_factors[r]);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float tokens[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
      shared.bytes.put(column + 4 * c + v, quad, encode(tokens, factors[v]));
    }
  }
  const int first = rows.first + 4 * quad, start = at.column * kTile + column;
  const int live = start < p.hidden ? rows.count - 4 * quad : 0;
  uint8_t* out = p.rows.out + static_cast<int64_t>(first) * p.hidden + start;
#pragma unroll
  for (int r = 0; r < 4; ++r, out += p.hidden) {
    if (r < live) store_words(out, words[r]);
  }
}

template <class T>
__global__ void __launch_bounds__(Shape<T>::kThreads, Shape<T>::kBlocks) both_casts_kernel(CastTransposeParams p) {
  using S = Shape<T>;
  constexpr int kSize = Pack<T>::kSize;
  __shared__ BothShared<T> shared;
  wait_for_inputs();
  release_dependents();
  const Place at = place(p);
  const Rows rows = find_rows(p, at.row);
  const Piece<T> piece = load_piece<T>(p, at.column, rows);
  float amax[kSize], row_amax[4];
  column_maxima(piece, amax);
  if (threadIdx.x % kWarpSize < kLanePacks) {
    auto* const maxima =
        reinterpret_cast<float4*>(&shared.maxima[threadIdx.x / kWarpSize % kWarpRows][thread_column<T>()]);
#pragma unroll
    for (int c = 0; c < kSize; c += 4) maxima[c / 4] = make_float4(amax[c], amax[c + 1], amax[c + 2], amax[c + 3]);
  }
  row_maxima(piece, row_amax);
  auto& maxima = reinterpret_cast<float4&>(shared.row_maxima[thread_part()][4 * thread_quad()]);
  if (threadIdx.x % kLanePacks == 0) maxima = make_float4(row_amax[0], row_amax[1], row_amax[2], row_amax[3]);
  __syncthreads();
  column_scales(shared, p, at, rows.count == 0);
  row_scales(shared, p, at, rows);
  __syncthreads();
  convert(shared, p, piece, at, rows);
  __syncthreads();
  const int64_t first = at.column * kTile;
  shared.bytes.template store<S::kThreads>(p.out + first * p.slots + at.row * kTile, p.slots, p.hidden - first, kTile);
}

template <class T>
void launch_cast_transpose(CastTransposeParams p, cudaStream_t stream) {
  p.column_tiles = ceil_div(p.hidden, kLanePacks * Pack<T>::kSize);
  launch("cast_transpose", cast_transpose_kernel<T>,
         {.grid = dim3(p.column_tiles * (p.slots / kTile)), .block = dim3(kThreads)}, stream, p);
}

template <class T>
void launch_both_casts(CastTransposeParams p, cudaStream_t stream) {
  p.column_tiles = ceil_div(p.hidden, kTile);
  launch("per_token_cast_and_transpose", both_casts_kernel<T>,
         {.grid = dim3(p.column_tiles * (p.slots / kTile)), .block = dim3(Shape<T>::kThreads)}, stream, p);
}

// Checks what both ops share.
CastTransposeParams transpose_params(const Tensor& xt_fp8, const Tensor& xt_sf, const Tensor& x,
                                     const std::optional<Tensor>& offsets, ScaleRule rule) {
  DSV3_CHECK(x.dim() == 2 && x.size(1) % 16 == 0, "x must be (tokens, a multiple of 16), got ", x);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const int64_t groups = offsets ? offsets->numel() - 1 : 1;
  check_operand("x", x, x.dtype());
  DSV3_CHECK(groups >= 1, "offsets must have at least two entries, got ", groups + 1);
  if (offsets) check_operand("offsets", *offsets, Dtype::kInt32, groups + 1);
  const int64_t slots = ceil_div(tokens + (offsets ? (kTile - 1) * groups : 0), kTile) * kTile;
  check_operand("xt_fp8", xt_fp8, Dtype::kE4M3, hidden, slots);
  const int64_t out_sf_stride = check_row_scales("xt_sf", xt_sf, hidden, slots / kTile);
  return {.out = xt_fp8.data<uint8_t>(),
          .out_sf = xt_sf.data<float>(),
          .x = x.data<void>(),
          .x_sf = nullptr,
          .offsets = offsets ? offsets->data<int>() : nullptr,
          .rows = {},
          .x_sf_stride = 0,
          .out_sf_stride = static_cast<uint32_t>(out_sf_stride),
          .slots = slots,
          .tokens = static_cast<int>(tokens),
          .hidden = static_cast<int>(hidden),
          .groups = static_cast<int>(groups),
          .column_tiles = 0,
          .rule = rule};
}

}  // namespace

void cast_transpose(Tensor xt_fp8, Tensor xt_sf, Tensor x, std::optional<Tensor> x_sf, std::optional<Tensor> offsets,
                    bool pow2_scale, double amax_floor, cudaStream_t stream) {
  CastTransposeParams params = transpose_params(xt_fp8, xt_sf, x, offsets, scale_rule(amax_floor, pow2_scale));
  DSV3_CHECK(x_sf.has_value() == (x.dtype() == Dtype::kE4M3), "x_sf goes with an x in float8_e4m3fn, got ", x);
  const DeviceGuard guard(x);
  if (x_sf) {
    const int64_t stride = check_row_scales("x_sf", *x_sf, x.size(0), ceil_div(x.size(1), kTile));
    params.x_sf = x_sf->data<float>();
    params.x_sf_stride = static_cast<uint32_t>(stride);
    return launch_cast_transpose<E4M3>(params, stream);
  }
  visit_float("x", x.dtype(), [&](auto zero) { launch_cast_transpose<decltype(zero)>(params, stream); });
}

void per_token_cast_and_transpose(Tensor x_fp8, Tensor x_sf, Tensor xt_fp8, Tensor xt_sf, Tensor x,
                                  std::optional<Tensor> offsets, bool pow2_scale, double amax_floor,
                                  cudaStream_t stream) {
  const ScaleRule rule = scale_rule(amax_floor, pow2_scale);
  CastTransposeParams params = transpose_params(xt_fp8, xt_sf, x, offsets, rule);
  params.rows = row_casts("x_fp8", x_fp8, "x_sf", x_sf, x.size(0), x.size(1), rule);
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) { launch_both_casts<decltype(zero)>(params, stream); });
}

}  // namespace dsv3
