// The experts of few tokens, routed and shared, in two launches without permutation, padding or counts:
//
//   act[t, j] = swiglu(x[t] Wgu[e]^T) * weight[t, j],  y[t, j] = act[t, j] Wd[e]^T,  e = topk_idx[t, j],
//
// and slot j = k of the shared experts, which take every token and have no weight. Roofline: the weights of every expert
// that is chosen, once. A tile is 64 rows of one expert's matrix (32 of the gate's half and 32 of the other) with all of its
// tokens, which are found in topk_idx: the n-th expert that occurs is the n-th job. Rows of act and y are the
// choices, so nothing is moved. Weights are all bf16 or all FP8. Products: few_tiles.cuh.
#include <algorithm>

#include "../ops.h"
#include "few_tiles.cuh"

namespace dsv3 {
namespace {

constexpr int kMaxTokens = 64, kMaxExperts = 512, kMaxPairs = 1024;
constexpr int kDepthMultiple = 32;  // of hidden and inner: half a tile's rows, and whole vectors of a box

// One of the two matrices, of the routed experts or of the shared ones.
struct Part {
  CUtensorMap weight;   // [E N, K]
  const float* scales;  // of FP8, [E, blocks of N, blocks of K]
  const bf16* x;        // rows of K: tokens or choices
  bf16* out;            // rows of `columns`
  int rows, depth;      // N and K
  int columns;          // of out: N, or N / 2 where the halves meet in SwiGLU
  int tiles;            // an expert
};

struct FewExpertsParams {
  Part routed, shared;
  const int64_t* topk_idx;    // [T, k]
  const float* topk_weights;  // [T, k]
  int tokens, topk, experts;
  int slots;  // of y a token: topk, and one where there are shared experts
  bool fp8, static_weights;
};

struct Chosen {
  int counts[kMaxExperts];     // choices of each expert
  int16_t jobs[kMaxExperts];   // the experts that occur, ascending
  int16_t experts[kMaxPairs];  // of each choice (token * topk + j), -1 where there is none
};

using PairLists = int16_t[kTokenLists][kMaxPairs];  // choices of a tile's expert, ascending

template <class C>
struct ExpertsShared {
  TileShared<C> tile;
  Chosen chosen;
  PairLists pairs;
  static_assert(sizeof(TileShared<C>) + sizeof(Chosen) + sizeof(PairLists) <= kHalfOfMemory);
};

// Reads the choices, and returns how many experts occur among them. By the whole block, which must meet before it uses them.
__device__ __forceinline__ int read_choices(const FewExpertsParams& p, Chosen& chosen) {
  for (int e = threadIdx.x; e < kMaxExperts; e += blockDim.x) chosen.counts[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < p.tokens * p.topk; i += blockDim.x) {
    const int64_t e = __ldcg(p.topk_idx + i);  // past L1: before the wait, perhaps
    const bool there = e >= 0 && e < p.experts;
    chosen.experts[i] = static_cast<int16_t>(there ? e : -1);
    if (there) atomicAdd(&chosen.counts[e], 1);
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, warps = blockDim.x / kWarpSize;
  int found = 0;
  for (int first = 0, turn = 0; first < p.experts; first += kWarpSize, ++turn) {
    const bool occurs = chosen.counts[first + lane] > 0;
    const unsigned bits = __ballot_sync(0xffffffffu, occurs);
    if (occurs && turn % warps == warp) {
      chosen.jobs[found + __popc(bits & ((1u << lane) - 1))] = static_cast<int16_t>(first + lane);
    }
    found += __popc(bits);
  }
  return found;
}

// Lists the pairs of an expert. By a whole warp.
__device__ __forceinline__ void list_pairs(const Chosen& chosen, int pairs, int expert, int16_t* list) {
  const int lane = threadIdx.x % kWarpSize;
  int found = 0;
  __syncwarp();
  for (int first = 0; first < pairs; first += kWarpSize) {
    const bool mine = first + lane < pairs && chosen.experts[first + lane] == expert;
    const unsigned votes = __ballot_sync(0xffffffffu, mine);
    if (mine) list[found + __popc(votes & ((1u << lane) - 1))] = static_cast<int16_t>(first + lane);
    found += __popc(votes);
  }
  __syncwarp();
}

// Tiles of the shared experts come first, one for every kN tokens, then those of the experts that occur. As few_tiles.cuh wants
// it.
template <class C, bool kSwiglu>
struct ExpertsWork {
  static constexpr int kColumns = kSwiglu ? kTileRows / 2 : kTileRows;  // of out a tile
  const FewExpertsParams& p;
  const Chosen& chosen;
  int16_t (*lists)[kMaxPairs];
  int jobs;                   // of the routed experts
  int16_t* pairs = nullptr;   // the list at hand
  int expert = 0, count = 0;  // of the tile: its expert, and how many tokens it has
  int column = 0;             // of out, the tile's first
  int skipped = 0;            // tokens of the shared experts before the tile's
  bool shared = false;

  __device__ __forceinline__ const Part& part() const { return shared ? p.shared : p.routed; }
  __device__ __forceinline__ int shared_tiles() const { return p.shared.tiles * ceil_div(p.tokens, C::kN); }
  __device__ __forceinline__ int tiles() const { return shared_tiles() + jobs * p.routed.tiles; }
  __device__ __forceinline__ int depth() const { return part().depth; }
  __device__ __forceinline__ int begin(int tile) {
    shared = tile < shared_tiles();
    if (shared) {
      const int turn = tile / p.shared.tiles;
      skipped = turn * C::kN;
      column = (tile - turn * p.shared.tiles) * kColumns;
      return count = min(p.tokens - skipped, C::kN);
    }
    const int routed = tile - shared_tiles(), job = routed / p.routed.tiles;
    column = (routed - job * p.routed.tiles) * kColumns;
    expert = chosen.jobs[job];
    return count = chosen.counts[expert];
  }
  __device__ __forceinline__ void list(int n, bool make) {
    pairs = lists[n];
    if (make && !shared) list_pairs(chosen, p.tokens * p.topk, expert, pairs);
  }
  __device__ __forceinline__ void load(uint8_t* to, int from, uint64_t& full) const {
    constexpr auto kOnce = cute::TMA::CacheHintSm90::EVICT_FIRST;
    const int row = (shared ? 0 : expert * part().rows) + column;
    tma_load(to, part().weight, full, from, row, kOnce);
    if constexpr (kSwiglu) tma_load(to + kBoxBytes / 2, part().weight, full, from, row + part().columns, kOnce);
  }
  __device__ __forceinline__ const float* scales(int row) const {
    const int rows = part().rows;
    const int of_expert = kSwiglu && row >= kColumns ? part().columns + column : column;
    const int block = (shared ? 0 : expert * ceil_div(rows, kScaleBlock)) + of_expert / kScaleBlock;
    return part().scales + static_cast<int64_t>(block) * ceil_div(depth(), kScaleBlock);
  }
  __device__ __forceinline__ const bf16* x() const { return part().x; }
  // Of act and y a choice is a row; of x, a token.
  __device__ __forceinline__ int row(int token) const {
    return shared ? skipped + token : kSwiglu ? pairs[token] / p.topk : pairs[token];
  }
  template <int kTokens, int kStride>
  __device__ __forceinline__ void store(const float (&sums)[kTokens][kStride], int first, int thread,
                                        int threads) const {
    constexpr int kVectors = kColumns / 2;
    for (int i = thread; i < min(count - first, kTokens) * kVectors; i += threads) {
      const int at = i / kVectors, c = i % kVectors * 2;
      if (column + c >= part().columns) continue;  // the end of a matrix whose rows are no whole tiles
      const int choice = shared ? skipped + at : pairs[first + at];
      int64_t to = choice;
      float2 sum = *reinterpret_cast<const float2*>(&sums[at][c]);
      if constexpr (kSwiglu) {
        const float2 up = *reinterpret_cast<const float2*>(&sums[at][c + kColumns]);
        const float weight = shared ? 1.f : p.topk_weights[choice];
        sum = {activate(sum.x, up.x, weight), activate(sum.y, up.y, weight)};
      } else {
        to = shared ? choice * p.slots + p.topk : choice / p.topk * p.slots + choice % p.topk;
      }
      *reinterpret_cast<__nv_bfloat162*>(part().out + to * part().columns + column + c) =
          __floats2bfloat162_rn(sum.x, sum.y);
    }
  }
  // As if gate and up had been rounded on their way.
  static __device__ __forceinline__ float activate(float gate, float up, float weight) {
    gate = to_float(__float2bfloat16_rn(gate)), up = to_float(__float2bfloat16_rn(up));
    return gate / (1.f + expf(-gate)) * up * weight;
  }
};

template <class C, bool kSwiglu>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    few_experts_kernel(const __grid_constant__ FewExpertsParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<ExpertsShared<C>*>(raw);
  if (threadIdx.x == 0) {
    shared.tile.ring.init();
    cute::prefetch_tma_descriptor(&p.routed.weight);
    cute::prefetch_tma_descriptor(&p.shared.weight);
  }
  // What the down projection needs but act was there before the kernel ahead could let this one begin. Choices come of a kernel
  // just before the first projection.
  const bool early = !kSwiglu || (p.static_weights && p.experts == 0);
  if (!early) wait_for_inputs();
  const int jobs = p.experts ? read_choices(p, shared.chosen) : 0;
  __syncthreads();
  ExpertsWork<C, kSwiglu> work{p, shared.chosen, shared.pairs, jobs};
  run_tiles(shared.tile, work, [&] {
    if (early) wait_for_inputs();
    release_dependents();
  });
}

template <bool kSwiglu>
void launch_few_experts(const FewExpertsParams& p, cudaStream_t stream) {
  const int jobs = p.experts ? std::min(p.tokens * p.topk, p.experts) : 0;
  // Most experts should have their tokens in one pass; those that have more read their weights again. In bf16 16 tokens at a
  // time are never slower than 8.
  const int expected = p.experts ? std::max(2 * p.tokens * p.topk / p.experts, p.fp8 ? 1 : 16) : p.tokens;
  constexpr int kTaken = sizeof(Chosen) + sizeof(PairLists);
  visit_tile_config<kTaken>(std::min(p.tokens, expected), p.fp8, [&](auto config) {
    using C = decltype(config);
    const int64_t tiles = p.shared.tiles * ceil_div(p.tokens, C::kN) + static_cast<int64_t>(jobs) * p.routed.tiles;
    launch("few_experts", few_experts_kernel<C, kSwiglu>, tile_launch<C>(tiles, sizeof(ExpertsShared<C>)), stream, p);
  });
}

// The two matrices of `experts` experts, with the scales of FP8.
struct Matrices {
  const Tensor &gate_up, &down;
  const std::optional<Tensor>&gate_up_sf, &down_sf;
};

// Their parts, whose act begins at `act` and has `inner` columns.
void add_parts(const FewExpertsParams& p, Part& first, Part& second, const Matrices& m, const Tensor& x,
               const Tensor& y, bf16* act, int64_t experts) {
  const auto& [gate_up, down, gate_up_sf, down_sf] = m;
  const int64_t hidden = x.size(1), inner = down.size(-1);
  const Dtype dtype = p.fp8 ? Dtype::kE4M3 : Dtype::kBFloat16;
  check_operand("gate_up", gate_up, dtype);
  check_operand("down", down, dtype);
  DSV3_CHECK(gate_up.size(-2) == 2 * inner && gate_up.numel() == experts * 2 * inner * hidden &&
                 down.size(-2) == hidden && down.numel() == experts * inner * hidden,
             "gate_up must be (..., 2 inner, hidden) and down (..., hidden, inner) for x ", x, ", got ", gate_up,
             " and ", down);
  DSV3_CHECK(experts > 0 && hidden > 0 && inner > 0 && hidden % kDepthMultiple == 0 && inner % kDepthMultiple == 0,
             "there must be experts, hidden and inner multiples of ", kDepthMultiple, ", got ", gate_up);
  const int rows = static_cast<int>(2 * inner), columns = static_cast<int>(hidden), width = static_cast<int>(inner);
  const auto scales = [&](const char* name, const std::optional<Tensor>& sf, int64_t of_rows, int64_t depth) {
    DSV3_CHECK(sf.has_value() == p.fp8, name, " belongs to weights of e4m3, and to these alone");
    if (!p.fp8) return static_cast<const float*>(nullptr);
    check_scales(name, *sf);
    const int64_t rows_of_blocks = ceil_div(of_rows, kScaleBlock), blocks = ceil_div(depth, kScaleBlock);
    DSV3_CHECK(sf->dim() >= 2 && sf->size(-2) == rows_of_blocks && sf->size(-1) == blocks &&
                   sf->numel() == experts * rows_of_blocks * blocks,
               name, " must be (..., ", rows_of_blocks, ", ", blocks, ") for ", experts, " experts, got ", *sf);
    return static_cast<const float*>(sf->data<float>());
  };
  first = {weight_map(gate_up.data<void>(), p.fp8, experts * rows, hidden, kTileRows / 2),
           scales("gate_up_sf", gate_up_sf, rows, hidden),
           x.data<bf16>(),
           act,
           rows,
           columns,
           width,
           ceil_div(width, kTileRows / 2)};
  second = {weight_map(down.data<void>(), p.fp8, experts * hidden, inner, kTileRows),
            scales("down_sf", down_sf, hidden, inner),
            act,
            y.data<bf16>(),
            columns,
            width,
            columns,
            ceil_div(columns, kTileRows)};
}

}  // namespace

void few_experts(Tensor y, Tensor act, Tensor x, std::optional<Tensor> topk_idx, std::optional<Tensor> topk_weights,
                 std::optional<Tensor> gate_up, std::optional<Tensor> down, std::optional<Tensor> shared_gate_up,
                 std::optional<Tensor> shared_down, std::optional<Tensor> gate_up_sf, std::optional<Tensor> down_sf,
                 std::optional<Tensor> shared_gate_up_sf, std::optional<Tensor> shared_down_sf, bool static_weights,
                 cudaStream_t stream) {
  const DeviceGuard guard(x);
  check_operand("x", x, Dtype::kBFloat16);
  DSV3_CHECK(x.dim() == 2 && x.size(0) <= kMaxTokens, "x must be (tokens, hidden) of at most ", kMaxTokens,
             " tokens, got ", x);
  const int64_t tokens = x.size(0), topk = topk_idx ? topk_idx->size(1) : 0;
  FewExpertsParams first{.tokens = static_cast<int>(tokens),
                         .topk = static_cast<int>(topk),
                         .slots = static_cast<int>(topk + shared_gate_up.has_value()),
                         .fp8 = gate_up_sf || shared_gate_up_sf,
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
    const Matrices matrices{*gate_up, *down, gate_up_sf, down_sf};
    add_parts(first, first.routed, second.routed, matrices, x, y, act.data<bf16>(), experts);
    used = tokens * topk * down->size(-1);
  }
  if (shared_gate_up) {
    DSV3_CHECK(shared_down && shared_gate_up->dim() == 2, "shared_gate_up (2 inner, hidden) needs shared_down");
    const Matrices matrices{*shared_gate_up, *shared_down, shared_gate_up_sf, shared_down_sf};
    add_parts(first, first.shared, second.shared, matrices, x, y, act.data<bf16>() + used, 1);
    used += tokens * shared_down->size(-1);
  }
  DSV3_CHECK(act.numel() == used, "act must have ", used, " elements, got ", act);
  if (tokens == 0) return;
  launch_few_experts<true>(first, stream);
  launch_few_experts<false>(second, stream);
}

}  // namespace dsv3
