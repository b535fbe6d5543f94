// Absorbed attention over the paged latent cache for few rows, a row being a new token and a head of one sequence:
//
//   out[b, s, h] = softmax_j(scale q[b, s, h] . c_j) c_j[:512],  j < seq_lens[b] - S + s + 1,  c_j = 576 cached bf16
//
// Roofline: the cached rows once. Where mla_decode keeps the multiprocessors evenly busy by a schedule, this kernel keeps
// short sequences short: the pages of a sequence are divided into pieces, of which a block takes one after the other. While
// it multiplies a page of 64 keys, with 16-row instructions instead of 64-row ones, the next page is on its way; what is left
// is a chain of short steps, so 16 warps share each. A second kernel adds up the pieces in their order. The first 32 pieces
// have a page each, the next 32 two, and so on: where one begins depends neither on the sequence's length nor on the batch,
// so a token's bits do not change with what is beside it, nor with the drafts behind it.
#include <algorithm>

#include "../common/device_error.cuh"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"
#include "few_attention.cuh"

namespace dsv3 {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;
constexpr int kPage = 64, kLatent = 512, kWidth = 576;
constexpr int kMaxRows = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kPiecesASize = 32;        // pieces of a page, then as many of two pages, of four, ...
constexpr int kCombined = 16;           // pieces whose results are read at a time
constexpr int kKeyStride = kWidth + 8;  // of rows in shared memory: 8 of them begin in 8 different groups of 4 banks
constexpr int kScoreStride = kPage + 4, kProbabilityStride = kPage + 8;
constexpr int kColumns = kLatent / kWarps;  // of the output a warp
constexpr int kParts = 4;                   // of the columns of scores

struct AttentionParams {
  bf16* out;           // [B, rows, 512]
  float* partial;      // [B, pieces, rows, 512]
  float* partial_lse;  // [B, pieces, rows], of base 2
  const bf16* q;       // [B, rows, 576]
  const bf16* cache;   // [pages, 64, 576]
  const int *block_table, *seq_lens;
  int64_t table_stride;
  int64_t pages;
  int batch, width, pieces, rows, steps, heads;  // pieces: of the width
  float scale;                                   // times log2 e
  bool static_cache;
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

__device__ __forceinline__ int pages_of(int length) { return length / kPage + (length % kPage != 0); }

// How a sequence is divided. NOTE: what may be read before the wait goes past L1, which keeps no order with other grids.
struct Division {
  int length, needed, pages, pieces;  // pages: those of the needed ones that the table has
  __device__ __forceinline__ Division(const AttentionParams& p, int sequence) {
    length = max(__ldcg(p.seq_lens + sequence), 0);
    needed = pages_of(length);
    pages = min(needed, p.width);
    pieces = num_pieces(pages);
  }
};

// A page that a block is to attend to.
struct Stage {
  int sequence, piece;  // no sequence: -1
  int entry, end;       // of the table: the page, and where the piece ends
  int length;           // of the sequence
  int page;
  __device__ __forceinline__ bool is_last() const { return entry + 1 == end; }
  __device__ __forceinline__ bool is_known(const AttentionParams& p) const { return page >= 0 && page < p.pages; }
  // Whether the table is too short for the sequence.
  __device__ __forceinline__ bool is_cut(const AttentionParams& p) const { return p.width < pages_of(length); }
};

// The pages of the block's pieces one by one; a block takes every gridDim.x-th piece of all sequences. Lane l of each warp keeps
// sequence first + l: its length, and how many pieces lie before its end.
class Stages {
 public:
  __device__ __forceinline__ explicit Stages(const AttentionParams& params)
      : p(params), piece(static_cast<int>(blockIdx.x)) {
    look(0);
  }

  // The first page of the block's next piece.
  __device__ __forceinline__ Stage first() {
    for (int total; piece - before >= (total = __shfl_sync(kAll, end, kWarpSize - 1));) {
      if (first_sequence + kWarpSize >= p.batch) return {.sequence = -1};
      before += total;
      look(first_sequence + kWarpSize);
    }
    const int n = piece - before, owner = __ffs(__ballot_sync(kAll, end > n)) - 1;
    Stage at{.sequence = first_sequence + owner, .piece = n - __shfl_sync(kAll, end - mine, owner)};
    at.length = __shfl_sync(kAll, length, owner);
    const int size = 1 << at.piece / kPiecesASize;
    at.entry = kPiecesASize * (size - 1) + at.piece % kPiecesASize * size;
    at.end = min(at.entry + size, min(pages_of(at.length), p.width));
    at.page = entry_of(at);
    piece += static_cast<int>(gridDim.x);
    return at;
  }
  // The page behind `at`, maybe of the next piece.
  __device__ __forceinline__ Stage next(Stage at) {
    if (at.sequence < 0) return at;
    if (at.is_last()) return first();
    ++at.entry;
    at.page = entry_of(at);
    return at;
  }

