// Absorbed attention over the paged latent cache for few rows, a row being a new token and a head of one sequence:
//
//   out[b, s, h] = softmax_j(scale q[b, s, h] . c_j) c_j[:512],  j < seq_lens[b] - S + s + 1,  c_j = 576 cached bf16
//
// Roofline: the cached rows once. Where mla_decode keeps the multiprocessors evenly busy by a schedule, this kernel keeps
// short sequences short: the pages of a sequence are divided into pieces, of which a block takes one after the other. A block
// is one warpgroup with room for a page, two share a multiprocessor, and one loads while the other multiplies. Rows are few,
// so keys and then values take the tensor core's M side and rows its N side:
//
//   scores^T [64 keys, rows] = K Q^T      out^T [512 columns, rows] += V^T P^T
//
// A page's probabilities are relative to its own largest score, and so is its output until it is merged with others'. What is
// merged with what is fixed: the pages of a chunk from the first on, then the chunks. So a token's bits change neither with
// what is beside it nor with the drafts behind it, although a piece is one or the other (few_pieces.cuh): the pages of a chunk
// merge in registers. A second kernel merges the pieces, where they are several.
#include <algorithm>

#include "../common/device_error.cuh"
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../hopper/bulk.cuh"
#include "../hopper/pipeline.cuh"
#include "../hopper/tensor_map.h"
#include "../hopper/wgmma.cuh"
#include "../ops.h"
#include "few_pieces.cuh"

