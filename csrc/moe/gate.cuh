// The gate's parts that moe_gate and moe_gate_loads share: affinities, group-limited choice of experts, weights and per-expert
// counts of a warp's token, and what goes back from the weights.
//
// One warp a token, a lane holds E/32 neighbouring experts, so that a group is a power-of-two run of lanes and the lowest
// lane of equals is the lowest expert. A choice is compared as an unsigned key whose order is that of the floats. A lane
// sorts its own; the best of a warp is then one redux instruction over the first of each.
#pragma once

#include <cooperative_groups.h>

#include <optional>
#include <tuple>

#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {

constexpr int kWarps = 16;   // of a block, which take a token each
constexpr int kCluster = 8;  // blocks at most
constexpr int kBackwardWarps = 4;
constexpr int kBlocksASm = 2;  // at most: more tokens go through in turns
constexpr unsigned kAll = 0xffffffffu;

struct GateParams {
  int64_t* index;       // [T, k]
  float* weights;       // [T, k]; backward: the incoming gradient
  int* counts;          // [E], zeros where the grid is more than a cluster
  float* dlogits;       // backward: [T, E]
  const float* logits;  // [T, E]
  const float* bias;    // [E] or null
  int64_t tokens;
  int experts, topk, num_groups, topk_groups;
  float route_scale;
  bool softmax, top2_sum, normalize;
};

// The row's values of the lane's experts, and `none` past the last expert, which only lanes of one have. kPastL1: of rows
// that are read before wait_for_inputs.
template <int kPerLane, bool kPastL1 = false>
__device__ __forceinline__ void read_row(const GateParams& p, const float* row, int lane, float none,
                                         float (&x)[kPerLane]) {
  const float* const mine = row + lane * kPerLane;
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      if constexpr (kPastL1) {
        reinterpret_cast<float4&>(x[i]) = __ldcg(reinterpret_cast<const float4*>(mine + i));
      } else {
        reinterpret_cast<Vec<float>&>(x[i]) = load(mine + i);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      x[i] = kPerLane == 1 && lane >= p.experts ? none : kPastL1 ? __ldcg(mine + i) : mine[i];
    }
  }
}

template <int kPerLane>
__device__ __forceinline__ void write_row(float* row, int lane, const float (&x)[kPerLane]) {
  if constexpr (kPerLane % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPerLane; i += 4) {
      store(row + lane * kPerLane + i, reinterpret_cast<const Vec<float>&>(x[i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) row[lane * kPerLane + i] = x[i];
  }
}

// 1 / x, rounded to nearest, for 1 <= x < 2^126: the division's own steps without its test for other numbers, which would
// keep the lane's divisions from going side by side.
__device__ __forceinline__ float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return fmaf(r, fmaf(-x, r, 1.f), r);
}

template <int kPerLane>
__device__ __forceinline__ void sigmoids(float (&s)[kPerLane]) {
  bool usual = true;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) usual = usual && s[i] > -87.f;
  if (usual) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = reciprocal(1.f + expf(-s[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = 1.f / (1.f + expf(-s[i]));
  }
}

// The affinities of the lane's experts from their logits; 0 past the last expert, whose logit is -inf.
template <int kPerLane>
__device__ __forceinline__ void affinities(const GateParams& p, float (&s)[kPerLane]) {
  if (!p.softmax) return sigmoids(s);
  float max = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) max = fmaxf(max, s[i]);
  max = warp_reduce<Max>(max);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += s[i] = expf(s[i] - max);
  sum = warp_reduce<Sum>(sum);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] /= sum;
}

// Those of a token.
template <int kPerLane>
__device__ __forceinline__ void affinities(const GateParams& p, int64_t token, int lane, float (&s)[kPerLane]) {
  read_row(p, p.logits + token * p.experts, lane, -INFINITY, s);
  affinities(p, s);
}

// Sorts the lane's keys, the largest first and equals as they were, and brings with them which each was.
template <int kPerLane>
__device__ __forceinline__ void sort_keys(unsigned (&keys)[kPerLane], int (&which)[kPerLane]) {
#pragma unroll
  for (int round = 0; round < kPerLane; ++round) {
#pragma unroll
    for (int i = round % 2; i + 1 < kPerLane; i += 2) {
      const unsigned first = keys[i], second = keys[i + 1];
      const int which_first = which[i], which_second = which[i + 1];
      const bool swap = first < second;
      keys[i] = max(first, second), keys[i + 1] = min(first, second);
      which[i] = swap ? which_second : which_first, which[i + 1] = swap ? which_first : which_second;
    }
  }
}

// Whether the lane's group is among the best topk_groups, from the lane's two best choices. The lanes of a group are
// neighbours.
__device__ __forceinline__ bool keep_group(const GateParams& p, int lane, int group_lanes, float first, float second) {
  for (int offset = group_lanes / 2; offset > 0; offset /= 2) {
    const float other_first = __shfl_xor_sync(kAll, first, offset),
                other_second = __shfl_xor_sync(kAll, second, offset);
    second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
    first = fmaxf(first, other_first);
  }
  const float score = p.top2_sum ? first + second : first;
  const int group = lane / group_lanes;
  int better = 0;
  for (int g = 0; g < p.num_groups; ++g) {
    const float other = __shfl_sync(kAll, score, g * group_lanes);
    better += other > score || (other == score && g < group);
  }
  return better < p.topk_groups;
}