 private:
  __device__ __forceinline__ int entry_of(const Stage& at) const {
    return __ldcg(p.block_table + at.sequence * p.table_stride + at.entry);
  }
  __device__ __forceinline__ void look(int sequence) {
    const int lane = threadIdx.x % kWarpSize;
    first_sequence = sequence;
    mine = length = 0;
    if (sequence + lane < p.batch) {
      const Division d(p, sequence + lane);
      mine = d.pieces, length = d.length;
    }
    end = mine;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int others = __shfl_up_sync(kAll, end, distance);
      if (lane >= distance) end += others;
    }
  }

  const AttentionParams& p;
  int piece, before = 0, first_sequence;  // the next piece, and how many lie before the first sequence
  int mine, end, length;
};

template <int kRowTiles>
struct AttentionShared {
  static constexpr int kRows = kRowTiles * 16;
  alignas(16) bf16 keys[2][kPage][kKeyStride];
  alignas(16) bf16 queries[kRows][kKeyStride];
  alignas(16) bf16 probabilities[kRows][kProbabilityStride];
  float scores[kParts][kRows][kScoreStride];        // of each part of the columns
  float max[kRows], sum[kRows], correction[kRows];  // as Softmax has them
};

// The page's first `count` rows; zeros behind them, since nothing says what unused rows hold. 8 lanes a row: every copy of a
// thread is 128 bytes behind the one before.
__device__ __forceinline__ void load_keys(bf16 (*keys)[kKeyStride], const bf16* page, int count) {
  static_assert(kThreads == 8 * kPage);
  const int row = threadIdx.x / 8, column = threadIdx.x % 8 * 8;
  bf16* const to = &keys[row][column];
  const bf16* const from = page + row * kWidth + column;
#pragma unroll
  for (int j = 0; j < kWidth; j += 64) copy_async(to + j, from + j, row < count);
}

__device__ __forceinline__ void load_stage(const AttentionParams& p, bf16 (*keys)[kKeyStride], const Stage& at) {
  const bool known = at.is_known(p);
  const int64_t page = known ? at.page : 0;
  load_keys(keys, p.cache + page * kPage * kWidth, known ? at.length - at.entry * kPage : 0);
}

// A row a warp, or two.
template <int kRowTiles>
__device__ __forceinline__ void load_queries(const AttentionParams& p, AttentionShared<kRowTiles>& shared,
                                             int sequence) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int row = warp; row < AttentionShared<kRowTiles>::kRows; row += kWarps) {
    const bf16* const q = p.q + (static_cast<int64_t>(sequence) * p.rows + min(row, p.rows - 1)) * kWidth;
#pragma unroll
    for (int column = lane * 8; column < kWidth; column += kWarpSize * 8) {
      copy_async(&shared.queries[row][column], q + column, true);
    }
  }
}

// Scores of all rows: a warp takes 16 keys and a part of the columns.
template <int kRowTiles>
__device__ __forceinline__ void multiply_keys(AttentionShared<kRowTiles>& shared, const bf16 (*keys)[kKeyStride]) {
  constexpr int kKeyWarps = kPage / 16, kDepth = kWidth / kParts;
  static_assert(kWarps == kParts * kKeyWarps && kDepth % 16 == 0);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int first_key = warp % kKeyWarps * 16, part = warp / kKeyWarps;
  float score[kRowTiles][2][4] = {};
  const bf16* const key = &keys[first_key + lane / 16 * 8 + lane % 8][part * kDepth + lane / 8 % 2 * 8];
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t b[4];
    load_matrices(b, key + k);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      uint32_t a[4];
      load_matrices(a, &shared.queries[r * 16 + lane % 16][part * kDepth + k + lane / 16 * 8]);
      multiply(score[r][0], a, b[0], b[1]);
      multiply(score[r][1], a, b[2], b[3]);
    }
  }
  const int row = lane / 4, column = first_key + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const to = &shared.scores[part][r * 16 + row + i % 2 * 8][column + i / 2 * 8];
      *reinterpret_cast<float2*>(to) = float2{score[r][i / 2][i % 2 * 2], score[r][i / 2][i % 2 * 2 + 1]};
    }
  }
}

// The softmax of a warp's rows, every sixteenth. Lanes keep the same; what other warps need of it is in shared memory.
template <int kRowTiles>
struct Softmax {
  static_assert(kWarps == 16, "a warp has one row of each tile of 16");
  int more[kRowTiles];                   // keys that a row sees, less those of its sequence: the last token's sees all
  float max[kRowTiles], sum[kRowTiles];  // of the piece so far

