// Cast of weights to e4m3 in blocks of 128 x 128, and of their transpose from the same read.
//
//   sf[n, k] = max |w[block n, k]| / 448 (or the power of two above; 1 for a block of zeros);  q = e4m3(w * (1 / sf))
//
// w [G, N, K] (G matrices), K a multiple of 16; q [G, N, K]; sf [G, ceil(N / 128), ceil(K / 128)]. A block is square,
// so the transpose has the same bytes: qt [G, K, N] (N a multiple of 16), sft [G, ceil(K / 128), ceil(N / 128)].
// Memory-bound: 3 bytes a bf16 value, 4 with the transpose. One thread block a tile, held in registers from the maximum
// to the conversion: a thread has 4 rows of 16-byte vectors, so that it can turn 4 x 4 bytes around on its own; the
// words of 4 rows then go through shared memory and leave as rows of 128 bytes.
#include "../ops.h"
#include "e4m3.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = 512;

struct PerBlockParams {
  uint8_t* out;    // [G, N, K]
  float* sf;       // [G, row tiles, column tiles]
  uint8_t* out_t;  // [G, K, N] or null
  float* sf_t;     // [G, column tiles, row tiles] or null
  const void* w;   // [G, N, K]
  int rows, columns;
  int row_tiles, column_tiles;
  bool pow2;
};

// in[r] has the bytes of row r for 4 columns; out[c] gets those of column c for the 4 rows.
__device__ __forceinline__ void transpose_bytes(const uint32_t (&in)[4], uint32_t (&out)[4]) {
  const uint32_t low01 = __byte_perm(in[0], in[1], 0x5140), high01 = __byte_perm(in[0], in[1], 0x7362);
  const uint32_t low23 = __byte_perm(in[2], in[3], 0x5140), high23 = __byte_perm(in[2], in[3], 0x7362);
  out[0] = __byte_perm(low01, low23, 0x5410);
  out[1] = __byte_perm(low01, low23, 0x7632);
  out[2] = __byte_perm(high01, high23, 0x5410);
  out[3] = __byte_perm(high01, high23, 0x7632);
}

template <class T, bool kTranspose>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 2 ? 3 : 2) per_block_cast_kernel(PerBlockParams p) {
  constexpr int kSize = Pack<T>::kSize;
  constexpr int kRowPacks = kTile / kSize;
  constexpr int kQuadStep = kThreads / kRowPacks;  // quads of rows that the block covers at a time
  constexpr int kParts = kTile / 4 / kQuadStep;    // pieces of 4 rows x kSize columns a thread
  __shared__ float scratch[kThreads / kWarpSize];
  __shared__ ByteTile tile;  // where kTranspose
  wait_for_inputs();
  release_dependents();
  const int column_tile = blockIdx.x % p.column_tiles;
  const int row_tile = blockIdx.x / p.column_tiles % p.row_tiles;
  const int64_t matrix = blockIdx.x / p.column_tiles / p.row_tiles;
  const int rows = min(kTile, p.rows - row_tile * kTile), columns = min(kTile, p.columns - column_tile * kTile);
  const int column = threadIdx.x % kRowPacks * kSize,
            quad = threadIdx.x / kRowPacks;                 // quad of rows, of the first part
  const int live = column < columns ? rows - 4 * quad : 0;  // rows from the quad's first on
  const int64_t start = (matrix * p.rows + row_tile * kTile + 4 * quad) * p.columns + column_tile * kTile + column;
  const int64_t step = static_cast<int64_t>(4 * kQuadStep) * p.columns;

  Pack<T> w[kParts][4];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const T* source = static_cast<const T*>(p.w) + start + i * step;
#pragma unroll
    for (int r = 0; r < 4; ++r, source += p.columns) w[i][r] = load_pack(source, i * 4 * kQuadStep + r < live);
  }
  Pack<T> maxima = w[0][0];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) abs_max(maxima, w[i][r]);
  }
  const float amax = block_reduce<MaxNan, kThreads>(abs_max(maxima), scratch);
  const float sf = tile_scale(amax, {0.f, p.pow2}), inverse = __frcp_rn(sf);
  if (threadIdx.x == 0) {
    p.sf[blockIdx.x] = sf;
    if (kTranspose) p.sf_t[(matrix * p.column_tiles + column_tile) * p.row_tiles + row_tile] = sf;
  }

