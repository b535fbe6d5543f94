// Cast of weights to e4m3 in blocks of 128 x 128, and of their transpose from the same read.
//
//   sf[n, k] = max |w[block n, k]| / 448 (or the power of two above; 1 for a block of zeros);  q = e4m3(w * (1 / sf))
//
// w [G, N, K] (G matrices), K a multiple of 16; q [G, N, K]; sf [G, ceil(N / 128), ceil(K / 128)]. A block is square,
// so the transpose has the same bytes: qt [G, K, N] (N a multiple of 16), sft [G, ceil(K / 128), ceil(N / 128)].
// Memory-bound: 3 bytes a bf16 value, 4 with the transpose. Thread blocks walk over the tiles; while one is converted,
// the copies of the next are under way. A tile is in registers from the maximum to the conversion, 4 rows of 16 bytes a
// thread, so that a thread can turn 4 x 4 bytes around on its own; the words of 4 rows then go through shared memory
// and leave as rows of 128 bytes.
#include "../ops.h"
#include "tile.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = 512;
constexpr int kGroupThreads = kLanePacks * (kTile / 4);  // hold 8 packs of the 128 rows

struct PerBlockParams {
  uint8_t* out;    // [G, N, K]
  float* sf;       // [G, row tiles, column tiles]
  uint8_t* out_t;  // [G, K, N], where kTranspose
  float* sf_t;     // [G, column tiles, row tiles]
  const void* w;   // [G, N, K]
  int rows, columns;
  Tiling tiling;
  bool pow2;
};

template <class T>
constexpr int kPacks = kTile / Pack<T>::kSize;  // of a row of the tile
template <class T>
constexpr int kParts = kPacks<T> / kLanePacks * kGroupThreads / kThreads;  // of 4 packs, a thread
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 3 : 2;  // a multiprocessor

template <class T, bool kTranspose>
struct Shared {
  uint4 staged[kParts<T>][4][kThreads];
  float maxima[2][kThreads / kWarpSize];
  ByteTile<T, kTranspose ? kPacks<T> : 1> bytes;  // unused without kTranspose
};

// Where a thread's part of a tile begins, and how many rows of it exist.
template <class T>
struct Part {
  int column;     // in the tile
  int live;       // rows from the thread's first on, at most 0 where the part does not exist
  int64_t start;  // element of w

  __device__ __forceinline__ Part(const PerBlockParams& p, const Tiling::Place& at, int part) {
    constexpr int kGroups = kThreads / kGroupThreads;
    const int row = threadIdx.x / kLanePacks % (kTile / 4) * 4;
    column = (threadIdx.x % kLanePacks + (threadIdx.x / kGroupThreads + part * kGroups) * kLanePacks) * Pack<T>::kSize;
    live = at.column * kTile + column < p.columns ? p.rows - static_cast<int>(at.row) * kTile - row : 0;
    const int64_t first_row = static_cast<int64_t>(at.matrix) * p.rows + at.row * kTile + row;
    start = first_row * p.columns + at.column * kTile + column;
  }
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
__device__ __forceinline__ void stage(Shared<T, kTranspose>& shared, const PerBlockParams& p, const Tiling::Place& at) {
#pragma unroll
  for (int i = 0; i < kParts<T>; ++i) {
    const Part<T> part(p, at, i);
    const T* w = static_cast<const T*>(p.w) + part.start;
#pragma unroll
    for (int r = 0; r < 4; ++r, w += p.columns)
      copy_async(shared_pointer(&shared.staged[i][r][threadIdx.x]), w, r < part.live);
  }
}

// Converts a part, writes its rows, and leaves its columns in shared memory.
template <class T, bool kTranspose>
__device__ __forceinline__ void convert(Shared<T, kTranspose>& shared, const PerBlockParams& p, const Part<T>& part,
                                        const Pack<T> (&w)[4], float inverse) {
  constexpr int kWords = Pack<T>::kSize / 4;
  uint32_t words[kWords][4];  // [4 columns][row]
  uint8_t* out = p.out + part.start;
#pragma unroll
  for (int r = 0; r < 4; ++r, out += p.columns) {
    uint32_t row_words[kWords];
#pragma unroll
    for (int c = 0; c < kWords; ++c) {
      float x[4];
      unpack(w[r], c, x);
      words[c][r] = row_words[c] = encode(x, inverse);
    }
    if (r < part.live) store_words(out, row_words);
  }
  if constexpr (kTranspose) {
    const int quad = threadIdx.x / kLanePacks % (kTile / 4);
#pragma unroll
    for (int c = 0; c < kWords; ++c) {
      uint32_t turned[4];
      transpose_bytes(words[c], turned);
#pragma unroll
      for (int v = 0; v < 4; ++v) shared.bytes.put(part.column + 4 * c + v, quad, turned[v]);
    }
  }
}

template <class T, bool kTranspose>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) per_block_cast_kernel(PerBlockParams p) {
  extern __shared__ uint4 raw[];
  auto& shared = *reinterpret_cast<Shared<T, kTranspose>*>(raw);
  const Tiling& tiling = p.tiling;
  wait_for_inputs();
  release_dependents();
  Tiling::Place at = tiling.place(blockIdx.x);
  stage(shared, p, at);
  for (int phase = 0; tiling.holds(at); phase ^= 1) {
    Pack<T> w[kParts<T>][4];
    wait_for_copies();
#pragma unroll
    for (int i = 0; i < kParts<T>; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) w[i][r] = load_shared<T>(shared.staged[i][r][threadIdx.x]);
    }
    const Tiling::Place next = tiling.next(at);
    if (tiling.holds(next)) stage(shared, p, next);

    Pack<T> maxima = w[0][0];
#pragma unroll
    for (int i = 0; i < kParts<T>; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) abs_max(maxima, w[i][r]);
    }
    const float amax = block_reduce<MaxNan, kThreads>(abs_max(maxima), shared.maxima[phase]);
    const float sf = tile_scale(amax, {0.f, p.pow2}), inverse = __frcp_rn(sf);
    if (threadIdx.x == 0) {
      p.sf[(at.matrix * tiling.rows + at.row) * tiling.columns + at.column] = sf;
      if (kTranspose) p.sf_t[(at.matrix * tiling.columns + at.column) * tiling.rows + at.row] = sf;
    }
#pragma unroll
    for (int i = 0; i < kParts<T>; ++i) convert(shared, p, Part<T>(p, at, i), w[i], inverse);
    if constexpr (kTranspose) {
      __syncthreads();
      const int64_t first_column = static_cast<int64_t>(at.matrix) * p.columns + at.column * kTile;
      shared.bytes.template store<kThreads>(p.out_t + first_column * p.rows + at.row * kTile, p.rows,
                                            p.columns - at.column * kTile, p.rows - at.row * kTile);
    }
    at = next;
  }
}

template <class T, bool kTranspose>
void launch_per_block_cast(const PerBlockParams& p, cudaStream_t stream) {
  launch("per_block_cast", per_block_cast_kernel<T, kTranspose>,
         {.grid = dim3(p.tiling.blocks), .block = dim3(kThreads), .smem = sizeof(Shared<T, kTranspose>)}, stream, p);
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
                                   .tiling = {matrices, row_tiles, column_tiles, sm_count() * kBlocks<T>},
                                   .pow2 = pow2_scale};
    wt_fp8 ? launch_per_block_cast<T, true>(params, stream) : launch_per_block_cast<T, false>(params, stream);
  });
}

}  // namespace dsv3