namespace dsv3 {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kLatent = 512, kWidth = 576;
constexpr int kSubColumns = 64;  // of a sub-block, whose rows are 128 bytes
constexpr int kSubs = kWidth / kSubColumns, kValueSubs = kLatent / kSubColumns, kSubBytes = kPage * 128;
constexpr int kMaxRows = 32;
constexpr int kCombined = 16;  // pieces whose results are read at a time

struct AttentionParams {
  CUtensorMap q;          // [B rows, 576] by sub-blocks of columns
  CUtensorMap keys;       // [64 pages, 576] likewise
  bf16* out;              // [B, rows, 512]
  float* partial;         // [B, pieces, rows, 512]
  float2* partial_state;  // [B, pieces, rows]: the largest score (to base 2), and the sum of the probabilities
  Tables tables;
  int pieces;  // of a table's width
  int rows, steps, heads;
  float scale;  // times log2 e
  bool static_cache;
  DeviceError* error;
};

// What a largest score is subtracted as, also if it is that of no keys.
__device__ __forceinline__ float base_of(float max) { return max == -INFINITY ? 0.f : max; }
__device__ __forceinline__ float inverse_of(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

// How two parts of a row's keys become one: sums of what is relative to each part's largest score, to that of both.
struct Merged {
  float max, left, right;  // factors
  __device__ __forceinline__ Merged(float left_max, float right_max) : max(fmaxf(left_max, right_max)) {
    const float base = base_of(max);
    left = fast_exp2(left_max - base), right = fast_exp2(right_max - base);
  }
  static __device__ __forceinline__ float add(float x, float left, float y, float right) {
    return __fmaf_rn(x, left, __fmul_rn(y, right));
  }
  __device__ __forceinline__ float operator()(float x, float y) const { return add(x, left, y, right); }
};

// kN: rows of queries that a block has room for.
template <int kN>
struct alignas(1024) AttentionShared {
  uint8_t keys[kSubs][kSubBytes];
  uint8_t queries[kSubs][kN * 128];
  uint8_t probabilities[kN * 128];
  float of_warps[kWarpgroupWarps][kN];  // maxima
  uint64_t keys_full, queries_full;
};

template <int kN>
class Attention {
 public:
  __device__ __forceinline__ Attention(const AttentionParams& params, AttentionShared<kN>& shared)
      : p(params), s(shared) {
    warp_ = static_cast<int>(uniform_warp());
    lane_ = static_cast<int>(threadIdx.x % kWarpSize);
    // NOTE: made here: made where they are used, the compiler keeps them in registers that are not uniform.
    keys_by_rows_ = uniform(matrix_descriptor(shared_address(s.keys)));
    keys_across_rows_ = uniform(columns_descriptor(shared_address(s.keys)));
    queries_ = uniform(matrix_descriptor(shared_address(s.queries)));
    probabilities_ = uniform(matrix_descriptor(shared_address(s.probabilities)));
    keys_full_ = shared_address(&s.keys_full);
    queries_full_ = shared_address(&s.queries_full);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) more_[c] = min(row_of(c) / p.heads, p.steps - 1) + 1 - p.steps;
  }

  // ---- loads, by one thread ----
  __device__ __forceinline__ void init() {
    cutlass::arch::ClusterBarrier::init(&s.keys_full, 1);
    cutlass::arch::ClusterBarrier::init(&s.queries_full, 1);
    cutlass::arch::fence_barrier_init();
  }
  // A page that there is not leaves what was there before: its piece becomes NaN anyway.
  __device__ __forceinline__ void load_keys(const Stage& at) {
    const bool known = is_known(at);
    expect_bytes(keys_full_, known ? sizeof(s.keys) : 0);
    if (known) load(s.keys, p.keys, s.keys_full, at.page * kPage, cute::TMA::CacheHintSm90::EVICT_FIRST);
  }
  // Rows of the sequences behind, too, where this one has fewer than kN: columns of the products that nobody reads.
  __device__ __forceinline__ void load_queries(int sequence) {
    expect_bytes(queries_full_, sizeof(s.queries));
    load(s.queries, p.q, s.queries_full, sequence * p.rows, cute::TMA::CacheHintSm90::EVICT_NORMAL);
  }

  // ---- a page ----
  // `now`, the first of a piece where it `begins`; `next` is asked for when this one's place is free, and its queries, if they
  // are others, when the scores are there.
  __device__ __forceinline__ void attend(const Stage& now, const Stage& next, bool begins) {
    if (begins) spoiled_ = p.tables.width < pages_of(now.length);  // the table is too short
    if (now.sequence != sequence_) {
      wait_barrier(queries_full_, queries_phase_);
      queries_phase_ ^= 1;
      sequence_ = now.sequence;
    }
    wait_barrier(keys_full_, keys_phase_);
    keys_phase_ ^= 1;
    const int left = now.length - now.entry * kPage;  // keys of the sequence, from the page's first on
    if (left < kPage) clear_keys(left);
    float scores[kN / 2];
    multiply_keys(scores);
    Rows of_page;
    soften(scores, left, of_page, next.sequence >= 0 && next.sequence != now.sequence ? next.sequence : -1);
    if (begins) {
      multiply_values();
      rows_ = of_page;
    } else {
      merge_values(of_page);
    }
    __syncthreads();  // all warps have done with the keys
    if (threadIdx.x == 0 && next.sequence >= 0) load_keys(next);
    if (!is_known(now)) {
      spoiled_ = true;
      if (threadIdx.x == 0) report(p.error, DeviceErrorCode::kPages, now.sequence, now.page, now.entry, p.tables.pages);
    }
    if (now.is_last()) store(now);
  }

 private:
  __device__ __forceinline__ bool is_known(const Stage& at) const { return at.page >= 0 && at.page < p.tables.pages; }

  static constexpr int kColumns = kN / 4;  // rows of queries whose values a thread has: of every 8 two
  struct Rows {                            // of these rows, all threads the same
    float max[kColumns], sum[kColumns];
  };
  using Wgmma = WgmmaBF16<kN>;
  static constexpr auto kByRows = cute::SM90::GMMA::Major::K, kAcrossRows = cute::SM90::GMMA::Major::MN;

  // A fragment [64, kN] has of the thread's c-th row of queries two values, 8 of the 64 apart.
  __device__ __forceinline__ int row_of(int c) const { return c / 2 * 8 + lane_ % 4 * 2 + c % 2; }
  static __device__ __forceinline__ constexpr int place(int c, int half) { return c / 2 * 4 + half * 2 + c % 2; }
  __device__ __forceinline__ int fragment_row(int half) const { return warp_ * 16 + half * 8 + lane_ / 4; }

  static __device__ __forceinline__ void load(void* to, const CUtensorMap& map, uint64_t& full, int row,
                                              cute::TMA::CacheHintSm90 hint) {
    cute::SM90_TMA_LOAD_3D::copy(&map, &full, static_cast<uint64_t>(hint), to, 0, row, 0);
  }

  // What lies behind a sequence's end may be anything; zeros have no weight and do no harm.
  __device__ __forceinline__ void clear_keys(int left) {
    const int begin = max(left, 0) * 128;
#pragma unroll 1
    for (int sub = 0; sub < kSubs; ++sub) {
      for (int i = begin + static_cast<int>(threadIdx.x) * 16; i < kSubBytes; i += kWarpgroup * 16) {
        *reinterpret_cast<uint4*>(s.keys[sub] + i) = uint4{};
      }
    }
    fence_shared_writes();
    __syncthreads();
  }

  __device__ __forceinline__ void multiply_keys(float (&scores)[kN / 2]) {
    const uint32_t keys = uniform(keys_by_rows_), queries = uniform(queries_);
    detail::fence_registers(scores);
    cute::warpgroup_arrive();
#pragma unroll
    for (int sub = 0; sub < kSubs; ++sub) {
#pragma unroll
      for (int k = 0; k < kSubColumns / 16; ++k) {
        detail::wgmma<typename Wgmma::template Shared<kByRows, kByRows>>(
            kDescriptorHigh | (keys + sub * (kSubBytes / 16) + 2 * k),
            kDescriptorHigh | (queries + sub * (kN * 128 / 16) + 2 * k), scores, sub > 0 || k > 0);
      }
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<0>();
    detail::fence_registers(scores);
  }

  // Probabilities relative to the largest score of the page, to shared memory.
  __device__ __forceinline__ void soften(float (&scores)[kN / 2], int left, Rows& rows, int next_sequence) {
    float of_warp[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float& score = scores[place(c, half)];
        score = fragment_row(half) < left + more_[c] ? score * p.scale : -INFINITY;
      }
      of_warp[c] = over_rows<Max>(fmaxf(scores[place(c, 0)], scores[place(c, 1)]));
    }
    leave(s.of_warps, of_warp);
    __syncthreads();
    if (threadIdx.x == 0 && next_sequence >= 0) load_queries(next_sequence);
    take<Max>(s.of_warps, rows.max);
    uint32_t pairs[kColumns / 2][2];
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      const float base[2] = {base_of(rows.max[c]), base_of(rows.max[c + 1])};
      float2 values[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __nv_bfloat162 rounded = __floats2bfloat162_rn(fast_exp2(scores[place(c, half)] - base[0]),
                                                             fast_exp2(scores[place(c + 1, half)] - base[1]));
        pairs[c / 2][half] = reinterpret_cast<const uint32_t&>(rounded);
        values[half] = __bfloat1622float2(rounded);
      }
      // The sum is that of what is multiplied: of the rounded values.
      of_warp[c] = over_rows<Sum>(values[0].x + values[1].x);
      of_warp[c + 1] = over_rows<Sum>(values[0].y + values[1].y);
    }
    // Rows of queries, 64 keys each, in the layout of TMA: four 8x8 matrices at a time, of two times 8 rows by two times 8
    // keys.
    const int chunk = (warp_ * 2 + lane_ / 8 % 2) ^ lane_ % 8;
    const uint32_t to = shared_address(s.probabilities) + (lane_ / 16 * 8 + lane_ % 8) * 128 + chunk * 16;
#pragma unroll
    for (int j = 0; j < kColumns / 2; j += 2) {
      asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to + j * (8 * 128)),
                   "r"(pairs[j][0]), "r"(pairs[j][1]), "r"(pairs[j + 1][0]), "r"(pairs[j + 1][1])
                   : "memory");
    }
    auto& sums = reinterpret_cast<float (&)[kWarpgroupWarps][kN]>(s.keys[kValueSubs]);  // all scores are there
    leave(sums, of_warp);
    fence_shared_writes();
    __syncthreads();
    take<Sum>(sums, rows.sum);
  }

  // Issues the probabilities' products with 64 columns of the values.
  __device__ __forceinline__ void start_values(int sub, float (&out)[kN / 2]) {
    const uint32_t values = uniform(keys_across_rows_), probabilities = uniform(probabilities_);
#pragma unroll
    for (int k = 0; k < kPage / 16; ++k) {
      detail::wgmma<typename Wgmma::template Shared<kAcrossRows, kByRows>>(
          kDescriptorHigh | (values + sub * (kSubBytes / 16) + k * (16 * 128 / 16)),
          kDescriptorHigh | (probabilities + 2 * k), out, k > 0);
    }
    cute::warpgroup_commit_batch();
  }
  __device__ __forceinline__ void multiply_values() {
#pragma unroll
    for (int sub = 0; sub < kValueSubs; ++sub) detail::fence_registers(out_[sub]);
    cute::warpgroup_arrive();
#pragma unroll
    for (int sub = 0; sub < kValueSubs; ++sub) start_values(sub, out_[sub]);
    cute::warpgroup_wait<0>();
#pragma unroll
    for (int sub = 0; sub < kValueSubs; ++sub) detail::fence_registers(out_[sub]);
  }
  // The same for a page that is not the chunk's first: 64 columns are merged while the next are multiplied.
  __device__ __forceinline__ void merge_values(const Rows& of_page) {
    float ours[kColumns], its[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const Merged merged(rows_.max[c], of_page.max[c]);
      ours[c] = merged.left, its[c] = merged.right;
      rows_.sum[c] = merged(rows_.sum[c], of_page.sum[c]);
      rows_.max[c] = merged.max;
    }
    float out[2][kN / 2];
    const auto start = [&](int sub) {
      detail::fence_registers(out[sub % 2]);
      cute::warpgroup_arrive();
      start_values(sub, out[sub % 2]);
    };
    const auto add = [&](int sub) {
      detail::fence_registers(out[sub % 2]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& sum = out_[sub][place(c, half)];
          sum = Merged::add(sum, ours[c], out[sub % 2][place(c, half)], its[c]);
        }
      }
    };
    start(0);
