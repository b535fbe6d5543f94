// Absorbed attention over the paged latent cache for few rows, a row being a new token and a head of one sequence:
//
//   out[b, s, h] = softmax_j(scale q[b, s, h] . c_j) c_j[:512],  j < seq_lens[b] - S + s + 1,  c_j = 576 cached bf16
//
// Roofline: the cached rows once. Where mla_decode keeps the multiprocessors evenly busy by a schedule, this kernel keeps
// short sequences short: the pages of a sequence are divided into pieces, a block for each, which loads a page of 64 keys
// with as many bytes in flight as it has, and multiplies with 16-row instructions instead of 64-row ones. A second kernel
// adds up the pieces in their order. The first 32 pieces have a page each, the next 32 two, and so on: where one begins
// depends neither on the sequence's length nor on the batch, so a token's bits do not change with what is beside it, nor
// with the drafts behind it.
#include <algorithm>

#include "../common/device_error.cuh"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"
#include "few_attention.cuh"

namespace dsv3 {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kPage = 64, kLatent = 512, kWidth = 576;
constexpr int kMaxRows = 32;
constexpr int kPiecesASize = 32;        // pieces of a page, then as many of two pages, of four, ...
constexpr int kCombined = 16;           // pieces whose results are read at a time
constexpr int kKeyStride = kWidth + 8;  // of rows in shared memory: 8 of them begin in 8 different groups of 4 banks
constexpr int kScoreStride = kPage + 4, kProbabilityStride = kPage + 8;
constexpr int kColumns = kLatent / kWarps;  // of the output a warp

struct AttentionParams {
  bf16* out;           // [B, rows, 512]
  float* partial;      // [B, pieces, rows, 512]
  float* partial_lse;  // [B, pieces, rows], of base 2
  const bf16* q;       // [B, rows, 576]
  const bf16* cache;   // [pages, 64, 576]
  const int *block_table, *seq_lens;
  int64_t table_stride;
  int64_t pages;
  int width, pieces, rows, steps, heads;  // pieces: of the width
  float scale;                            // times log2 e
  DeviceError* error;
};

// Pieces of so many pages.
__host__ __device__ __forceinline__ int num_pieces(int pages) {
  int smaller = 0, size = 1;
  for (; pages > kPiecesASize * size; size *= 2) {
    pages -= kPiecesASize * size;
    smaller += kPiecesASize;
  }
  return smaller + ceil_div(pages, size);
}

// How a sequence is divided.
struct Division {
  int length, pages, pieces;
  __device__ __forceinline__ Division(const AttentionParams& p, int sequence) {
    length = max(p.seq_lens[sequence], 0);
    pages = min(length / kPage + (length % kPage != 0), p.width);
    pieces = num_pieces(pages);
  }
};

template <int kRowTiles>
struct AttentionShared {
  static constexpr int kRows = kRowTiles * 16;
  alignas(16) bf16 keys[kPage][kKeyStride];
  alignas(16) bf16 queries[kRows][kKeyStride];
  alignas(16) bf16 probabilities[kRows][kProbabilityStride];
  float scores[kRows][kScoreStride];
  float max[kRows], sum[kRows], correction[kRows];
};

// The page's first `count` rows; zeros behind them, since nothing says what unused rows hold.
__device__ __forceinline__ void load_keys(bf16 (*keys)[kKeyStride], const bf16* page, int count) {
  constexpr int kVectors = kWidth / 8;
  for (int i = threadIdx.x; i < kPage * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * 8;
    copy_async(&keys[row][column], page + static_cast<int64_t>(row) * kWidth + column, row < count);
  }
}

template <int kRowTiles>
__device__ __forceinline__ void load_queries(const AttentionParams& p, AttentionShared<kRowTiles>& shared,
                                             int sequence) {
  constexpr int kVectors = kWidth / 8;
  const bf16* const q = p.q + static_cast<int64_t>(sequence) * p.rows * kWidth;
  for (int i = threadIdx.x; i < AttentionShared<kRowTiles>::kRows * kVectors; i += kThreads) {
    const int row = i / kVectors, column = i % kVectors * 8;
    copy_async(&shared.queries[row][column], q + static_cast<int64_t>(min(row, p.rows - 1)) * kWidth + column, true);
  }
}

// Scores of all rows and the warp's 8 keys. The sum has two parts, so that two products are under way.
template <int kRowTiles>
__device__ __forceinline__ void multiply_keys(AttentionShared<kRowTiles>& shared) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float score[2][kRowTiles][4] = {};
  const bf16* const key = &shared.keys[warp * 8 + lane % 8][lane / 8 * 8];
#pragma unroll 6
  for (int k = 0; k < kWidth; k += 32) {
    uint32_t b[4];
    load_matrices(b, key + k);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        uint32_t a[4];
        load_matrices(a, &shared.queries[r * 16 + lane % 16][k + half * 16 + lane / 16 * 8]);
        multiply(score[half][r], a, b[2 * half], b[2 * half + 1]);
      }
    }
  }
  const int row = lane / 4, column = warp * 8 + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      shared.scores[r * 16 + row + i / 2 * 8][column + i % 2] = score[0][r][i] + score[1][r][i];
    }
  }
}

