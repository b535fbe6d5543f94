// What a decoding round does besides the model: where its tokens stand, and which tokens it has found. Both are a few numbers a
// sequence; as single kernels they replace some thirty elementwise ones.
//
//   decode_positions  positions lengths + first, ... of `steps` tokens, their places in the cache, lengths with them
//   greedy_round      best[b, s] = argmax logits[b, s]; a = how many of the drafts equal the best tokens before them;
//                     result = [best | a]; the newest token is best[b, a], and the length grows by a + 1
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kPositionThreads = 128;
constexpr int kThreads = 1024, kWarps = kThreads / kWarpSize;
constexpr int kMaxSteps = 32;

struct PositionParams {
  int64_t *positions, *slots;  // [B, steps]
  int* seq_lens;               // [B]
  const int64_t *lengths, *active;
  const int* block_table;  // [B, W]
  int64_t table_stride, first, last_position;
  int batch, steps, width, page;
};

__global__ void __launch_bounds__(kPositionThreads) positions_kernel(PositionParams p) {
  wait_for_inputs();
  release_dependents();
  const int i = blockIdx.x * kPositionThreads + threadIdx.x;
  if (i >= p.batch * p.steps) return;
  const int row = i / p.steps, step = i % p.steps;
  const int64_t begin = p.lengths[row] + p.first, position = begin + step, entry = position / p.page;
  const bool active = p.active[row] != 0;
  const bool stored = active && position >= 0 && entry < p.width;
  p.positions[i] = max(int64_t{0}, min(position, p.last_position));
  p.slots[i] =
      stored ? p.block_table[row * p.table_stride + entry] * static_cast<int64_t>(p.page) + position % p.page : -1;
  if (step == 0) p.seq_lens[row] = active ? static_cast<int>(begin + p.steps) : 0;
}

struct GreedyParams {
  int64_t *result, *tokens, *lengths;  // [B, steps + 1], [B, steps], [B]; tokens are the newest and the drafts
  const int64_t* active;               // [B]
  const bf16* logits;                  // [B, steps, V]
  int64_t result_stride, tokens_stride;
  int steps, vocab;
};

// -0 is 0, NaN is above all.
__device__ __forceinline__ unsigned key_of(bf16 x) { return __hisnan(x) ? ~0u : dsv3::key_of(to_float(x) + 0.f); }

__device__ __forceinline__ bf16 larger(const uint4& v, bf16 than) {
  __nv_bfloat162 most{than, than};
  for (const uint32_t word : {v.x, v.y, v.z, v.w})
    most = __hmax2_nan(most, reinterpret_cast<const __nv_bfloat162&>(word));
  return __hmax_nan(most.x, most.y);
}

// The first of 8 values with this key; 8 where none has it.
__device__ __forceinline__ int first_with(unsigned key, const uint4& v) {
  const bf16* const values = reinterpret_cast<const bf16*>(&v);
  int first = 8;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    if (key_of(values[i]) == key) first = i;
  }
  return first;
}

// The best key of a row is found first, then the first place that has it, by the threads that have seen it.
__global__ void __launch_bounds__(kThreads) greedy_round_kernel(GreedyParams p) {
  static_assert(kWarps == kWarpSize);
  __shared__ unsigned keys[2][kWarps];
  __shared__ int best[kMaxSteps];
  if (threadIdx.x < kMaxSteps) best[threadIdx.x] = p.vocab - 1;
  wait_for_inputs();
  release_dependents();
  const int64_t row = blockIdx.x;
  int64_t* const tokens = p.tokens + row * p.tokens_stride;
  int64_t* const result = p.result + row * p.result_stride;
  const int64_t length = p.lengths[row], active = p.active[row];
  const int begin = threadIdx.x * 8;
  for (int step = 0; step < p.steps; ++step) {
    const bf16* const logits = p.logits + (row * p.steps + step) * p.vocab;
    const auto vector = [&](int i) { return *reinterpret_cast<const uint4*>(logits + i); };
    bf16 most = __float2bfloat16_rn(-INFINITY);
#pragma unroll 4
    for (int i = begin; i < p.vocab; i += kThreads * 8) most = larger(vector(i), most);
    const unsigned mine = key_of(most), of_warp = __reduce_max_sync(0xffffffffu, mine);
    if (threadIdx.x % kWarpSize == 0) keys[step % 2][threadIdx.x / kWarpSize] = of_warp;
    __syncthreads();
    const unsigned key = __reduce_max_sync(0xffffffffu, keys[step % 2][threadIdx.x % kWarpSize]);
    if (mine != key) continue;
    for (int i = begin; i < p.vocab; i += kThreads * 8) {
      const int at = first_with(key, vector(i));
      if (at == 8) continue;
      atomicMin(&best[step], i + at);
      break;
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  int accepted = 0;
  while (accepted + 1 < p.steps && tokens[accepted + 1] == best[accepted]) ++accepted;
  for (int step = 0; step < p.steps; ++step) result[step] = best[step];
  result[p.steps] = accepted;
  tokens[0] = best[accepted];
  if (active != 0) p.lengths[row] = length + accepted + 1;
}

void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_shape(name, t, rows, columns);
  DSV3_CHECK(t.is_cuda() && t.dtype() == Dtype::kInt64 && (columns == 1 || t.stride(1) == 1), name,
             " must be int64 on a CUDA device, its rows contiguous, got ", t);
}

}  // namespace

