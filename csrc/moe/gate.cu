// The gate: affinities, group-limited choice of experts, weights and per-expert counts in one kernel; and its backward.
//
//   s = sigmoid(logits) or softmax(logits);  choice = s + bias;  a group's score is the sum of its two best choices, or
//   the best one;  the topk_groups best groups stay;  topk_idx = the topk best choices in them; weights = s[topk_idx]
//   (/ their sum) * route_scale
//
// Latency-bound (1 KiB a token at 256 experts). One warp a token, a lane holds E/32 neighbouring experts, so that a
// group is a power-of-two run of lanes and the lowest lane of equals is the lowest expert. A choice is compared as an
// unsigned key whose order is that of the floats; the best of a warp is one redux instruction. Counts are integers:
// their atomics have no order.
#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kWarps = 4;  // tokens a block
constexpr unsigned kAll = 0xffffffffu;

struct GateParams {
  int64_t* index;       // [T, k]
  float* weights;       // [T, k]; backward: the incoming gradient
  int* counts;          // [E], zeroed by the caller
  float* dlogits;       // backward: [T, E]
  const float* logits;  // [T, E]
  const float* bias;    // [E] or null
  int64_t tokens;
  int experts, topk, num_groups, topk_groups;
  float route_scale;
  bool softmax, top2_sum, normalize;
};

// Unsigned integers in the order of the floats; 0 is below every float.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The affinities of the lane's experts; 0 past the last expert.
template <int kPerLane>
__device__ __forceinline__ void affinities(const GateParams& p, int64_t token, int lane, float (&s)[kPerLane]) {
  const float* const row = p.logits + token * p.experts;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane * kPerLane + i;
    s[i] = e < p.experts ? row[e] : -INFINITY;
  }
  if (!p.softmax) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = 1.f / (1.f + expf(-s[i]));
    return;
  }
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

// Whether the lane's group is among the best topk_groups. The lanes of a group are neighbours.
template <int kPerLane>
__device__ __forceinline__ bool keep_group(const GateParams& p, int lane, const float (&choice)[kPerLane]) {
  const int group_lanes = p.experts / p.num_groups / kPerLane;
  float first = -INFINITY, second = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    second = fmaxf(second, fminf(first, choice[i]));
    first = fmaxf(first, choice[i]);
  }
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

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize) gate_kernel(GateParams p) {
  extern __shared__ int histogram[];  // [E]
  wait_for_inputs();
  release_dependents();
  for (int e = threadIdx.x; e < p.experts; e += kWarps * kWarpSize) histogram[e] = 0;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; token < p.tokens;
       token += static_cast<int64_t>(gridDim.x) * kWarps) {
    float s[kPerLane], choice[kPerLane];
    unsigned keys[kPerLane];
    affinities<kPerLane>(p, token, lane, s);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = lane * kPerLane + i;
      choice[i] = e < p.experts ? s[i] + (p.bias ? p.bias[e] : 0.f) : -INFINITY;
    }
    const bool keep = p.num_groups == 1 || keep_group<kPerLane>(p, lane, choice);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) keys[i] = keep && lane * kPerLane + i < p.experts ? key_of(choice[i]) : 0u;

    int my_expert = 0;  // lane j keeps the j-th choice
    float my_weight = 0.f, total = 0.f;
    for (int j = 0; j < p.topk; ++j) {
      unsigned best = 0u;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) best = max(best, keys[i]);
      const unsigned winner = __reduce_max_sync(kAll, best);
      const int owner = __ffs(__ballot_sync(kAll, best == winner)) - 1;
      int expert = 0;
      float weight = 0.f;
#pragma unroll
      for (int i = kPerLane - 1; i >= 0; --i) {
        if (keys[i] == winner) expert = lane * kPerLane + i, weight = s[i];
      }
      expert = __shfl_sync(kAll, expert, owner);
      weight = __shfl_sync(kAll, weight, owner);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if (lane * kPerLane + i == expert) keys[i] = 0u;
      }
      if (lane == j) my_expert = expert, my_weight = weight;
      total += weight;
    }
    if (lane < p.topk) {
      p.index[token * p.topk + lane] = my_expert;
      p.weights[token * p.topk + lane] = (p.normalize ? my_weight / (total + 1e-20f) : my_weight) * p.route_scale;
      atomicAdd(histogram + my_expert, 1);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kWarps * kWarpSize) {
    if (histogram[e] > 0) atomicAdd(p.counts + e, histogram[e]);
  }
}