// Probabilities of a page whose first key is `begin`, relative to the largest score so far; a warp takes every eighth row.
template <int kRowTiles>
__device__ __forceinline__ void soften(const AttentionParams& p, AttentionShared<kRowTiles>& shared, int begin,
                                       int length) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int row = warp; row < AttentionShared<kRowTiles>::kRows; row += kWarps) {
    const int step = min(row / p.heads, p.steps - 1), seen = length - p.steps + step + 1 - begin;
    float x[2], most = shared.max[row];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = 2 * lane + i;
      x[i] = column < seen ? shared.scores[row][column] * p.scale : -INFINITY;
      most = fmaxf(most, x[i]);
    }
    most = warp_reduce<Max>(most);
    const float base = most == -INFINITY ? 0.f : most;
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(exp2f(x[0] - base), exp2f(x[1] - base));
    *reinterpret_cast<__nv_bfloat162*>(&shared.probabilities[row][2 * lane]) = rounded;
    // The sum is that of what is multiplied: of the rounded values.
    const float2 values = __bfloat1622float2(rounded);
    const float sum = warp_reduce<Sum>(values.x + values.y);
    if (lane == 0) {
      const float correction = exp2f(shared.max[row] - base);
      shared.correction[row] = correction;
      shared.sum[row] = shared.sum[row] * correction + sum;
      shared.max[row] = most;
    }
  }
}

// out = out * correction + probabilities times the warp's columns of the values.
template <int kRowTiles>
__device__ __forceinline__ void multiply_values(AttentionShared<kRowTiles>& shared,
                                                float (&out)[kRowTiles][kColumns / 8][4]) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  uint32_t a[kRowTiles][kPage / 16][4];
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int k = 0; k < kPage / 16; ++k) {
      load_matrices(a[r][k], &shared.probabilities[r * 16 + lane % 16][k * 16 + lane / 16 * 8]);
    }
    const float upper = shared.correction[r * 16 + lane / 4], lower = shared.correction[r * 16 + lane / 4 + 8];
#pragma unroll
    for (int c = 0; c < kColumns / 8; ++c) {
      out[r][c][0] *= upper, out[r][c][1] *= upper;
      out[r][c][2] *= lower, out[r][c][3] *= lower;
    }
  }
  const bf16* const value = &shared.keys[lane % 16][warp * kColumns + lane / 16 * 8];
#pragma unroll
  for (int c = 0; c < kColumns / 8; c += 2) {
#pragma unroll
    for (int k = 0; k < kPage / 16; ++k) {
      uint32_t b[4];
      load_matrices_transposed(b, value + k * 16 * kKeyStride + c * 8);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply(out[r][c], a[r][k], b[0], b[1]);
        multiply(out[r][c + 1], a[r][k], b[2], b[3]);
      }
    }
  }
}

template <int kRowTiles>
__device__ __forceinline__ void store_piece(const AttentionParams& p, const AttentionShared<kRowTiles>& shared,
                                            const float (&out)[kRowTiles][kColumns / 8][4], int sequence,
                                            const Division& d, bool spoiled) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first = static_cast<int64_t>(sequence) * p.pieces + blockIdx.x;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = r * 16 + lane / 4 + half * 8;
      if (row >= p.rows) continue;
      const float sum = shared.sum[row], factor = spoiled ? NAN : sum > 0.f ? 1.f / sum : 0.f;
      const int column = warp * kColumns + lane % 4 * 2;
      float* const partial = p.partial + (first * p.rows + row) * kLatent + column;
      bf16* const whole = p.out + (static_cast<int64_t>(sequence) * p.rows + row) * kLatent + column;