  __device__ __forceinline__ explicit Softmax(const AttentionParams& p) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) more[r] = min(row(r) / p.heads, p.steps - 1) + 1 - p.steps;
    begin();
  }
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) max[r] = -INFINITY, sum[r] = 0.f;
  }

  // Probabilities of a page, from whose first key on the sequence has `left` keys, relative to the largest score so far.
  __device__ __forceinline__ void add(const AttentionParams& p, AttentionShared<kRowTiles>& shared, int left) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const int at = row(r), seen = left + more[r];
      float2 score = {0.f, 0.f};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float2 of_part = *reinterpret_cast<const float2*>(&shared.scores[part][at][2 * lane]);
        score.x += of_part.x, score.y += of_part.y;
      }
      const float x[2] = {2 * lane < seen ? score.x * p.scale : -INFINITY,
                          2 * lane + 1 < seen ? score.y * p.scale : -INFINITY};
      const float before = max[r];
      max[r] = warp_reduce<Max>(fmaxf(before, fmaxf(x[0], x[1])));
      const float base = max[r] == -INFINITY ? 0.f : max[r], correction = exp2f(before - base);
      const __nv_bfloat162 rounded = __floats2bfloat162_rn(exp2f(x[0] - base), exp2f(x[1] - base));
      *reinterpret_cast<__nv_bfloat162*>(&shared.probabilities[at][2 * lane]) = rounded;
      // The sum is that of what is multiplied: of the rounded values.
      const float2 values = __bfloat1622float2(rounded);
      sum[r] = sum[r] * correction + warp_reduce<Sum>(values.x + values.y);
      if (lane == 0) shared.correction[at] = correction, shared.max[at] = max[r], shared.sum[at] = sum[r];
    }
  }

 private:
  __device__ __forceinline__ int row(int r) const { return static_cast<int>(threadIdx.x) / kWarpSize + r * kWarps; }
};

// out = out * correction + probabilities times the warp's columns of the values.
template <int kRowTiles>
__device__ __forceinline__ void multiply_values(const AttentionShared<kRowTiles>& shared,
                                                const bf16 (*keys)[kKeyStride],
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
  const bf16* const value = &keys[lane % 16][warp * kColumns + lane / 16 * 8];
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
                                            const float (&out)[kRowTiles][kColumns / 8][4], const Stage& at,
                                            bool spoiled) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t first = static_cast<int64_t>(at.sequence) * p.pieces + at.piece;
  const bool whole = at.length <= kPage || p.width == 1;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = r * 16 + lane / 4 + half * 8;
      if (row >= p.rows) continue;
      const float sum = shared.sum[row], factor = spoiled ? NAN : sum > 0.f ? 1.f / sum : 0.f;
      const int column = warp * kColumns + lane % 4 * 2;
      float* const partial = p.partial + (first * p.rows + row) * kLatent + column;
      bf16* const target = p.out + (static_cast<int64_t>(at.sequence) * p.rows + row) * kLatent + column;
#pragma unroll
      for (int c = 0; c < kColumns / 8; ++c) {
        const float x = out[r][c][2 * half] * factor, y = out[r][c][2 * half + 1] * factor;
        if (whole) {
          *reinterpret_cast<__nv_bfloat162*>(target + 8 * c) = __floats2bfloat162_rn(x, y);
        } else {
          *reinterpret_cast<float2*>(partial + 8 * c) = float2{x, y};
        }
      }
      if (!whole && warp == 0 && lane % 4 == 0) p.partial_lse[first * p.rows + row] = shared.max[row] + log2f(sum);
    }
  }
}

template <int kRowTiles>
__device__ __forceinline__ void clear(float (&out)[kRowTiles][kColumns / 8][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) out[r][i / 4][i % 4] = 0.f;
  }
}

