// Cast to e4m3 and transpose for weight gradients: tiles of 128 tokens x 1, tokens contiguous in the output.
//
//   qt[k, s] = e4m3(x[t(s), k] * (1 / sft[k, s / 128])),  sft = max(max over the tile |x[t, k]|, floor) / 448 (or pow2)
//
// x [T, K] bf16 or fp32, or already cast: e4m3 with one scale a token and 128 columns (x = q * sf in fp32); K a
// multiple of 16. qt [K, Tp]; sft [K, Tp / 128] with the columns contiguous. With offsets int32 [G + 1] the rows of
// group g go to P[g], P[g + 1] = P[g] + 128 * ceil(len_g / 128), so that no tile mixes groups; the slots that have no
// token are 0, and a tile without tokens has scale 1. A thread block finds the rows of its tiles by a scan over the
// group lengths on the device, so the host never waits for the counts. Rows past offsets[G] are not read.
//
// With kRows also the cast of x in tiles of 1 x 128, as per_token_cast makes it, from the same read: what a gradient
// needs, for dgrad and for wgrad. Rows past offsets[G] are not written there either.
//
// Memory-bound: 3 bytes a bf16 value, 2 an e4m3 one; 4 with kRows. A tile of a thread block is 128 tokens by 128 bytes (by
// 128 columns with kRows); while one is converted, the copies of the next are under way. A thread holds 4 tokens of 16
// bytes: the maxima of the columns (and rows) go over its warp, then through shared memory; converting the 4 tokens of a
// column gives a word of the output, and the words leave through shared memory as rows of 128 bytes.
#include "../ops.h"
#include "tile.cuh"

namespace dsv3 {
namespace {

constexpr int kQuads = kTile / 4;      // of tokens
constexpr int kWarpRows = kTile / 16;  // warps that share columns; each has 16 tokens of 8 packs

struct CastTransposeParams {
  uint8_t* out;        // [K, Tp]
  float* out_sf;       // [Tp / 128][out_sf_stride]
  const void* x;       // [T, K]
  const float* x_sf;   // e4m3: [ceil(K / 128)][x_sf_stride]
  const int* offsets;  // [G + 1], or null: one group of all tokens
  RowCasts rows;       // where kRows: [T, K] and its scales
  uint32_t x_sf_stride;
  uint32_t out_sf_stride;
  int64_t slots;  // Tp
  int tokens, hidden;
  int groups;
  Tiling tiling;
  ScaleRule rule;
};

template <class T>
constexpr bool kIsCast = sizeof(T) == 1;

// The tile of a thread block.
template <class T, bool kRows>
struct Shape {
  static constexpr int kPacks = kRows ? kTile / Pack<T>::kSize : kLanePacks;  // of columns
  static constexpr int kColumns = kPacks * Pack<T>::kSize;
  static constexpr int kParts = kPacks / kLanePacks;  // warps that share rows
  static constexpr int kThreads = kPacks * kQuads;
  static constexpr int kBlocks = kIsCast<T> ? 4 : kRows ? 1024 / kThreads : 6;  // a multiprocessor
};

template <class T, bool kRows>
struct Shared {
  using S = Shape<T, kRows>;
  uint4 staged[4][S::kThreads];
  float staged_sf[kIsCast<T> ? 4 : 1][S::kThreads];
  float maxima[kWarpRows][S::kColumns];
  float inverses[S::kColumns];
  float row_maxima[S::kParts][kRows ? kTile : 4];
  float row_inverses[kRows ? kTile : 4];
  ByteTile<T, S::kPacks> bytes;
};

struct Rows {
  int first, count;
};

// Which rows of x a tile of the output holds; asked for tiles in ascending order, by whole warps. A lane keeps one of
// 32 groups. Offsets that are not what they should be give wrong rows, but none outside of x.
class RowFinder {
 public:
  __device__ __forceinline__ explicit RowFinder(const CastTransposeParams& p) {
    if (p.offsets != nullptr) load(p);
  }
  // count 0: a tile of padding.
  __device__ __forceinline__ Rows find(const CastTransposeParams& p, int tile) {
    if (p.offsets == nullptr) return {tile * kTile, min(kTile, p.tokens - tile * kTile)};
    while (true) {
      const uint32_t after = __ballot_sync(0xffffffffu, tiles_ > tile);
      if (after != 0) {
        const int owner = __ffs(after) - 1;
        const int first = __shfl_sync(0xffffffffu, padded_ - (tiles_ - tile) * kTile, owner);
        return {first, min(kTile, __shfl_sync(0xffffffffu, end_, owner) - first)};
      }
      if (start_ + kWarpSize >= p.groups) return {0, 0};
      start_ += kWarpSize;
      load(p);
    }
  }