void decode_positions(Tensor positions, Tensor slots, Tensor seq_lens, Tensor lengths, Tensor active,
                      Tensor block_table, int64_t first, int64_t steps, int64_t page, int64_t last_position,
                      cudaStream_t stream) {
  const int64_t batch = lengths.size(0);
  check_operand("lengths", lengths, Dtype::kInt64, batch);
  check_operand("active", active, Dtype::kInt64, batch);
  check_operand("positions", positions, Dtype::kInt64, batch * steps);
  check_operand("slots", slots, Dtype::kInt64, batch * steps);
  check_operand("seq_lens", seq_lens, Dtype::kInt32, batch);
  check_operand("block_table", block_table, Dtype::kInt32, batch, block_table.size(1));
  const DeviceGuard guard(lengths);
  const PositionParams p{.positions = positions.data<int64_t>(),
                         .slots = slots.data<int64_t>(),
                         .seq_lens = seq_lens.data<int>(),
                         .lengths = lengths.data<int64_t>(),
                         .active = active.data<int64_t>(),
                         .block_table = block_table.data<int>(),
                         .table_stride = block_table.stride(0),
                         .first = first,
                         .last_position = last_position,
                         .batch = static_cast<int>(batch),
                         .steps = static_cast<int>(steps),
                         .width = static_cast<int>(block_table.size(1)),
                         .page = static_cast<int>(page)};
  const Launch shape{.grid = dim3(ceil_div(batch * steps, kPositionThreads)), .block = dim3(kPositionThreads)};
  launch("decode_positions", positions_kernel, shape, stream, p);
}

void greedy_round(Tensor result, Tensor tokens, Tensor lengths, Tensor logits, Tensor active, cudaStream_t stream) {
  check_operand("logits", logits, Dtype::kBFloat16);
  DSV3_CHECK(logits.dim() == 3, "logits must be (batch, steps, vocabulary), got ", logits);
  const int64_t batch = logits.size(0), steps = logits.size(1), vocab = logits.size(2);
  DSV3_CHECK(steps >= 1 && steps <= kMaxSteps && vocab % 8 == 0 && vocab > 0 && vocab < INT32_MAX,
             "logits must have 1 to ", kMaxSteps, " steps and a multiple of 8 words, got ", logits);
  check_rows("result", result, batch, steps + 1);
  check_rows("tokens", tokens, batch, steps);
  check_operand("lengths", lengths, Dtype::kInt64, batch);
  check_operand("active", active, Dtype::kInt64, batch);
  const DeviceGuard guard(logits);
  const GreedyParams p{.result = result.data<int64_t>(),
                       .tokens = tokens.data<int64_t>(),
                       .lengths = lengths.data<int64_t>(),
                       .active = active.data<int64_t>(),
                       .logits = logits.data<bf16>(),
                       .result_stride = result.stride(0),
                       .tokens_stride = tokens.stride(0),
                       .steps = static_cast<int>(steps),
                       .vocab = static_cast<int>(vocab)};
  launch("greedy_round", greedy_round_kernel, {.grid = dim3(batch), .block = dim3(kThreads)}, stream, p);
}

}  // namespace dsv3