// Lane j gets the j-th best expert of the warp's token. A key of 0 is never chosen.
template <int kPerLane>
__device__ __forceinline__ int choose(int topk, int lane, unsigned (&keys)[kPerLane], int (&which)[kPerLane]) {
  int mine = 0;
  for (int j = 0; j < topk; ++j) {
    const unsigned best = __reduce_max_sync(kAll, keys[0]);
    const int owner = __ffs(__ballot_sync(kAll, keys[0] == best)) - 1;
    const int expert = owner * kPerLane + __shfl_sync(kAll, which[0], owner);
    if (lane == j) mine = expert;
    if (lane == owner) {
#pragma unroll
      for (int i = 0; i + 1 < kPerLane; ++i) keys[i] = keys[i + 1], which[i] = which[i + 1];
      keys[kPerLane - 1] = 0u;
    }
  }
  return mine;
}

template <int kPerLane>
struct GateShared {
  int counts[kPerLane * kWarpSize];
  alignas(16) float affinities[kWarps][kPerLane * kWarpSize];
};

// The counts of all blocks. In a grid of one cluster each block takes a part of the experts.
template <int kPerLane>
__device__ __forceinline__ void add_counts(const GateParams& p, GateShared<kPerLane>& shared) {
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), thread = static_cast<int>(threadIdx.x);
  if (gridDim.x > blocks) {
    __syncthreads();
    if (thread < p.experts && shared.counts[thread] > 0) atomicAdd(p.counts + thread, shared.counts[thread]);
    return;
  }
  cluster.sync();
  const int e = thread * blocks + static_cast<int>(cluster.block_rank());
  if (e < p.experts) {
    int count = 0;
    for (int b = 0; b < blocks; ++b) count += *cluster.map_shared_rank(shared.counts + e, b);
    p.counts[e] = count;
  }
  cluster.sync();  // nothing is read here any more
}

// The lane's keys of a choice by s + bias.
template <int kPerLane>
__device__ __forceinline__ void make_keys(const GateParams& p, int lane, const float (&s)[kPerLane],
                                          const float (&bias)[kPerLane], unsigned (&keys)[kPerLane]) {
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = kPerLane > 1 || lane < p.experts ? key_of(s[i] + bias[i]) : 0u;
}

// Chooses the token's experts by the lanes' keys, writes them and their weights, counts them. `affinity` holds the token's
// affinities. Returns, in lane j, the j-th expert.
template <int kPerLane>
__device__ __forceinline__ int route(const GateParams& p, int64_t token, int lane, unsigned (&keys)[kPerLane],
                                     const float* affinity, int* counts) {
  int which[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) which[i] = i;
  sort_keys(keys, which);
  if (p.num_groups > 1) {
    const float second = kPerLane > 1 ? float_of(keys[kPerLane > 1]) : -INFINITY;
    const int group_lanes = p.experts / p.num_groups / kPerLane;
    if (!keep_group(p, lane, group_lanes, float_of(keys[0]), second)) keys[0] = 0u;  // and never those behind it
  }
  const int expert = choose(p.topk, lane, keys, which);
  __syncwarp();
  const float weight = lane < p.topk ? affinity[expert] : 0.f;
  const float total = p.normalize ? warp_reduce<Sum>(weight) + 1e-20f : 1.f;
  if (lane < p.topk) {
    p.index[token * p.topk + lane] = expert;
    p.weights[token * p.topk + lane] = weight / total * p.route_scale;
    atomicAdd(counts + expert, 1);
  }
  __syncwarp();  // before the next token's affinities
  return expert;
}

// The gradient ds of the lane's affinities from that of the token's weights; the choice is constant.
template <int kPerLane>
__device__ __forceinline__ void weights_gradient(const GateParams& p, int64_t token, int lane,
                                                 const float (&s)[kPerLane], float (&ds)[kPerLane]) {
  float total = 1e-20f, dot = 0.f;
  // Every lane goes through all k choices: it needs their sums, and finds its own experts among them.
  for (int j = 0; j < p.topk; ++j) {
    const int expert = static_cast<int>(p.index[token * p.topk + j]);
    const float gradient = p.weights[token * p.topk + j] * p.route_scale;
    float mine = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane * kPerLane + i == expert) mine = s[i], ds[i] = gradient;
    }
    const float picked = __shfl_sync(kAll, mine, expert / kPerLane);
    total += picked;
    dot += gradient * picked;
  }
  if (p.normalize) {
    for (int j = 0; j < p.topk; ++j) {
      const int expert = static_cast<int>(p.index[token * p.topk + j]);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (lane * kPerLane + i == expert) ds[i] = (ds[i] - dot / total) / total;
      }
    }
  }
}