// dlogits of a token from the gradient of its weights; the choice is constant.
template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize) gate_backward_kernel(GateParams p) {
  wait_for_inputs();
  release_dependents();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (token >= p.tokens) return;
  float s[kPerLane], ds[kPerLane] = {};
  affinities<kPerLane>(p, token, lane, s);
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
  float weighted = 0.f;
  if (p.softmax) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) weighted += ds[i] * s[i];
    weighted = warp_reduce<Sum>(weighted);
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane * kPerLane + i;
    if (e < p.experts)
      p.dlogits[token * p.experts + e] = p.softmax ? s[i] * (ds[i] - weighted) : ds[i] * s[i] * (1.f - s[i]);
  }
}

// Calls f with the number of experts a lane holds as a compile-time constant.
template <class F>
void visit_per_lane(int64_t experts, F&& f) {
  switch ((experts + kWarpSize - 1) / kWarpSize) {
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

}  // namespace

void moe_gate(Tensor index, Tensor weights, Tensor counts, Tensor logits, std::optional<Tensor> bias,
              int64_t num_groups, int64_t topk_groups, double route_scale, bool softmax, bool top2_sum, bool normalize,
              cudaStream_t stream) {
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
  const DeviceGuard guard(logits);
  visit_per_lane(experts, [&](auto per_lane) {
    constexpr int kPerLane = per_lane();
    const int64_t lanes = num_groups > 0 ? experts / num_groups / kPerLane : 0;
    DSV3_CHECK(num_groups == 1 || (lanes * kPerLane * num_groups == experts && (lanes & (lanes - 1)) == 0), num_groups,
               " groups of ", experts, " experts are not a power of two of times ", kPerLane, " experts each");
    const GateParams p{.index = index.data<int64_t>(),
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
    const int64_t blocks = std::min<int64_t>((tokens + kWarps - 1) / kWarps, 8 * sm_count());
    launch("moe_gate", gate_kernel<kPerLane>,
           {.grid = dim3(blocks), .block = dim3(kWarps * kWarpSize), .smem = experts * sizeof(int)}, stream, p);
  });
}

void moe_gate_backward(Tensor dlogits, Tensor dweights, Tensor logits, Tensor index, double route_scale, bool softmax,
                       bool normalize, cudaStream_t stream) {
  DSV3_CHECK(logits.dim() == 2 && index.dim() == 2, "logits must be (tokens, experts) and index (tokens, topk), got ",
             logits, " and ", index);
  const int64_t tokens = logits.size(0), experts = logits.size(1), topk = index.size(1);
  check_operand("logits", logits, Dtype::kFloat32);
  check_operand("dlogits", dlogits, Dtype::kFloat32, tokens, experts);
  check_operand("index", index, Dtype::kInt64, tokens, topk);
  check_operand("dweights", dweights, Dtype::kFloat32, tokens, topk);
  const DeviceGuard guard(logits);
  visit_per_lane(experts, [&](auto per_lane) {
    const GateParams p{.index = index.data<int64_t>(),
                       .weights = dweights.data<float>(),
                       .dlogits = dlogits.data<float>(),
                       .logits = logits.data<float>(),
                       .tokens = tokens,
                       .experts = static_cast<int>(experts),
                       .topk = static_cast<int>(topk),
                       .route_scale = static_cast<float>(route_scale),
                       .softmax = softmax,
                       .normalize = normalize};
    launch("moe_gate_backward", gate_backward_kernel<per_lane()>,
           {.grid = dim3((tokens + kWarps - 1) / kWarps), .block = dim3(kWarps * kWarpSize)}, stream, p);
  });
}

}  // namespace dsv3