#pragma unroll
      for (int c = 0; c < kColumns / 8; ++c) {
        const float x = out[r][c][2 * half] * factor, y = out[r][c][2 * half + 1] * factor;
        if (d.pieces == 1) {
          *reinterpret_cast<__nv_bfloat162*>(whole + 8 * c) = __floats2bfloat162_rn(x, y);
        } else {
          *reinterpret_cast<float2*>(partial + 8 * c) = float2{x, y};
        }
      }
      if (d.pieces > 1 && warp == 0 && lane % 4 == 0)
        p.partial_lse[first * p.rows + row] = shared.max[row] + log2f(sum);
    }
  }
}

template <int kRowTiles>
__global__ void __launch_bounds__(kThreads, 2) few_attention_kernel(AttentionParams p) {
  extern __shared__ __align__(16) char raw[];
  auto& shared = *reinterpret_cast<AttentionShared<kRowTiles>*>(raw);
  const int sequence = blockIdx.y;
  for (int row = threadIdx.x; row < shared.kRows; row += kThreads) shared.max[row] = -INFINITY, shared.sum[row] = 0.f;
  wait_for_inputs();
  release_dependents();
  const Division d(p, sequence);
  const int piece = static_cast<int>(blockIdx.x), size = 1 << piece / kPiecesASize;
  const int begin = kPiecesASize * (size - 1) + piece % kPiecesASize * size, end = min(begin + size, d.pages);
  bool spoiled = p.width < d.length / kPage + (d.length % kPage != 0);
  if (spoiled && threadIdx.x == 0) report(p.error, DeviceErrorCode::kPages, sequence, -1, p.width, p.pages);
  if (begin >= end) return;
  load_queries(p, shared, sequence);
  float out[kRowTiles][kColumns / 8][4] = {};
  for (int entry = begin; entry < end; ++entry) {
    const int page = p.block_table[sequence * p.table_stride + entry];
    const bool known = page >= 0 && page < p.pages;
    if (!known && threadIdx.x == 0) report(p.error, DeviceErrorCode::kPages, sequence, page, entry, p.pages);
    spoiled = spoiled || !known;
    const int count = known ? d.length - entry * kPage : 0;
    load_keys(shared.keys, p.cache + static_cast<int64_t>(known ? page : 0) * kPage * kWidth, count);
    wait_for_copies();
    __syncthreads();
    multiply_keys(shared);
    __syncthreads();
    soften(p, shared, entry * kPage, d.length);
    __syncthreads();
    multiply_values(shared, out);
    __syncthreads();
  }
  store_piece(p, shared, out, sequence, d, spoiled);
}

// out = sum_i 2^(lse_i - lse) partial_i for sequences of several pieces, zeros for those without keys, NaN where the table
// has no page. A block a row.
__global__ void __launch_bounds__(kLatent / 4) combine_pieces_kernel(AttentionParams p) {
  wait_for_inputs();
  release_dependents();
  const int sequence = blockIdx.y, row = blockIdx.x, column = threadIdx.x * 4;
  const Division d(p, sequence);
  if (d.pieces == 1) return;
  const int64_t first = static_cast<int64_t>(sequence) * p.pieces * p.rows + row;
  float most = -INFINITY, total = 0.f, sum[4] = {};
  for (int i = 0; i < d.pieces; ++i) most = fmaxf(most, p.partial_lse[first + i * p.rows]);
  for (int begin = 0; begin < d.pieces; begin += kCombined) {
    float4 values[kCombined];
#pragma unroll
    for (int i = 0; i < kCombined; ++i) {
      if (begin + i >= d.pieces) break;
      values[i] = *reinterpret_cast<const float4*>(p.partial + (first + (begin + i) * p.rows) * kLatent + column);
    }
#pragma unroll
    for (int i = 0; i < kCombined; ++i) {
      if (begin + i >= d.pieces) break;
      const float weight = most == -INFINITY ? 0.f : exp2f(p.partial_lse[first + (begin + i) * p.rows] - most);
      total += weight;
      sum[0] += weight * values[i].x, sum[1] += weight * values[i].y;
      sum[2] += weight * values[i].z, sum[3] += weight * values[i].w;
    }
  }
  const float factor = d.pieces == 0 && d.length > 0 ? NAN : total == 0.f ? 0.f : 1.f / total;
  __nv_bfloat162 rounded[2] = {__floats2bfloat162_rn(sum[0] * factor, sum[1] * factor),
                               __floats2bfloat162_rn(sum[2] * factor, sum[3] * factor)};
  bf16* const out = p.out + (static_cast<int64_t>(sequence) * p.rows + row) * kLatent + column;
  *reinterpret_cast<uint2*>(out) = reinterpret_cast<const uint2&>(rounded);
}