#pragma unroll
    for (int sub = 1; sub < kValueSubs; ++sub) {
      start(sub);
      cute::warpgroup_wait<1>();
      add(sub - 1);
    }
    cute::warpgroup_wait<0>();
    add(kValueSubs - 1);
  }

  __device__ __forceinline__ void store(const Stage& at) {
    const int64_t first = static_cast<int64_t>(at.sequence) * p.pieces + at.piece;
    const bool only = at.piece == 0 && at.end == p.tables.pages_in_table(at.length);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int row = row_of(c);
      if (row >= p.rows) continue;
      const float sum = spoiled_ ? NAN : rows_.sum[c], factor = inverse_of(sum);
      float* const partial = p.partial + (first * p.rows + row) * kLatent;
      bf16* const target = p.out + (static_cast<int64_t>(at.sequence) * p.rows + row) * kLatent;
#pragma unroll
      for (int sub = 0; sub < kValueSubs; ++sub) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = sub * kSubColumns + fragment_row(half);
          const float x = out_[sub][place(c, half)];
          if (only) {
            target[column] = __float2bfloat16(x * factor);
          } else {
            partial[column] = x;
          }
        }
      }
      if (!only && threadIdx.x < 4) p.partial_state[first * p.rows + row] = float2{rows_.max[c], sum};
    }
  }

  // Over the rows of a fragment that the warp has.
  template <class Op>
  static __device__ __forceinline__ float over_rows(float x) {
#pragma unroll
    for (int distance = 4; distance < kWarpSize; distance *= 2) x = Op{}(x, __shfl_xor_sync(kAll, x, distance));
    return x;
  }
  // A number for each row of queries, of each warp, and of all of them.
  __device__ __forceinline__ void leave(float (&of_warps)[kWarpgroupWarps][kN],
                                        const float (&of_warp)[kColumns]) const {
    if (lane_ >= 4) return;
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      *reinterpret_cast<float2*>(&of_warps[warp_][row_of(c)]) = float2{of_warp[c], of_warp[c + 1]};
    }
  }
  template <class Op>
  __device__ __forceinline__ void take(const float (&of_warps)[kWarpgroupWarps][kN], float (&x)[kColumns]) const {
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      x[c] = x[c + 1] = Op::kIdentity;
#pragma unroll
      for (int warp = 0; warp < kWarpgroupWarps; ++warp) {
        const float2 of_warp = *reinterpret_cast<const float2*>(&of_warps[warp][row_of(c)]);
        x[c] = Op{}(x[c], of_warp.x), x[c + 1] = Op{}(x[c + 1], of_warp.y);
      }
    }
  }

  const AttentionParams& p;
  AttentionShared<kN>& s;
  int warp_, lane_;
  uint32_t keys_by_rows_, keys_across_rows_, queries_, probabilities_;  // descriptors
  uint32_t keys_full_, queries_full_;
  uint32_t keys_phase_ = 0, queries_phase_ = 0;
  int sequence_ = -1;   // whose queries are there
  bool spoiled_;        // the piece meets a page that there is not
  int more_[kColumns];  // keys that a row sees, less those of its sequence: the last token's sees all
  Rows rows_;           // of the piece so far, as the output
  float out_[kValueSubs][kN / 2];
};

