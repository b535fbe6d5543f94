// Tokens to expert order and back.
//
//   permutation: the stable order by expert of the T*k pairs (token, slot): offsets [E+1], source [T*k] (the pair in a
//   row) and
//                position [T, k] (the row of a pair)
//   permute:     rows[position[t, j]] = x[t], or its codes and scales
//   unpermute:   out[t] = sum_j y[position[t, j]] (* weights[t, j])
//
// The order is found by counting, without a sort: every block counts the experts of its run of pairs; then it adds up
// the counts of the blocks before it and gives each pair its rank. Permute and unpermute are memory-bound, one block a
// token: x is read once and written k times, y read once and summed in the order of the slots in fp32. Scales stay column
// by column, as products want them, and go by rows in blocks of their own: a token's, written by its block, would be a word
// in each of many sectors (106 us instead of 76 for the codes alone, 4096 x 7168).
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxBlocks = 64;  // of the permutation
constexpr int kMaxExperts = 1024;
constexpr int kMaxTopk = 16;
constexpr int kTile = 128;      // columns of a scale
constexpr int kScaleTiles = 8;  // of a row, by a thread

struct PermutationParams {
  int* offsets;             // [E + 1]
  int64_t* source;          // [pairs]
  int64_t* position;        // [pairs]
  int* block_counts;        // [blocks, E]
  const int64_t* topk_idx;  // [pairs]
  int64_t pairs;
  int64_t warp_pairs;  // consecutive pairs of a warp, a multiple of 32
  int experts;
};

// Calls f(pair, expert, mask of the lanes with the same expert) for the warp's pairs in order; expert is -1 past the
// last.
template <class F>
__device__ __forceinline__ void for_pairs(const PermutationParams& p, F&& f) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize) * p.warp_pairs;
  for (int64_t i = 0; i < p.warp_pairs; i += kWarpSize) {
    const int64_t pair = first + i + lane;
    const int expert = pair < p.pairs ? static_cast<int>(p.topk_idx[pair]) : -1;
    f(pair, expert, __match_any_sync(0xffffffffu, expert));
    __syncwarp();
  }
}

// warp_counts[w][e] = pairs of warp w with expert e
__device__ __forceinline__ void count(const PermutationParams& p, int* warp_counts) {
  for (int i = threadIdx.x; i < kWarps * p.experts; i += kThreads) warp_counts[i] = 0;
  __syncthreads();
  int* const mine = warp_counts + threadIdx.x / kWarpSize * p.experts;
  for_pairs(p, [&](int64_t, int expert, unsigned same) {
    if (expert >= 0 && threadIdx.x % kWarpSize == __ffs(same) - 1) mine[expert] += __popc(same);
  });
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) count_kernel(PermutationParams p) {
  extern __shared__ int warp_counts[];  // [kWarps, E]
  wait_for_inputs();
  release_dependents();
  count(p, warp_counts);
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_counts[w * p.experts + e];
    p.block_counts[blockIdx.x * p.experts + e] = sum;
  }
}

__global__ void __launch_bounds__(kThreads) place_kernel(PermutationParams p) {
  extern __shared__ int warp_counts[];  // [kWarps, E], then totals [E + 1]
  int* const totals = warp_counts + kWarps * p.experts;
  wait_for_inputs();
  release_dependents();
  count(p, warp_counts);
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int before = 0, total = 0;
#pragma unroll 8
    for (int b = 0; b < gridDim.x; ++b) {
      const int n = p.block_counts[b * p.experts + e];
      total += n;
      before += b < blockIdx.x ? n : 0;
    }
    totals[e] = total;
    // From counts of the warps to where each warp's first pair of this expert goes, relative to the expert's first row.
    for (int w = 0; w < kWarps; ++w) {
      const int n = warp_counts[w * p.experts + e];
      warp_counts[w * p.experts + e] = before;
      before += n;
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {  // exclusive scan of the totals by one warp
    int carry = 0;
    for (int e = threadIdx.x; e - threadIdx.x < p.experts; e += kWarpSize) {
      const int n = e < p.experts ? totals[e] : 0;
      int sum = n;
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, offset);
        if (threadIdx.x >= offset) sum += other;
      }
      if (e < p.experts) totals[e] = carry + sum - n;
      carry += __shfl_sync(0xffffffffu, sum, kWarpSize - 1);
    }
    if (threadIdx.x == 0) totals[p.experts] = carry;
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int e = threadIdx.x; e <= p.experts; e += kThreads) p.offsets[e] = totals[e];
  }
  int* const mine = warp_counts + threadIdx.x / kWarpSize * p.experts;
  const unsigned before_me = (1u << threadIdx.x % kWarpSize) - 1;
  for_pairs(p, [&](int64_t pair, int expert, unsigned same) {
    const int base = expert >= 0 ? mine[expert] : 0;
    __syncwarp();
    if (expert < 0) return;
    if ((same & before_me) == 0) mine[expert] = base + __popc(same);
    const int64_t row = totals[expert] + base + __popc(same & before_me);
    p.position[pair] = row;
    p.source[row] = pair;
  });
}