template <int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1) few_attention_kernel(AttentionParams p) {
  extern __shared__ __align__(16) char raw[];
  auto& shared = *reinterpret_cast<AttentionShared<kRowTiles>*>(raw);
  if (!p.static_cache) wait_for_inputs();
  Softmax<kRowTiles> softmax(p);
  Stages stages(p);
  Stage now = stages.first();
  if (now.sequence >= 0) load_stage(p, shared.keys[0], now);
  commit_copies();
  if (p.static_cache) wait_for_inputs();  // a block without a piece too: a grid must not end before the one ahead
  release_dependents();
  if (now.sequence < 0) return;
  load_queries(p, shared, now.sequence);
  commit_copies();
  Stage next = stages.next(now);
  float out[kRowTiles][kColumns / 8][4];
  clear(out);
  int buffer = 0;
  for (bool spoiled = now.is_cut(p);; buffer ^= 1) {
    const bf16(*keys)[kKeyStride] = shared.keys[buffer];
    const bool last = now.is_last(), more = next.sequence >= 0;
    if (more) load_stage(p, shared.keys[buffer ^ 1], next);
    commit_copies();
    wait_for_copies<1>();  // all but the next keys have come
    __syncthreads();
    multiply_keys(shared, keys);
    __syncthreads();
    if (last && more) load_queries(p, shared, next.sequence);
    commit_copies();
    const Stage after = stages.next(next);
    softmax.add(p, shared, now.length - now.entry * kPage);
    __syncthreads();
    multiply_values(shared, keys, out);
    if (!now.is_known(p)) {
      spoiled = true;
      if (threadIdx.x == 0) report(p.error, DeviceErrorCode::kPages, now.sequence, now.page, now.entry, p.pages);
    }
    if (last) store_piece(p, shared, out, now, spoiled);
    if (!more) return;
    __syncthreads();
    if (last) {
      softmax.begin();
      clear(out);
      spoiled = next.is_cut(p);
    }
    now = next, next = after;
  }
}

// out = sum_i 2^(lse_i - lse) partial_i for sequences of several pieces, zeros for those without keys, NaN where the table
// has no page. A block a row.
__global__ void __launch_bounds__(kLatent / 4) combine_pieces_kernel(AttentionParams p) {
  const int sequence = blockIdx.y, row = blockIdx.x, column = threadIdx.x * 4;
  const Division d(p, sequence);  // of lengths that the kernel ahead had before it let this one begin
  wait_for_inputs();
  release_dependents();
  if (d.pages < d.needed && row == 0 && threadIdx.x == 0)
    report(p.error, DeviceErrorCode::kPages, sequence, -1, p.width, p.pages);
  if (d.pieces == 1) return;
  const int64_t first = static_cast<int64_t>(sequence) * p.pieces * p.rows + row;
  float most = -INFINITY, total = 0.f, sum[4] = {};
  for (int begin = 0; begin < d.pieces; begin += kCombined) {
    // All that is read is asked for before any of it is used.
    float4 values[kCombined];
    float bases[kCombined], before = most;
#pragma unroll
    for (int i = 0; i < kCombined; ++i) {
      const bool there = begin + i < d.pieces;
      const int64_t at = first + (begin + i) * p.rows;
      bases[i] = there ? p.partial_lse[at] : -INFINITY;
      values[i] = there ? *reinterpret_cast<const float4*>(p.partial + at * kLatent + column) : float4{};
    }
#pragma unroll
    for (int i = 0; i < kCombined; ++i) most = fmaxf(most, bases[i]);
    const float base = most == -INFINITY ? 0.f : most, correction = exp2f(before - base);
    total *= correction;
#pragma unroll
    for (float& x : sum) x *= correction;
#pragma unroll
    for (int i = 0; i < kCombined; ++i) {
      const float weight = exp2f(bases[i] - base);
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
void launch_few_attention(const AttentionParams& p, cudaStream_t stream) {
  Launch shape{.block = dim3(kThreads), .smem = sizeof(AttentionShared<kRowTiles>)};
  const int64_t pieces = std::max<int64_t>(static_cast<int64_t>(p.batch) * p.pieces, 1);
  shape.grid = dim3(std::min<int64_t>(pieces, some_clusters("few_attention", few_attention_kernel<kRowTiles>, shape)));
  launch("few_attention", few_attention_kernel<kRowTiles>, shape, stream, p);
}

}  // namespace

int64_t few_attention_pieces(int64_t width) { return num_pieces(static_cast<int>(width)); }

void few_attention(Tensor out, Tensor partial, Tensor partial_lse, Tensor q, Tensor cache, Tensor block_table,
                   Tensor seq_lens, double softmax_scale, bool static_cache, cudaStream_t stream) {
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
                          .batch = static_cast<int>(batch),
                          .width = static_cast<int>(block_table.size(1)),
                          .pieces = static_cast<int>(pieces),
                          .rows = static_cast<int>(rows),
                          .steps = static_cast<int>(steps),
                          .heads = static_cast<int>(heads),
                          .scale = static_cast<float>(softmax_scale * 1.4426950408889634),
                          .static_cache = static_cache,
                          .error = device_error()};
  rows <= 16 ? launch_few_attention<1>(p, stream) : launch_few_attention<2>(p, stream);
  const Launch shape{.grid = dim3(rows, batch), .block = dim3(kLatent / 4)};
  launch("few_attention", combine_pieces_kernel, shape, stream, p);
}

}  // namespace dsv3