template <int kN>
__global__ void __launch_bounds__(kWarpgroup, 2) few_attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<AttentionShared<kN>*>(raw);
  Attention<kN> attention(p, shared);
  if (threadIdx.x == 0) attention.init();
  if (!p.static_cache) wait_for_inputs();
  Stages stages(p.tables);
  Stage now = stages.first();
  if (threadIdx.x == 0 && now.sequence >= 0) attention.load_keys(now);
  if (p.static_cache) wait_for_inputs();  // a block without a piece too: a grid must not end before the one ahead
  release_dependents();
  if (now.sequence < 0) return;
  if (threadIdx.x == 0) attention.load_queries(now.sequence);
  __syncthreads();  // the barriers are ready
  for (bool begins = true; now.sequence >= 0;) {
    const Stage next = stages.next(now);
    attention.attend(now, next, begins);
    begins = now.is_last();
    now = next;
  }
}

// A part of a row's keys: four columns of its output.
struct Part {
  float max = -INFINITY, sum = 0.f;
  float4 out = {};
  __device__ __forceinline__ void merge(const Part& x) {
    const Merged merged(max, x.max);
    max = merged.max, sum = merged(sum, x.sum);
    out.x = merged(out.x, x.out.x), out.y = merged(out.y, x.out.y);
    out.z = merged(out.z, x.out.z), out.w = merged(out.w, x.out.w);
  }
};