// dlogits of the token from the gradient of its affinities.
template <int kPerLane>
__device__ __forceinline__ void write_dlogits(const GateParams& p, int64_t token, int lane, const float (&s)[kPerLane],
                                              const float (&ds)[kPerLane]) {
  alignas(16) float dlogits[kPerLane];
  float weighted = 0.f;
  if (p.softmax) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) weighted += ds[i] * s[i];
    weighted = warp_reduce<Sum>(weighted);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    dlogits[i] = p.softmax ? s[i] * (ds[i] - weighted) : ds[i] * s[i] * (1.f - s[i]);
  }
  if (kPerLane > 1 || lane < p.experts) write_row(p.dlogits + token * p.experts, lane, dlogits);
}

// ---- host ----
// Calls f with the number of experts a lane holds as a compile-time constant.
template <class F>
void visit_per_lane(int64_t experts, F&& f) {
  switch (experts < kWarpSize ? 1 : experts % kWarpSize == 0 ? experts / kWarpSize : 0) {
    case 1:
      return f(std::integral_constant<int, 1>{});
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 5:
      return f(std::integral_constant<int, 5>{});
    case 8:
      return f(std::integral_constant<int, 8>{});
    default:
      detail::fail("the number of experts must be at most 32, or 64, 128, 160 or 256, got ", experts);
  }
}

// Checks the tensors that both ops have; settings as in ops.h.
inline GateParams gate_params(const Tensor& index, const Tensor& weights, const Tensor& counts, const Tensor& logits,
                              const std::optional<Tensor>& bias, const GateSettings& settings) {
  const auto [num_groups, topk_groups, route_scale, softmax, top2_sum, normalize] = settings;
  DSV3_CHECK(logits.dim() == 2 && index.dim() == 2, "logits must be (tokens, experts) and index (tokens, topk), got ",
             logits, " and ", index);
  const int64_t tokens = logits.size(0), experts = logits.size(1), topk = index.size(1);
  check_operand("logits", logits, Dtype::kFloat32);
  check_operand("index", index, Dtype::kInt64, tokens, topk);
  check_operand("weights", weights, Dtype::kFloat32, tokens, topk);
  check_operand("counts", counts, Dtype::kInt32, experts);
  if (bias) check_operand("bias", *bias, Dtype::kFloat32, experts);
  DSV3_CHECK(topk >= 1 && topk <= kWarpSize && topk <= experts, "topk must be in 1..32 and at most the experts ",
             experts, ", got ", topk);
  return {.index = index.data<int64_t>(),
          .weights = weights.data<float>(),
          .counts = counts.data<int>(),
          .logits = logits.data<float>(),
          .bias = bias ? bias->data<float>() : nullptr,
          .tokens = tokens,
          .experts = static_cast<int>(experts),
          .topk = static_cast<int>(topk),
          .num_groups = static_cast<int>(num_groups),
          .topk_groups = static_cast<int>(topk_groups),
          .route_scale = static_cast<float>(route_scale),
          .softmax = softmax,
          .top2_sum = top2_sum,
          .normalize = normalize};
}

inline void check_groups(const GateParams& p, int per_lane) {
  const int lanes = p.num_groups > 0 ? p.experts / p.num_groups / per_lane : 0;
  DSV3_CHECK(p.num_groups == 1 || (lanes * per_lane * p.num_groups == p.experts && (lanes & (lanes - 1)) == 0),
             p.num_groups, " groups of ", p.experts, " experts are not a power of two of times ", per_lane,
             " experts each");
}

inline GateParams gate_backward_params(const Tensor& dlogits, const Tensor& dweights, const Tensor& logits,
                                       const Tensor& index, double route_scale, bool softmax, bool normalize) {
  DSV3_CHECK(logits.dim() == 2 && index.dim() == 2, "logits must be (tokens, experts) and index (tokens, topk), got ",
             logits, " and ", index);
  const int64_t tokens = logits.size(0), experts = logits.size(1), topk = index.size(1);
  check_operand("logits", logits, Dtype::kFloat32);
  check_operand("dlogits", dlogits, Dtype::kFloat32, tokens, experts);
  check_operand("index", index, Dtype::kInt64, tokens, topk);
  check_operand("dweights", dweights, Dtype::kFloat32, tokens, topk);
  return {.index = index.data<int64_t>(),
          .weights = dweights.data<float>(),
          .dlogits = dlogits.data<float>(),
          .logits = logits.data<float>(),
          .tokens = tokens,
          .experts = static_cast<int>(experts),
          .topk = static_cast<int>(topk),
          .route_scale = static_cast<float>(route_scale),
          .softmax = softmax,
          .normalize = normalize};
}

// The grid of so many blocks: one cluster where that is enough.
inline Launch gate_shape(int64_t blocks) {
  Launch shape{.grid = dim3(blocks), .block = dim3(kWarps * kWarpSize)};
  if (blocks > kCluster) return shape;
  while (shape.cluster < blocks) shape.cluster *= 2;
  shape.grid = dim3(shape.cluster);
  return shape;
}

inline Launch backward_shape(int64_t tokens) {
  return {.grid = dim3(ceil_div(tokens, int64_t{kBackwardWarps})), .block = dim3(kBackwardWarps * kWarpSize)};
}

}  // namespace dsv3