 private:
  __device__ __forceinline__ void load(const CastTransposeParams& p) {
    const int lane = threadIdx.x % kWarpSize, g = start_ + lane;
    const int begin = g < p.groups ? max(p.offsets[g], 0) : 0;
    end_ = g < p.groups ? min(p.offsets[g + 1], p.tokens) : 0;
    const int tiles = (max(end_ - begin, 0) + kTile - 1) / kTile;
    padded_ = begin + tiles * kTile;
    int sum = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, offset);
      if (lane >= offset) sum += other;
    }
    tiles_ = before_ + sum;
    before_ += __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
  }

  int start_ = 0;   // first of the 32 groups
  int before_ = 0;  // tiles up to the end of these
  int tiles_ = 0;   // tiles up to the end of the lane's group
  int end_ = 0;     // where its rows end
  int padded_ = 0;  // and where they would, with whole tiles
};

// The thread's quad of tokens, which of the warps that share rows it is in, and its first column in the tile.
__device__ __forceinline__ int thread_quad() { return threadIdx.x / kLanePacks % kQuads; }
__device__ __forceinline__ int thread_part() { return threadIdx.x / (kLanePacks * kQuads); }
template <class T>
__device__ __forceinline__ int thread_column() {
  return (threadIdx.x % kLanePacks + thread_part() * kLanePacks) * Pack<T>::kSize;
}

template <class T, bool kRows>
__device__ __forceinline__ void stage(Shared<T, kRows>& shared, const CastTransposeParams& p, uint32_t column_tile,
                                      const Rows& rows) {
  constexpr int kColumns = Shape<T, kRows>::kColumns;
  const int quad = thread_quad(), row = rows.first + 4 * quad;
  const int column = column_tile * kColumns + thread_column<T>();
  const int live = column < p.hidden ? rows.count - 4 * quad : 0;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.hidden + column;
#pragma unroll
  for (int r = 0; r < 4; ++r, x += p.hidden) copy_async(&shared.staged[r][threadIdx.x], x, r < live);
  if constexpr (kIsCast<T>) {
    static_assert(kColumns == kTile);
    const float* const sf = p.x_sf + column_tile * p.x_sf_stride + row;
#pragma unroll
    for (int r = 0; r < 4; ++r) copy_async(&shared.staged_sf[r][threadIdx.x], sf + r, r < live);
  }
}

// What a thread holds: 4 tokens of 16 bytes of columns, with their scales where x is e4m3.
template <class T>
struct Piece {
  Pack<T> packs[4];
  float sf[4];

  template <bool kRows>
  __device__ __forceinline__ explicit Piece(const Shared<T, kRows>& shared) {
#pragma unroll
    for (int r = 0; r < 4; ++r) packs[r] = load_shared<T>(shared.staged[r][threadIdx.x]);
#pragma unroll
    for (int r = 0; kIsCast<T> && r < 4; ++r) sf[r] = shared.staged_sf[r][threadIdx.x];
  }
  // Columns 4 * chunk to 4 * chunk + 3 of token r.
  __device__ __forceinline__ void values(int r, int chunk, float (&x)[4]) const {
    unpack(packs[r], chunk, x);
#pragma unroll
    for (int v = 0; kIsCast<T> && v < 4; ++v) x[v] = __fmul_rn(x[v], sf[r]);
  }
};