// The sum of the first `count` parts, of chunks that have kPages of them each.
template <int kPages>
__device__ __forceinline__ void merge_chunks(Part& all, Part (&parts)[kCombined], int count) {
#pragma unroll
  for (int i = 0; i < kCombined; i += kPages) {
    if (i >= count) return;
#pragma unroll
    for (int k = 1; k < kPages; ++k) {
      if (i + k < count) parts[i].merge(parts[i + k]);
    }
    all.merge(parts[i]);
  }
}

// Merges the pieces of sequences that have several; zeros for those without keys, NaN where the table has no page. A block a
// row.
__global__ void __launch_bounds__(kLatent / 4) combine_pieces_kernel(const __grid_constant__ AttentionParams p) {
  const int sequence = blockIdx.y, row = blockIdx.x, column = threadIdx.x * 4;
  const int length = p.tables.length(sequence);  // the kernel ahead had it before it let this one begin
  const int pieces = p.tables.pieces(length);
  wait_for_inputs();
  release_dependents();
  if (p.tables.width < pages_of(length) && row == 0 && threadIdx.x == 0)
    report(p.error, DeviceErrorCode::kPages, sequence, -1, p.tables.width, p.tables.pages);
  if (pieces == 1) return;
  const int64_t first = static_cast<int64_t>(sequence) * p.pieces * p.rows + row;
  Part all;
  for (int begin = 0; begin < pieces; begin += kCombined) {
    // All that is read is asked for before any of it is used.
    Part parts[kCombined];
#pragma unroll
    for (int i = 0; i < kCombined; ++i) {
      if (begin + i >= pieces) continue;
      const int64_t at = first + (begin + i) * p.rows;
      const float2 state = p.partial_state[at];
      parts[i] = {state.x, state.y, *reinterpret_cast<const float4*>(p.partial + at * kLatent + column)};
    }
    const int count = pieces - begin;
    if (!p.tables.pages_apart) {
      merge_chunks<1>(all, parts, count);
    } else if (begin < kPagesASize) {
      merge_chunks<2>(all, parts, count);
    } else {
      merge_chunks<4>(all, parts, count);
    }
  }
  const float factor = pieces == 0 && length > 0 ? NAN : inverse_of(all.sum);
  __nv_bfloat162 rounded[2] = {__floats2bfloat162_rn(all.out.x * factor, all.out.y * factor),
                               __floats2bfloat162_rn(all.out.z * factor, all.out.w * factor)};
  bf16* const out = p.out + (static_cast<int64_t>(sequence) * p.rows + row) * kLatent + column;
  *reinterpret_cast<uint2*>(out) = reinterpret_cast<const uint2&>(rounded);
}