template <int kRowTiles>
void launch_few_attention(const AttentionParams& p, int batch, cudaStream_t stream) {
  const Launch shape{
      .grid = dim3(std::max(p.pieces, 1), batch), .block = dim3(kThreads), .smem = sizeof(AttentionShared<kRowTiles>)};
  launch("few_attention", few_attention_kernel<kRowTiles>, shape, stream, p);
}

}  // namespace

int64_t few_attention_pieces(int64_t width) { return num_pieces(static_cast<int>(width)); }

void few_attention(Tensor out, Tensor partial, Tensor partial_lse, Tensor q, Tensor cache, Tensor block_table,
                   Tensor seq_lens, double softmax_scale, cudaStream_t stream) {
  check_operand("q", q, Dtype::kBFloat16);
  DSV3_CHECK(q.dim() == 4, "q must be (batch, steps, heads, ", kWidth, "), got ", q);
  const int64_t batch = q.size(0), steps = q.size(1), heads = q.size(2), rows = steps * heads;
  check_shape("q", q, batch, steps, heads, kWidth);
  DSV3_CHECK(rows >= 1 && rows <= kMaxRows, "q must have 1 to ", kMaxRows, " rows of steps and heads, got ", q);
  check_operand("out", out, Dtype::kBFloat16, batch, steps, heads, kLatent);
  check_operand("cache", cache, Dtype::kBFloat16, cache.size(0), kPage, 1, kWidth);
  check_operand("seq_lens", seq_lens, Dtype::kInt32, batch);
  DSV3_CHECK(block_table.is_cuda() && block_table.dtype() == Dtype::kInt32 && block_table.dim() == 2 &&
                 block_table.size(0) == batch && (block_table.size(1) <= 1 || block_table.stride(1) == 1),
             "block_table must be int32 (batch, width) on a CUDA device, its rows contiguous, got ", block_table);
  const int64_t pieces = few_attention_pieces(block_table.size(1));
  check_operand("partial", partial, Dtype::kFloat32, batch, pieces, rows, kLatent);
  check_operand("partial_lse", partial_lse, Dtype::kFloat32, batch, pieces, rows);
  if (batch == 0) return;
  const DeviceGuard guard(q);
  const AttentionParams p{.out = out.data<bf16>(),
                          .partial = partial.data<float>(),
                          .partial_lse = partial_lse.data<float>(),
                          .q = q.data<bf16>(),
                          .cache = cache.data<bf16>(),
                          .block_table = block_table.data<int>(),
                          .seq_lens = seq_lens.data<int>(),
                          .table_stride = block_table.stride(0),
                          .pages = cache.size(0),
                          .width = static_cast<int>(block_table.size(1)),
                          .pieces = static_cast<int>(pieces),
                          .rows = static_cast<int>(rows),
                          .steps = static_cast<int>(steps),
                          .heads = static_cast<int>(heads),
                          .scale = static_cast<float>(softmax_scale * 1.4426950408889634),
                          .error = device_error()};
  rows <= 16 ? launch_few_attention<1>(p, static_cast<int>(batch), stream)
             : launch_few_attention<2>(p, static_cast<int>(batch), stream);
  const Launch shape{.grid = dim3(rows, batch), .block = dim3(kLatent / 4)};
  launch("few_attention", combine_pieces_kernel, shape, stream, p);
}

}  // namespace dsv3