struct RowsParams {
  void* out;
  const void* in;
  const int64_t* position;  // [T, k]
  const float* weights;     // [T, k] or null
  int hidden, topk;
};

struct ScaleParams {
  float* out;  // [T*k, tiles], column by column
  const float* in;
  const int64_t* source;  // [T*k]
  int64_t out_stride, in_stride, rows;
  int tiles, topk;
};

template <class T>
__device__ __forceinline__ void permute_token(const RowsParams& p, int64_t t) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ int64_t rows[kMaxTopk];
  if (threadIdx.x < p.topk) rows[threadIdx.x] = p.position[t * p.topk + threadIdx.x];
  __syncthreads();
  for (int v = threadIdx.x; v < p.hidden / kSize; v += kThreads) {
    const Vec<T> x = load(static_cast<const T*>(p.in) + t * p.hidden + v * kSize);
#pragma unroll 8
    for (int j = 0; j < p.topk; ++j) store(static_cast<T*>(p.out) + rows[j] * p.hidden + v * kSize, x);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) permute_kernel(RowsParams p) {
  wait_for_inputs();
  release_dependents();
  permute_token<T>(p, blockIdx.x);
}

// The first blocks have scales, a thread those of a row in some tiles: neighbours write neighbours. The others have tokens.
__global__ void __launch_bounds__(kThreads) permute_cast_kernel(RowsParams p, ScaleParams s, int scale_blocks) {
  wait_for_inputs();
  release_dependents();
  const int block = static_cast<int>(blockIdx.x);
  if (block >= scale_blocks) return permute_token<uint8_t>(p, block - scale_blocks);
  const int groups = ceil_div(s.tiles, kScaleTiles), first = block % groups * kScaleTiles;
  const int64_t row = static_cast<int64_t>(block / groups) * kThreads + threadIdx.x;
  if (row >= s.rows) return;
  const int64_t token = s.source[row] / s.topk;
  for (int tile = first; tile < min(first + kScaleTiles, s.tiles); ++tile) {
    s.out[tile * s.out_stride + row] = s.in[tile * s.in_stride + token];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) unpermute_kernel(RowsParams p) {
  constexpr int kSize = Vec<T>::kSize, kBatch = 8;  // rows in flight
  __shared__ int64_t rows[kMaxTopk];
  __shared__ float weights[kMaxTopk];
  wait_for_inputs();
  release_dependents();
  const int64_t t = blockIdx.x;
  if (threadIdx.x < p.topk) {
    rows[threadIdx.x] = p.position[t * p.topk + threadIdx.x];
    weights[threadIdx.x] = p.weights ? p.weights[t * p.topk + threadIdx.x] : 1.f;
  }
  __syncthreads();
  for (int v = threadIdx.x; v < p.hidden / kSize; v += kThreads) {
    float sum[kSize] = {};
    for (int first = 0; first < p.topk; first += kBatch) {
      Vec<T> y[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j < p.topk) y[j] = load(static_cast<const T*>(p.in) + rows[first + j] * p.hidden + v * kSize);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (first + j >= p.topk) continue;
        float values[kSize];
        unpack(y[j], values);
        // Without fused multiply-add: product and sum are rounded as the reference rounds them.
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] = __fadd_rn(sum[i], __fmul_rn(values[i], weights[first + j]));
      }
    }
    Vec<T> out;
    pack(sum, out);
    store(static_cast<T*>(p.out) + t * p.hidden + v * kSize, out);
  }
}

// Checks tokens [T, H], rows [T*k, H] and position [T, k], and returns what the two kernels share.
template <class T>
RowsParams rows_params(const Tensor& tokens, const Tensor& rows, const Tensor& position) {
  const int64_t hidden = tokens.size(1);
  DSV3_CHECK(hidden % Vec<T>::kSize == 0, "hidden must be a multiple of ", Vec<T>::kSize, ", got ", hidden);
  return {.position = position.data<int64_t>(),
          .hidden = static_cast<int>(hidden),
          .topk = static_cast<int>(position.size(1))};
}

void check_rows(const char* tokens_name, const Tensor& tokens, const char* rows_name, const Tensor& rows,
                const Tensor& position) {
  DSV3_CHECK(tokens.dim() == 2 && position.dim() == 2, tokens_name,
             " must be (tokens, hidden) and position (tokens, topk), got ", tokens, " and ", position);
  check_operand(tokens_name, tokens, tokens.dtype());
  check_operand("position", position, Dtype::kInt64, tokens.size(0), position.size(1));
  check_operand(rows_name, rows, tokens.dtype(), position.numel(), tokens.size(1));
  DSV3_CHECK(position.size(1) >= 1 && position.size(1) <= kMaxTopk, "topk must be in 1..", kMaxTopk, ", got ",
             position.size(1));
}

}  // namespace