template <int kN>
void launch_few_attention(const AttentionParams& p, cudaStream_t stream) {
  static_assert(sizeof(AttentionShared<kN>) <= 113 * 1024, "half of a multiprocessor's");
  Launch shape{.block = dim3(kWarpgroup), .smem = sizeof(AttentionShared<kN>)};
  const int64_t pieces = std::max<int64_t>(static_cast<int64_t>(p.tables.batch) * p.pieces, 1);
  shape.grid = dim3(std::min<int64_t>(pieces, some_clusters("few_attention", few_attention_kernel<kN>, shape)));
  launch("few_attention", few_attention_kernel<kN>, shape, stream, p);
}

}  // namespace

int64_t few_attention_pieces(int64_t batch, int64_t width) {
  return are_pages_apart(batch, width) ? width : num_chunks(static_cast<int>(width));
}

void few_attention(Tensor out, Tensor partial, Tensor partial_state, Tensor q, Tensor cache, Tensor block_table,
                   Tensor seq_lens, double softmax_scale, bool static_cache, cudaStream_t stream) {
  check_operand("q", q, Dtype::kBFloat16);
  DSV3_CHECK(q.dim() == 4, "q must be (batch, steps, heads, ", kWidth, "), got ", q);
  const int64_t batch = q.size(0), steps = q.size(1), heads = q.size(2), rows = steps * heads;
  check_shape("q", q, batch, steps, heads, kWidth);
  DSV3_CHECK(rows >= 1 && rows <= kMaxRows, "q must have 1 to ", kMaxRows, " rows of steps and heads, got ", q);
  check_operand("out", out, Dtype::kBFloat16, batch, steps, heads, kLatent);
  check_operand("cache", cache, Dtype::kBFloat16, cache.size(0), kPage, 1, kWidth);
  DSV3_CHECK(cache.size(0) > 0, "the cache must have at least one page, got ", cache);
  DSV3_CHECK(cache.size(0) * kPage < int64_t{1} << 31, "the cache has too many rows: ", cache);
  DSV3_CHECK(batch * rows < int64_t{1} << 31, "q has too many rows: ", q);
  check_operand("seq_lens", seq_lens, Dtype::kInt32, batch);
  DSV3_CHECK(block_table.is_cuda() && block_table.dtype() == Dtype::kInt32 && block_table.dim() == 2 &&
                 block_table.size(0) == batch && (block_table.size(1) <= 1 || block_table.stride(1) == 1),
             "block_table must be int32 (batch, width) on a CUDA device, its rows contiguous, got ", block_table);
  const int64_t pieces = few_attention_pieces(batch, block_table.size(1));
  check_operand("partial", partial, Dtype::kFloat32, batch, pieces, rows, kLatent);
  check_operand("partial_state", partial_state, Dtype::kFloat32, batch, pieces, rows, 2);
  if (batch == 0) return;
  const DeviceGuard guard(q);
  const int64_t room = rows <= 16 ? 16 : kMaxRows;
  const AttentionParams p{.q = sub_blocks_map(q.data<void>(), batch * rows, kWidth, room, kSubs),
                          .keys = sub_blocks_map(cache.data<void>(), cache.size(0) * kPage, kWidth, kPage, kSubs),
                          .out = out.data<bf16>(),
                          .partial = partial.data<float>(),
                          .partial_state = partial_state.data<float2>(),
                          .tables = {.entries = block_table.data<int>(),
                                     .seq_lens = seq_lens.data<int>(),
                                     .stride = block_table.stride(0),
                                     .pages = cache.size(0),
                                     .batch = static_cast<int>(batch),
                                     .width = static_cast<int>(block_table.size(1)),
                                     .pages_apart = are_pages_apart(batch, block_table.size(1))},
                          .pieces = static_cast<int>(pieces),
                          .rows = static_cast<int>(rows),
                          .steps = static_cast<int>(steps),
                          .heads = static_cast<int>(heads),
                          .scale = static_cast<float>(softmax_scale * 1.4426950408889634),
                          .static_cache = static_cache,
                          .error = device_error()};
  room == 16 ? launch_few_attention<16>(p, stream) : launch_few_attention<kMaxRows>(p, stream);
  const Launch shape{.grid = dim3(rows, batch), .block = dim3(kLatent / 4)};
  launch("few_attention", combine_pieces_kernel, shape, stream, p);
}

}  // namespace dsv3
