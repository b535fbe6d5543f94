// The experts of few tokens, routed and shared, in two launches without permutation, padding or counts:
//
//   act[t, j] = swiglu(x[t] Wgu[e]^T) * weight[t, j],  y[t, j] = act[t, j] Wd[e]^T,  e = topk_idx[t, j],
//
// and slot j = k of the shared experts, which take every token and have no weight. Roofline: the weights of every expert
// that is chosen, once. A block takes 32 rows of one expert's matrix (16 of the gate's half and 16 of the other) and all of
// its tokens. It finds them in topk_idx itself: the n-th expert that occurs is the n-th job, and there are no more jobs
// than choices. Rows of act and y are the choices, so nothing is moved. Products: few_tokens.cuh.
#include <algorithm>

#include "../ops.h"
#include "few_tokens.cuh"

namespace dsv3 {
namespace {

constexpr int kMaxExperts = 512, kMaxPairs = 1024;

// One of the two matrices, of the routed experts or of the shared ones.
struct Part {
  const bf16* weight;  // [E, N, K], or [N, K]
  const bf16* x;       // rows of K: tokens or choices
  bf16* out;           // rows of `columns`
  int rows, depth;     // N and K
  int columns;         // of out: N, or N / 2 where the halves meet in SwiGLU
  int blocks;          // an expert
};

struct FewExpertsParams {
  Part routed, shared;
  const int64_t* topk_idx;    // [T, k]
  const float* topk_weights;  // [T, k]
  int tokens, topk, experts;
  int slots;  // of y a token: topk, and one where there are shared experts
  bool static_weights;
};

struct Chosen {
  unsigned occurs[kMaxExperts / 32];
  int counts[kMaxWarps];
  int pairs[kMaxPairs];  // choices (token * topk + j) of the block's expert, ascending
};

// The n-th expert that occurs among the pairs, -1 where there are fewer. `occurs` must be zero.
__device__ __forceinline__ int find_expert(const FewExpertsParams& p, Chosen& chosen, int n) {
  const int pairs = p.tokens * p.topk;
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) {
    const int64_t e = p.topk_idx[i];
    if (e >= 0 && e < p.experts) atomicOr(&chosen.occurs[e / 32], 1u << e % 32);
  }
  __syncthreads();
  for (int word = 0; word * 32 < p.experts; ++word) {
    unsigned bits = chosen.occurs[word];
    const int count = __popc(bits);
    if (n >= count) {
      n -= count;
      continue;
    }
    for (; n > 0; --n) bits &= bits - 1;
    return word * 32 + __ffs(bits) - 1;
  }
  return -1;
}

// Fills chosen.pairs with the pairs of the expert and returns their number.
__device__ __forceinline__ int list_pairs(const FewExpertsParams& p, Chosen& chosen, int expert) {
  const int pairs = p.tokens * p.topk, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  int found = 0;
  for (int first = 0; first < pairs; first += blockDim.x) {
    const int pair = first + threadIdx.x;
    const bool mine = pair < pairs && p.topk_idx[pair] == expert;
    const unsigned votes = __ballot_sync(0xffffffffu, mine);
    if (threadIdx.x % kWarpSize == 0) chosen.counts[warp] = __popc(votes);
    __syncthreads();
    int before = found;
    for (int w = 0; w < warps; ++w) {
      before += w < warp ? chosen.counts[w] : 0;
      found += chosen.counts[w];
    }
    if (mine) chosen.pairs[before + __popc(votes & ((1u << threadIdx.x % kWarpSize) - 1))] = pair;
    __syncthreads();
  }
  return found;
}

// What a block computes: rows from `row` on of a matrix for `count` choices, or tokens where shared.
struct Work {
  Part part;
  int row, count;
  bool shared;
};

template <bool kSwiglu>
__device__ __forceinline__ void store_tile(const FewExpertsParams& p, const Work& work, const int* list,
                                           const float* sums, int first) {
  const int warps = blockDim.x / kWarpSize;
  for (int i = threadIdx.x; i < kTokenTile * kRowTile; i += blockDim.x) {
    const int at = first + i / kRowTile, r = i % kRowTile;
    if (at >= work.count) return;
    const int choice = work.shared ? at : list[at];
    const float* const place = sums + i / kRowTile * kSumStride + r;
    const float a = add_sums(place, warps, 2 * kSumTile), b = add_sums(place + kSumTile, warps, 2 * kSumTile);
    bf16* const out = work.part.out + work.row + r;
    if constexpr (kSwiglu) {
      const float gate = to_float(__float2bfloat16_rn(a)), up = to_float(__float2bfloat16_rn(b));
      const float weight = work.shared ? 1.f : p.topk_weights[choice];
      const int64_t at_row = static_cast<int64_t>(choice) * work.part.columns;
      out[at_row] = __float2bfloat16_rn(gate / (1.f + expf(-gate)) * up * weight);
    } else {
      const int slot = work.shared ? at * p.slots + p.topk : choice / p.topk * p.slots + choice % p.topk;
      const int64_t at_row = static_cast<int64_t>(slot) * work.part.columns;
      out[at_row] = __float2bfloat16_rn(a);
      out[at_row + kRowTile] = __float2bfloat16_rn(b);
    }
  }
}

template <int kTiles, bool kSwiglu>
__device__ __forceinline__ void compute(const FewExpertsParams& p, const Work& work, Weights<2>& weights,
                                        const bf16* const (&rows)[2], const int* list, float* sums) {
  const int warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize, depth = work.part.depth;
  for (int first = 0; first < work.count; first += kTiles * kTokenTile) {
    const bf16* x[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int at = first + i * kTokenTile + lane_row();
      x[i] = nullptr;
      if (at >= work.count) continue;
      const int row = work.shared ? at : kSwiglu ? list[at] / p.topk : list[at];
      x[i] = work.part.x + static_cast<int64_t>(row) * depth + lane_column();
    }
    float sum[kTiles][2][4] = {};
    for (int chunk = warp; chunk * kChunk < depth; chunk += warps) {
      weights.load(rows, chunk, depth);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (first + i * kTokenTile >= work.count) break;
        uint4 values[kSteps];
        load_tokens(values, x[i], chunk, depth);
        multiply<2>(sum[i], weights, values);
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (first + i * kTokenTile >= work.count) break;
      leave_sums(sums + 2 * warp * kSumTile, sum[i][0]);
      leave_sums(sums + (2 * warp + 1) * kSumTile, sum[i][1]);
      __syncthreads();
      store_tile<kSwiglu>(p, work, list, sums, first + i * kTokenTile);
      __syncthreads();
    }
  }
}

template <int kTiles, bool kSwiglu>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) few_experts_kernel(FewExpertsParams p) {
  extern __shared__ float sums[];  // [warps, 2, kSumTile]
  __shared__ Chosen chosen;
  const int warp = threadIdx.x / kWarpSize, index = blockIdx.x - p.shared.blocks;
  const bool shared = index < 0;
  const Part part = shared ? p.shared : p.routed;
  const int row = (shared ? blockIdx.x : index % part.blocks) * (kSwiglu ? kRowTile : 2 * kRowTile);
  const bf16* const first = part.weight + static_cast<int64_t>(row + lane_row()) * part.depth + lane_column();
  const bf16* rows[2] = {first, first + static_cast<int64_t>(kSwiglu ? part.columns : kRowTile) * part.depth};
  for (int i = threadIdx.x; i < kMaxExperts / 32; i += blockDim.x) chosen.occurs[i] = 0u;
  Weights<2> weights;
  if (shared && p.static_weights) weights.load(rows, warp, part.depth);
  __syncthreads();
  wait_for_inputs();
  release_dependents();
  int count = p.tokens;
  if (!shared) {
    const int expert = find_expert(p, chosen, index / part.blocks);
    if (expert < 0) return;
    const int64_t offset = static_cast<int64_t>(expert) * part.rows * part.depth;
    rows[0] += offset;
    rows[1] += offset;
    weights.load(rows, warp, part.depth);
    count = list_pairs(p, chosen, expert);
  }
  compute<kTiles, kSwiglu>(p, Work{part, row, count, shared}, weights, rows, chosen.pairs, sums);
}

