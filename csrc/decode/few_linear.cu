// Linear layers of few tokens: out_i [T, N_i] = x W_i^T for up to kMatrices matrices that read the same x [T, K]; and
// out [T, G, N] = x [T, G, K] W^T with a matrix for every head. Roofline: N K weights, once; bf16, or FP8 without heads. A
// block takes 16 rows of a matrix, its warps share K (few_tokens.cuh); of one matrix of many rows, 64 and all of K
// (few_tiles.cuh). Weights that nobody writes are asked for before the kernel ahead has ended.
#include "../ops.h"
#include "few_tiles.cuh"
#include "few_tokens.cuh"

namespace dsv3 {
namespace {

constexpr int kMatrices = 4;
constexpr int kManyRows = 7168;  // of which there are tiles for nearly every multiprocessor

struct Matrix {
  const void* weight;   // [N, K] of the first head
  const float* scales;  // of FP8, [blocks of N, blocks of K]
  void* out;            // [T, N] of the first head
  int64_t out_stride;   // elements between tokens
  int rows;
};

struct FewLinearParams {
  Matrix matrices[kMatrices];
  const bf16* x;                          // [T, K] of the first head
  int64_t x_stride;                       // elements between tokens
  int64_t x_head, weight_head, out_head;  // elements between heads
  int tokens, depth;
  bool wide_out, fp8, static_weights;
};

template <int kTiles>
__device__ __forceinline__ void store_sums(const FewLinearParams& p, const Matrix& m, const float* sums, int first,
                                           int row) {
  const int warps = blockDim.x / kWarpSize;
  for (int i = threadIdx.x; i < kTiles * kTokenTile * kRowTile; i += blockDim.x) {
    const int at = i / kRowTile, r = i % kRowTile, token = first + at;
    if (token >= p.tokens) return;
    const float* const place = sums + at / kTokenTile * kSumTile + at % kTokenTile * kSumStride + r;
    const float sum = add_sums(place, warps, kTiles * kSumTile);
    const int64_t to = token * m.out_stride + blockIdx.y * p.out_head + row + r;
    if (p.wide_out) {
      static_cast<float*>(m.out)[to] = sum;
    } else {
      static_cast<bf16*>(m.out)[to] = __float2bfloat16_rn(sum);
    }
  }
}

template <int kTiles, class W>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) few_linear_kernel(FewLinearParams p) {
  extern __shared__ float sums[];  // [warps, kTiles, kSumTile]
  const int warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  int row = blockIdx.x * kRowTile, index = 0;
  for (; row >= p.matrices[index].rows; ++index) row -= p.matrices[index].rows;
  const Matrix& m = p.matrices[index];
  const auto* const mine = static_cast<const typename W::Element*>(m.weight) + blockIdx.y * p.weight_head +
                           static_cast<int64_t>(row + lane_row()) * p.depth;
  const float* const scales = m.scales + static_cast<int64_t>(row / kScaleBlock) * ceil_div(p.depth, kScaleBlock);
  W weights;
  if (p.static_weights) weights.load(mine, scales, warp, p.depth);
  wait_for_inputs();
  release_dependents();
  for (int first = 0; first < p.tokens; first += kTiles * kTokenTile) {
    const TokenRows<kTiles> x(p.x + blockIdx.y * p.x_head, p.x_stride, first, p.tokens);
    float sum[kTiles][4] = {};
    for (int chunk = warp; chunk * kChunk < p.depth; chunk += warps) {
      weights.load(mine, scales, chunk, p.depth);
      weights.multiply(sum, x, p.depth);
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) leave_sums(sums + (warp * kTiles + i) * kSumTile, sum[i]);
    __syncthreads();
    store_sums<kTiles>(p, m, sums, first, row);
    __syncthreads();
  }
}

void launch_few_linear(const char* name, const FewLinearParams& p, int heads, cudaStream_t stream) {
  int64_t rows = 0;
  for (const Matrix& m : p.matrices) rows += m.rows;
  if (p.tokens == 0) return;
  visit_tiles(p.tokens, [&](auto count) {
    constexpr int kTiles = decltype(count)::value;
    const int warps = depth_warps(p.depth);
    Launch shape{.grid = dim3(rows / kRowTile, heads),
                 .block = dim3(warps * kWarpSize),
                 .smem = sizeof(float) * warps * kTiles * kSumTile};
    // Heads whose blocks have a multiprocessor each: all of its memory but theirs as L1. More would wait for each other.
    if (heads > 1 && rows / kRowTile * heads <= sm_count()) shape.carveout = 0;
    launch(name, p.fp8 ? few_linear_kernel<kTiles, Codes> : few_linear_kernel<kTiles, Values>, shape, stream, p);
  });
}

struct ManyRowsParams {
  CUtensorMap weight;   // [N, K]
  const float* scales;  // of FP8
  const bf16* x;        // [T, K]
  void* out;            // [T, N]
  int rows, depth, tokens;
  bool wide_out, static_weights;
};

// As few_tiles.cuh wants it.
struct ManyRowsWork {
  const ManyRowsParams& p;
  int row_of_tile = 0;  // the tile's first
  __device__ __forceinline__ int tiles() const { return ceil_div(p.rows, kTileRows); }
  __device__ __forceinline__ int depth() const { return p.depth; }
  __device__ __forceinline__ int begin(int tile) {
    row_of_tile = tile * kTileRows;
    return p.tokens;
  }
  __device__ __forceinline__ void list(int, bool) {}
  __device__ __forceinline__ void load(uint8_t* to, int column, uint64_t& full) const {
    tma_load(to, p.weight, full, column, row_of_tile, cute::TMA::CacheHintSm90::EVICT_FIRST);
  }
  __device__ __forceinline__ const float* scales(int) const {
    return p.scales + static_cast<int64_t>(row_of_tile / kScaleBlock) * ceil_div(p.depth, kScaleBlock);
  }
  __device__ __forceinline__ const bf16* x() const { return p.x; }
  __device__ __forceinline__ int row(int token) const { return token; }
  template <int kTokens, int kStride>
  __device__ __forceinline__ void store(const float (&sums)[kTokens][kStride], int first, int thread,
                                        int threads) const {
    constexpr int kPairs = kTileRows / 2;
    for (int i = thread; i < min(p.tokens - first, kTokens) * kPairs; i += threads) {
      const int at = i / kPairs, r = i % kPairs * 2;
      if (row_of_tile + r >= p.rows) continue;
      const float2 sum = *reinterpret_cast<const float2*>(&sums[at][r]);
      const int64_t to = static_cast<int64_t>(first + at) * p.rows + row_of_tile + r;
      if (p.wide_out) {
        *reinterpret_cast<float2*>(static_cast<float*>(p.out) + to) = sum;
      } else {
        *reinterpret_cast<__nv_bfloat162*>(static_cast<bf16*>(p.out) + to) = __floats2bfloat162_rn(sum.x, sum.y);
      }
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) many_rows_kernel(const __grid_constant__ ManyRowsParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<TileShared<C>*>(raw);
  static_assert(sizeof(TileShared<C>) <= kHalfOfMemory);
  if (threadIdx.x == 0) {
    shared.ring.init();
    cute::prefetch_tma_descriptor(&p.weight);
  }
  __syncthreads();
  if (!p.static_weights) wait_for_inputs();
  ManyRowsWork work{p};
  run_tiles(shared, work, [] {
    wait_for_inputs();
    release_dependents();
  });
}

void launch_many_rows(const FewLinearParams& few, cudaStream_t stream) {
  const Matrix& m = few.matrices[0];
  const ManyRowsParams p{.weight = weight_map(m.weight, few.fp8, m.rows, few.depth, kTileRows),
                         .scales = m.scales,
                         .x = few.x,
                         .out = m.out,
                         .rows = m.rows,
                         .depth = few.depth,
                         .tokens = few.tokens,
                         .wide_out = few.wide_out,
                         .static_weights = few.static_weights};
  visit_tile_config<0>(p.tokens, few.fp8, [&](auto config) {
    using C = decltype(config);
    const Launch shape = tile_launch<C>(ceil_div(p.rows, kTileRows), sizeof(TileShared<C>));
    launch("few_linear", many_rows_kernel<C>, shape, stream, p);
  });
}

void check_depth(const char* name, const Tensor& x, int multiple) {
  DSV3_CHECK(x.size(0) <= kFewTokens, name, " must have at most ", kFewTokens, " tokens, got ", x);
  DSV3_CHECK(x.size(-1) % multiple == 0 && x.size(-1) > 0, name, " must have a multiple of ", multiple,
             " columns, got ", x);
}

}  // namespace

void few_linear(std::vector<Tensor> outs, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> scales,
                bool static_weights, cudaStream_t stream) {
  const bool fp8 = !scales.empty();
  check_operand("x", x, Dtype::kBFloat16);
  DSV3_CHECK(x.dim() == 2, "x must be (tokens, depth), got ", x);
  check_depth("x", x, fp8 ? kStep / 2 : kStep);
  DSV3_CHECK(!fp8 || scales.size() == weights.size(), "expected scales for each of ", weights.size(), " weights, got ",
             scales.size());
  DSV3_CHECK(!weights.empty() && weights.size() <= kMatrices && outs.size() == weights.size(), "expected 1 to ",
             kMatrices, " weights and as many outputs, got ", weights.size(), " and ", outs.size());
  const Dtype dtype = outs[0].dtype();
  DSV3_CHECK(dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat32, "out must be bfloat16 or float32, got ", outs[0]);
  FewLinearParams p{.x = x.data<bf16>(),
                    .x_stride = x.size(1),
                    .tokens = static_cast<int>(x.size(0)),
                    .depth = static_cast<int>(x.size(1)),
                    .wide_out = dtype == Dtype::kFloat32,
                    .fp8 = fp8,
                    .static_weights = static_weights};
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rows = weights[i].size(0);
    check_operand("weight", weights[i], fp8 ? Dtype::kE4M3 : Dtype::kBFloat16, rows, x.size(1));
    if (fp8) {
      const int64_t blocks = ceil_div(x.size(1), kScaleBlock);
      check_scales("scales", scales[i]);
      check_shape("scales", scales[i], ceil_div(rows, kScaleBlock), blocks);
    }
    check_operand("out", outs[i], dtype, x.size(0), rows);
    DSV3_CHECK(rows % kRowTile == 0, "weight must have a multiple of ", kRowTile, " rows, got ", weights[i]);
    p.matrices[i] = {.weight = weights[i].data<void>(),
                     .scales = fp8 ? scales[i].data<float>() : nullptr,
                     .out = outs[i].data<void>(),
                     .out_stride = rows,
                     .rows = static_cast<int>(rows)};
  }
  const DeviceGuard guard(x);
  const bool many = weights.size() == 1 && p.matrices[0].rows >= kManyRows && p.tokens > 0;
  many ? launch_many_rows(p, stream) : launch_few_linear("few_linear", p, 1, stream);
}

void few_heads(Tensor out, Tensor x, Tensor weight, bool static_weights, cudaStream_t stream) {
  check_operand("x", x, Dtype::kBFloat16);
  DSV3_CHECK(x.dim() == 3 && weight.dim() == 3,
             "x must be (tokens, heads, depth) and weight (heads, rows, depth), got ", x, " and ", weight);
  check_depth("x", x, kStep);
  const int64_t heads = x.size(1), depth = x.size(2), rows = weight.size(1);
  check_operand("out", out, Dtype::kBFloat16, x.size(0), heads, rows);
  check_shape("weight", weight, heads, rows, depth);
  DSV3_CHECK(weight.is_cuda() && weight.dtype() == Dtype::kBFloat16 && weight.stride(1) == depth &&
                 weight.stride(2) == 1 && weight.stride(0) % 8 == 0 && weight.aligned(16),
             "weight must be bfloat16 on a CUDA device, its matrices contiguous and 16-byte aligned, got ", weight);
  DSV3_CHECK(rows % kRowTile == 0, "weight must have a multiple of ", kRowTile, " rows a head, got ", weight);
  FewLinearParams p{.x = x.data<bf16>(),
                    .x_stride = heads * depth,
                    .x_head = depth,
                    .weight_head = weight.stride(0),
                    .out_head = rows,
                    .tokens = static_cast<int>(x.size(0)),
                    .depth = static_cast<int>(depth),
                    .static_weights = static_weights};
  p.matrices[0] = {.weight = weight.data<void>(),
                   .out = out.data<void>(),
                   .out_stride = heads * rows,
                   .rows = static_cast<int>(rows)};
  const DeviceGuard guard(x);
  launch_few_linear("few_heads", p, static_cast<int>(heads), stream);
}

}  // namespace dsv3