// Absolute maxima, with any sign, of a warp's columns over its 16 tokens: in every lane those of its own columns.
template <class T>
__device__ __forceinline__ void column_maxima(Piece<T>& piece, float (&amax)[Pack<T>::kSize]) {
  if constexpr (kIsCast<T>) {
#pragma unroll
    for (int c = 0; c < Pack<T>::kSize; c += 4) {
      float x[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) piece.values(r, c / 4, x[r]);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        float max = abs_max(abs_max(x[0][v], x[1][v]), abs_max(x[2][v], x[3][v]));
        max = abs_max(max, __shfl_xor_sync(0xffffffffu, max, kLanePacks));
        amax[c + v] = abs_max(max, __shfl_xor_sync(0xffffffffu, max, 2 * kLanePacks));
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) forget(piece.packs[r]);
  } else {
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
template <class T, bool kRows>
__device__ __forceinline__ void column_scales(Shared<T, kRows>& shared, const CastTransposeParams& p,
                                              const Tiling::Place& at, bool padding) {
  constexpr int kColumns = Shape<T, kRows>::kColumns;
  if (threadIdx.x >= kColumns) return;
  float max = 0.f;
#pragma unroll
  for (int w = 0; w < kWarpRows; ++w) max = abs_max(max, shared.maxima[w][threadIdx.x]);
  const float sf = padding ? 1.f : tile_scale(max, p.rule);
  shared.inverses[threadIdx.x] = __frcp_rn(sf);
  const int column = at.column * kColumns + threadIdx.x;
  if (column < p.hidden) p.out_sf[at.row * p.out_sf_stride + column] = sf;
}

// The same of its rows, by the threads after those.
template <class T>
__device__ __forceinline__ void row_scales(Shared<T, true>& shared, const CastTransposeParams& p,
                                           const Tiling::Place& at, const Rows& rows) {
  const int row = threadIdx.x - Shape<T, true>::kColumns;
  if (row < 0 || row >= kTile) return;
  float max = 0.f;
#pragma unroll
  for (int part = 0; part < Shape<T, true>::kParts; ++part) max = abs_max(max, shared.row_maxima[part][row]);
  const float sf = tile_scale(max, p.rule);
  shared.row_inverses[row] = __frcp_rn(sf);
  if (row < rows.count) p.rows.sf[at.column * p.rows.sf_stride + rows.first + row] = sf;
}

// Converts what a thread holds; the 4 tokens of a column are a word of the output. With kRows also by the scales of the
// rows, which are written.
template <class T, bool kRows>
__device__ __forceinline__ void convert(Shared<T, kRows>& shared, const CastTransposeParams& p, const Piece<T>& piece,
                                        const Tiling::Place& at, const Rows& rows) {
  constexpr int kWords = Pack<T>::kSize / 4;
  const int column = thread_column<T>(), quad = thread_quad();
  float4 row_inverse = {};
  if constexpr (kRows) row_inverse = reinterpret_cast<const float4&>(shared.row_inverses[4 * quad]);
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
      if constexpr (kRows) words[r][c] = encode(x[r], row_factors[r]);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float tokens[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
      shared.bytes.put(column + 4 * c + v, quad, encode(tokens, factors[v]));
    }
  }
  if constexpr (kRows) {
    const int first = rows.first + 4 * quad, start = at.column * Shape<T, kRows>::kColumns + column;
    const int live = start < p.hidden ? rows.count - 4 * quad : 0;
    uint8_t* out = p.rows.out + static_cast<int64_t>(first) * p.hidden + start;
#pragma unroll
    for (int r = 0; r < 4; ++r, out += p.hidden) {
      if (r < live) store_words(out, words[r]);
    }
  }
}

template <class T, bool kRows>
__global__ void __launch_bounds__(Shape<T, kRows>::kThreads, Shape<T, kRows>::kBlocks)
    cast_transpose_kernel(CastTransposeParams p) {
  using S = Shape<T, kRows>;
  constexpr int kSize = Pack<T>::kSize;
  extern __shared__ uint4 raw[];
  auto& shared = *reinterpret_cast<Shared<T, kRows>*>(raw);
  const Tiling& tiling = p.tiling;
  wait_for_inputs();
  release_dependents();
  RowFinder finder(p);
  Tiling::Place at = tiling.place(blockIdx.x);
  Rows next_rows = finder.find(p, at.row);
  stage(shared, p, at.column, next_rows);
  while (tiling.holds(at)) {
    wait_for_copies();
    Piece<T> piece(shared);
    const Rows rows = next_rows;
    const Tiling::Place next = tiling.next(at);
    if (tiling.holds(next)) {
      next_rows = finder.find(p, next.row);
      stage(shared, p, next.column, next_rows);
    }
    float amax[kSize];
    column_maxima(piece, amax);
    if (threadIdx.x % kWarpSize < kLanePacks) {
      auto* const maxima =
          reinterpret_cast<float4*>(&shared.maxima[threadIdx.x / kWarpSize % kWarpRows][thread_column<T>()]);
#pragma unroll
      for (int c = 0; c < kSize; c += 4) maxima[c / 4] = make_float4(amax[c], amax[c + 1], amax[c + 2], amax[c + 3]);
    }
    if constexpr (kRows) {
      float max[4];
      row_maxima(piece, max);
      auto& maxima = reinterpret_cast<float4&>(shared.row_maxima[thread_part()][4 * thread_quad()]);
      if (threadIdx.x % kLanePacks == 0) maxima = make_float4(max[0], max[1], max[2], max[3]);
    }
    __syncthreads();
    column_scales(shared, p, at, rows.count == 0);
    if constexpr (kRows) row_scales(shared, p, at, rows);
    __syncthreads();
    convert(shared, p, piece, at, rows);
    __syncthreads();
    const int64_t first = at.column * S::kColumns;
    shared.bytes.template store<S::kThreads>(p.out + first * p.slots + at.row * kTile, p.slots, p.hidden - first,
                                             kTile);
    at = next;
  }
}

template <class T, bool kRows>
void launch_cast_transpose(const char* name, CastTransposeParams p, cudaStream_t stream) {
  using S = Shape<T, kRows>;
  p.tiling = {1, p.slots / kTile, ceil_div(p.hidden, S::kColumns), sm_count() * S::kBlocks};
  launch(name, cast_transpose_kernel<T, kRows>,
         {.grid = dim3(p.tiling.blocks), .block = dim3(S::kThreads), .smem = sizeof(Shared<T, kRows>)}, stream, p);
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
          .tiling = {},
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
    return launch_cast_transpose<E4M3, false>("cast_transpose", params, stream);
  }
  visit_float("x", x.dtype(),
              [&](auto zero) { launch_cast_transpose<decltype(zero), false>("cast_transpose", params, stream); });
}

void per_token_cast_and_transpose(Tensor x_fp8, Tensor x_sf, Tensor xt_fp8, Tensor xt_sf, Tensor x,
                                  std::optional<Tensor> offsets, bool pow2_scale, double amax_floor,
                                  cudaStream_t stream) {
  const ScaleRule rule = scale_rule(amax_floor, pow2_scale);
  CastTransposeParams params = transpose_params(xt_fp8, xt_sf, x, offsets, rule);
  params.rows = row_casts("x_fp8", x_fp8, "x_sf", x_sf, x.size(0), x.size(1), rule);
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) {
    launch_cast_transpose<decltype(zero), true>("per_token_cast_and_transpose", params, stream);
  });
}

}  // namespace dsv3