template <bool kSwiglu>
void launch_few_experts(const FewExpertsParams& p, cudaStream_t stream) {
  const int jobs = p.experts ? std::min(p.tokens * p.topk, p.experts) : 0;
  const int depth = std::max(p.routed.depth, p.shared.depth);
  visit_tiles(p.tokens, [&](auto count) {
    const int warps = depth_warps(depth);
    const Launch shape{.grid = dim3(p.shared.blocks + jobs * p.routed.blocks),
                       .block = dim3(warps * kWarpSize),
                       .smem = sizeof(float) * warps * 2 * kSumTile};
    launch("few_experts", few_experts_kernel<decltype(count)::value, kSwiglu>, shape, stream, p);
  });
}

// The parts of both matrices of `experts` experts, whose act begins at `act` and has `inner` columns.
void add_parts(Part& first, Part& second, const Tensor& gate_up, const Tensor& down, const Tensor& x, const Tensor& y,
               bf16* act, int64_t experts) {
  const int64_t hidden = x.size(1), inner = down.size(-1);
  check_operand("gate_up", gate_up, Dtype::kBFloat16);
  check_operand("down", down, Dtype::kBFloat16);
  DSV3_CHECK(gate_up.size(-2) == 2 * inner && gate_up.numel() == experts * 2 * inner * hidden &&
                 down.size(-2) == hidden && down.numel() == experts * inner * hidden,
             "gate_up must be (..., 2 inner, hidden) and down (..., hidden, inner) for x ", x, ", got ", gate_up,
             " and ", down);
  DSV3_CHECK(hidden % kStep == 0 && inner % kStep == 0, "hidden and inner must be multiples of ", kStep, ", got ",
             gate_up);
  const int rows = static_cast<int>(2 * inner), columns = static_cast<int>(hidden), width = static_cast<int>(inner);
  first = {gate_up.data<bf16>(), x.data<bf16>(), act, rows, columns, width, width / kRowTile};
  second = {down.data<bf16>(), act, y.data<bf16>(), columns, width, columns, columns / (2 * kRowTile)};
}

}  // namespace