#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    uint8_t* target = p.out + start + i * step;
    uint32_t words[kSize / 4][4];  // [4 columns][row]
#pragma unroll
    for (int r = 0; r < 4; ++r, target += p.columns) {
      uint32_t row_words[kSize / 4];
#pragma unroll
      for (int c = 0; c < kSize / 4; ++c) {
        float x[4];
        unpack(w[i][r], c, x);
        row_words[c] = encode(x, inverse);
        words[c][r] = row_words[c];
      }
      if (i * 4 * kQuadStep + r < live) store_words(target, row_words);
    }
    if constexpr (kTranspose) {
#pragma unroll
      for (int c = 0; c < kSize / 4; ++c) {
        uint32_t turned[4];
        transpose_bytes(words[c], turned);
#pragma unroll
        for (int v = 0; v < 4; ++v) tile.put(column + 4 * c + v, quad + i * kQuadStep, turned[v]);
      }
    }
  }
  if constexpr (kTranspose) {
    __syncthreads();
    uint8_t* const out = p.out_t + (matrix * p.columns + column_tile * kTile) * p.rows + row_tile * kTile;
    store_transposed<kThreads>(tile, out, p.rows, columns, rows);
  }
}

}  // namespace

void per_block_cast(Tensor w_fp8, Tensor w_sf, std::optional<Tensor> wt_fp8, std::optional<Tensor> wt_sf, Tensor w,
                    bool pow2_scale, cudaStream_t stream) {
  DSV3_CHECK(w.dim() == 3 && w.size(2) % 16 == 0, "w must be (matrices, rows, a multiple of 16), got ", w);
  const int64_t matrices = w.size(0), rows = w.size(1), columns = w.size(2);
  const int64_t row_tiles = ceil_div(rows, kTile), column_tiles = ceil_div(columns, kTile);
  check_operand("w", w, w.dtype());
  check_operand("w_fp8", w_fp8, Dtype::kE4M3, matrices, rows, columns);
  check_operand("w_sf", w_sf, Dtype::kFloat32, matrices, row_tiles, column_tiles);
  DSV3_CHECK(wt_fp8.has_value() == wt_sf.has_value(), "wt_fp8 and wt_sf go together");
  if (wt_fp8) {
    DSV3_CHECK(rows % 16 == 0, "the rows of w must be a multiple of 16 to be transposed, got ", w);
    check_operand("wt_fp8", *wt_fp8, Dtype::kE4M3, matrices, columns, rows);
    check_operand("wt_sf", *wt_sf, Dtype::kFloat32, matrices, column_tiles, row_tiles);
  }
  const DeviceGuard guard(w);
  visit_float("w", w.dtype(), [&](auto zero) {
    using T = decltype(zero);
    const PerBlockParams params = {.out = w_fp8.data<uint8_t>(),
                                   .sf = w_sf.data<float>(),
                                   .out_t = wt_fp8 ? wt_fp8->data<uint8_t>() : nullptr,
                                   .sf_t = wt_sf ? wt_sf->data<float>() : nullptr,
                                   .w = w.data<T>(),
                                   .rows = static_cast<int>(rows),
                                   .columns = static_cast<int>(columns),
                                   .row_tiles = static_cast<int>(row_tiles),
                                   .column_tiles = static_cast<int>(column_tiles),
                                   .pow2 = pow2_scale};
    launch("per_block_cast", wt_fp8 ? per_block_cast_kernel<T, true> : per_block_cast_kernel<T, false>,
           {.grid = dim3(matrices * row_tiles * column_tiles), .block = dim3(kThreads)}, stream, params);
  });
}

}  // namespace dsv3
