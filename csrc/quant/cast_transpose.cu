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
// Memory-bound: 3 bytes a bf16 value, 2 an e4m3 one. A tile of a thread block is 128 tokens by 128 bytes; while one is
// converted, the copies of the next are under way. A thread holds 4 tokens of 16 bytes: the maxima of the columns go
// over its warp, then through shared memory; converting the 4 tokens of a column gives a word of the output, and the
// words leave through shared memory as rows of 128 bytes.
#include "../ops.h"
#include "tile.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = kLanePacks * (kTile / 4);
constexpr int kWarps = kThreads / kWarpSize;

struct CastTransposeParams {
  uint8_t* out;        // [K, Tp]
  float* out_sf;       // [Tp / 128][out_sf_stride]
  const void* x;       // [T, K]
  const float* x_sf;   // e4m3: [ceil(K / 128)][x_sf_stride]
  const int* offsets;  // [G + 1], or null: one group of all tokens
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
template <class T>
constexpr int kColumns = kLanePacks * Pack<T>::kSize;  // of a tile
template <class T>
constexpr int kBlocks = kIsCast<T> ? 4 : 6;  // a multiprocessor

template <class T>
struct Shared {
  uint4 staged[4][kThreads];
  float staged_sf[kIsCast<T> ? 4 : 1][kThreads];
  float maxima[kWarps][kColumns<T>];
  float inverses[kColumns<T>];
  ByteTile<T, kLanePacks> bytes;
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

template <class T>
__device__ __forceinline__ int thread_column() {
  return threadIdx.x % kLanePacks * Pack<T>::kSize;
}

template <class T>
__device__ __forceinline__ void stage(Shared<T>& shared, const CastTransposeParams& p, uint32_t column_tile,
                                      const Rows& rows) {
  const int quad = threadIdx.x / kLanePacks, row = rows.first + 4 * quad;
  const int column = column_tile * kColumns<T> + thread_column<T>();
  const int live = column < p.hidden ? rows.count - 4 * quad : 0;
  const T* x = static_cast<const T*>(p.x) + static_cast<int64_t>(row) * p.hidden + column;
#pragma unroll
  for (int r = 0; r < 4; ++r, x += p.hidden) copy_async(&shared.staged[r][threadIdx.x], x, r < live);
  if constexpr (kIsCast<T>) {
    static_assert(kColumns<T> == kTile);
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

  __device__ __forceinline__ explicit Piece(const Shared<T>& shared) {
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

// The scales of the tile's columns, from the maxima of the warps; their inverses stay in shared memory.
template <class T>
__device__ __forceinline__ void column_scales(Shared<T>& shared, const CastTransposeParams& p, const Tiling::Place& at,
                                              bool padding) {
  if (threadIdx.x >= kColumns<T>) return;
  float max = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) max = abs_max(max, shared.maxima[w][threadIdx.x]);
  const float sf = padding ? 1.f : tile_scale(max, p.rule);
  shared.inverses[threadIdx.x] = __frcp_rn(sf);
  const int column = at.column * kColumns<T> + threadIdx.x;
  if (column < p.hidden) p.out_sf[at.row * p.out_sf_stride + column] = sf;
}

// Converts what a thread holds; the 4 tokens of a column are a word of the output.
template <class T>
__device__ __forceinline__ void convert(Shared<T>& shared, const Piece<T>& piece) {
  const int column = thread_column<T>();
#pragma unroll
  for (int c = 0; c < Pack<T>::kSize; c += 4) {
    const float4 inverse = *reinterpret_cast<const float4*>(&shared.inverses[column + c]);
    const float factors[4] = {inverse.x, inverse.y, inverse.z, inverse.w};
    float x[4][4];
#pragma unroll
    for (int r = 0; r < 4; ++r) piece.values(r, c / 4, x[r]);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const float tokens[4] = {x[0][v], x[1][v], x[2][v], x[3][v]};
      shared.bytes.put(column + c + v, threadIdx.x / kLanePacks, encode(tokens, factors[v]));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) cast_transpose_kernel(CastTransposeParams p) {
  constexpr int kSize = Pack<T>::kSize;
  alignas(16) __shared__ Shared<T> shared;
  const Tiling& tiling = p.tiling;
  wait_for_inputs();
  release_dependents();
  RowFinder finder(p);
  Tiling::Place at = tiling.place(blockIdx.x);
  Rows rows = finder.find(p, at.row);
  stage(shared, p, at.column, rows);
  while (tiling.holds(at)) {
    wait_for_copies();
    Piece<T> piece(shared);
    const bool padding = rows.count == 0;
    const Tiling::Place next = tiling.next(at);
    if (tiling.holds(next)) {
      rows = finder.find(p, next.row);
      stage(shared, p, next.column, rows);
    }
    float amax[kSize];
    column_maxima(piece, amax);
    if (threadIdx.x % kWarpSize < kLanePacks) {
      auto* const maxima = reinterpret_cast<float4*>(&shared.maxima[threadIdx.x / kWarpSize][thread_column<T>()]);
#pragma unroll
      for (int c = 0; c < kSize; c += 4) maxima[c / 4] = make_float4(amax[c], amax[c + 1], amax[c + 2], amax[c + 3]);
    }
    __syncthreads();
    column_scales(shared, p, at, padding);
    __syncthreads();
    convert(shared, piece);
    __syncthreads();
    const int64_t first = at.column * kColumns<T>;
    shared.bytes.template store<kThreads>(p.out + first * p.slots + at.row * kTile, p.slots, p.hidden - first, kTile);
    at = next;
  }
}

template <class T>
void launch_cast_transpose(CastTransposeParams p, cudaStream_t stream) {
  p.tiling = {1, p.slots / kTile, ceil_div(p.hidden, kColumns<T>), sm_count() * kBlocks<T>};
  launch("cast_transpose", cast_transpose_kernel<T>, {.grid = dim3(p.tiling.blocks), .block = dim3(kThreads)}, stream,
         p);
}

}  // namespace

void cast_transpose(Tensor xt_fp8, Tensor xt_sf, Tensor x, std::optional<Tensor> x_sf, std::optional<Tensor> offsets,
                    bool pow2_scale, double amax_floor, cudaStream_t stream) {
  DSV3_CHECK(x.dim() == 2 && x.size(1) % 16 == 0, "x must be (tokens, a multiple of 16), got ", x);
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const int64_t groups = offsets ? offsets->numel() - 1 : 1;
  check_operand("x", x, x.dtype());
  DSV3_CHECK(groups >= 1, "offsets must have at least two entries, got ", groups + 1);
  if (offsets) check_operand("offsets", *offsets, Dtype::kInt32, groups + 1);
  const int64_t slots = ceil_div(tokens + (offsets ? (kTile - 1) * groups : 0), kTile) * kTile;
  check_operand("xt_fp8", xt_fp8, Dtype::kE4M3, hidden, slots);
  const int64_t out_sf_stride = check_row_scales("xt_sf", xt_sf, hidden, slots / kTile);
  DSV3_CHECK(x_sf.has_value() == (x.dtype() == Dtype::kE4M3), "x_sf goes with an x in float8_e4m3fn, got ", x);
  const int64_t x_sf_stride = x_sf ? check_row_scales("x_sf", *x_sf, tokens, ceil_div(hidden, kTile)) : 0;
  const DeviceGuard guard(x);
  const CastTransposeParams params = {.out = xt_fp8.data<uint8_t>(),
                                      .out_sf = xt_sf.data<float>(),
                                      .x = x.data<char>(),
                                      .x_sf = x_sf ? x_sf->data<float>() : nullptr,
                                      .offsets = offsets ? offsets->data<int>() : nullptr,
                                      .x_sf_stride = static_cast<uint32_t>(x_sf_stride),
                                      .out_sf_stride = static_cast<uint32_t>(out_sf_stride),
                                      .slots = slots,
                                      .tokens = static_cast<int>(tokens),
                                      .hidden = static_cast<int>(hidden),
                                      .groups = static_cast<int>(groups),
                                      .tiling = {},
                                      .rule = scale_rule(amax_floor, pow2_scale)};
  if (x_sf) return launch_cast_transpose<E4M3>(params, stream);
  visit_float("x", x.dtype(), [&](auto zero) { launch_cast_transpose<decltype(zero)>(params, stream); });
}

}  // namespace dsv3