void few_experts(Tensor y, Tensor act, Tensor x, std::optional<Tensor> topk_idx, std::optional<Tensor> topk_weights,
                 std::optional<Tensor> gate_up, std::optional<Tensor> down, std::optional<Tensor> shared_gate_up,
                 std::optional<Tensor> shared_down, bool static_weights, cudaStream_t stream) {
  check_operand("x", x, Dtype::kBFloat16);
  DSV3_CHECK(x.dim() == 2 && x.size(0) <= kFewTokens, "x must be (tokens, hidden) of at most ", kFewTokens,
             " tokens, got ", x);
  const int64_t tokens = x.size(0), topk = topk_idx ? topk_idx->size(1) : 0;
  FewExpertsParams first{.tokens = static_cast<int>(tokens),
                         .topk = static_cast<int>(topk),
                         .slots = static_cast<int>(topk + shared_gate_up.has_value()),
                         .static_weights = static_weights};
  check_operand("y", y, Dtype::kBFloat16, tokens, first.slots, x.size(1));
  check_operand("act", act, Dtype::kBFloat16);
  FewExpertsParams second = first;
  int64_t used = 0;
  if (topk_idx) {
    DSV3_CHECK(topk_weights && gate_up && down && gate_up->dim() == 3,
               "topk_idx needs topk_weights, gate_up (experts, 2 inner, hidden) and down beside it");
    check_operand("topk_idx", *topk_idx, Dtype::kInt64, tokens, topk);
    check_operand("topk_weights", *topk_weights, Dtype::kFloat32, tokens, topk);
    const int64_t experts = gate_up->size(0);
    DSV3_CHECK(experts <= kMaxExperts && topk >= 1 && tokens * topk <= kMaxPairs, "expected at most ", kMaxExperts,
               " experts and ", kMaxPairs, " choices, got ", experts, " and ", tokens * topk);
    first.experts = second.experts = static_cast<int>(experts);
    first.topk_idx = second.topk_idx = topk_idx->data<int64_t>();
    first.topk_weights = second.topk_weights = topk_weights->data<float>();
    add_parts(first.routed, second.routed, *gate_up, *down, x, y, act.data<bf16>(), experts);
    used = tokens * topk * down->size(-1);
  }
  if (shared_gate_up) {
    DSV3_CHECK(shared_down && shared_gate_up->dim() == 2, "shared_gate_up (2 inner, hidden) needs shared_down");
    add_parts(first.shared, second.shared, *shared_gate_up, *shared_down, x, y, act.data<bf16>() + used, 1);
    used += tokens * shared_down->size(-1);
  }
  DSV3_CHECK(act.numel() == used, "act must have ", used, " elements, got ", act);
  if (tokens == 0) return;
  const DeviceGuard guard(x);
  launch_few_experts<true>(first, stream);
  launch_few_experts<false>(second, stream);
}

}  // namespace dsv3