void moe_permutation(Tensor offsets, Tensor source, Tensor position, Tensor block_counts, Tensor topk_idx,
                     cudaStream_t stream) {
  const int64_t pairs = topk_idx.numel(), experts = offsets.size(0) - 1, blocks = block_counts.size(0);
  check_operand("topk_idx", topk_idx, Dtype::kInt64);
  check_operand("offsets", offsets, Dtype::kInt32, experts + 1);
  check_operand("source", source, Dtype::kInt64, pairs);
  check_operand("position", position, Dtype::kInt64);
  check_operand("block_counts", block_counts, Dtype::kInt32, blocks, experts);
  DSV3_CHECK(position.numel() == pairs, "position must have the shape of topk_idx ", topk_idx, ", got ", position);
  DSV3_CHECK(experts >= 1 && experts <= kMaxExperts, "experts must be in 1..", kMaxExperts, ", got ", experts);
  DSV3_CHECK(blocks >= 1 && blocks <= kMaxBlocks, "block_counts must have 1..", kMaxBlocks, " rows, got ",
             block_counts);
  DSV3_CHECK(pairs < INT32_MAX, "too many pairs: ", pairs);
  const DeviceGuard guard(topk_idx);
  const int64_t warps = blocks * kWarps, steps = (pairs + warps * kWarpSize - 1) / (warps * kWarpSize);
  const PermutationParams p{.offsets = offsets.data<int>(),
                            .source = source.data<int64_t>(),
                            .position = position.data<int64_t>(),
                            .block_counts = block_counts.data<int>(),
                            .topk_idx = topk_idx.data<int64_t>(),
                            .pairs = pairs,
                            .warp_pairs = steps * kWarpSize,
                            .experts = static_cast<int>(experts)};
  const size_t smem = (kWarps * experts + experts + 1) * sizeof(int);
  const Launch shape{.grid = dim3(blocks), .block = dim3(kThreads), .smem = smem};
  launch("moe_permutation", count_kernel, shape, stream, p);
  launch("moe_permutation", place_kernel, shape, stream, p);
}

void moe_permute(Tensor rows, Tensor x, Tensor position, cudaStream_t stream) {
  check_rows("x", x, "rows", rows, position);
  const DeviceGuard guard(x);
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    RowsParams p = rows_params<T>(x, rows, position);
    p.out = rows.data<T>();
    p.in = x.data<T>();
    launch("moe_permute", permute_kernel<T>, {.grid = dim3(x.size(0)), .block = dim3(kThreads)}, stream, p);
  });
}

void moe_permute_cast(Tensor rows, Tensor rows_sf, Tensor data, Tensor sf, Tensor source, Tensor position,
                      cudaStream_t stream) {
  check_rows("data", data, "rows", rows, position);
  DSV3_CHECK(data.dtype() == Dtype::kE4M3, "data must be float8_e4m3fn, got ", data);
  check_operand("source", source, Dtype::kInt64, rows.size(0));
  RowsParams p = rows_params<uint8_t>(data, rows, position);
  p.out = rows.data<void>();
  p.in = data.data<void>();
  const int64_t tiles = ceil_div(data.size(1), kTile);
  const ScaleParams s{.out = rows_sf.data<float>(),
                      .in = sf.data<float>(),
                      .source = source.data<int64_t>(),
                      .out_stride = check_row_scales("rows_sf", rows_sf, rows.size(0), tiles),
                      .in_stride = check_row_scales("sf", sf, data.size(0), tiles),
                      .rows = rows.size(0),
                      .tiles = static_cast<int>(tiles),
                      .topk = p.topk};
  const DeviceGuard guard(data);
  const auto scale_blocks = static_cast<int>(ceil_div(s.rows, kThreads) * ceil_div(s.tiles, kScaleTiles));
  launch("moe_permute_cast", permute_cast_kernel, {.grid = dim3(scale_blocks + data.size(0)), .block = dim3(kThreads)},
         stream, p, s, scale_blocks);
}

void moe_unpermute(Tensor out, Tensor y, Tensor position, std::optional<Tensor> weights, cudaStream_t stream) {
  check_rows("out", out, "y", y, position);
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, position.size(0), position.size(1));
  const DeviceGuard guard(y);
  visit_float("y", y.dtype(), [&](auto zero) {
    using T = decltype(zero);
    RowsParams p = rows_params<T>(out, y, position);
    p.out = out.data<T>();
    p.in = y.data<T>();
    p.weights = weights ? weights->data<float>() : nullptr;
    launch("moe_unpermute", unpermute_kernel<T>, {.grid = dim3(out.size(0)), .block = dim3(kThreads)}, stream, p);
  });
}

}  // namespace dsv3
