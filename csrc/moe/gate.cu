// The gate: affinities, group-limited choice of experts, weights and per-expert counts in one kernel; and its backward.
//
//   s = sigmoid(logits) or softmax(logits);  choice = s + bias;  a group's score is the sum of its two best choices, or
//   the best one;  the topk_groups best groups stay;  topk_idx = the topk best choices in them; weights = s[topk_idx]
//   (/ their sum) * route_scale
//
// Latency-bound (1 KiB a token at 256 experts). Counts are integers, so their atomics have no order; where one cluster is
// enough, it adds its blocks' counts up by itself, and they need not be zeroed by a kernel before this one. (With many
// clusters that gains nothing: 12.6 us for 4096 tokens instead of 9.4.)
#include "gate.cuh"

namespace dsv3 {
namespace {

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize) gate_kernel(GateParams p) {
  static_assert(kPerLane * kWarpSize <= kWarps * kWarpSize, "a thread has the counts of one expert");
  __shared__ GateShared<kPerLane> shared;
  if (threadIdx.x < p.experts) shared.counts[threadIdx.x] = 0;
  wait_for_inputs();
  release_dependents();
  __syncthreads();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  float* const affinity = shared.affinities[warp];
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + warp; token < p.tokens;
       token += static_cast<int64_t>(gridDim.x) * kWarps) {
    alignas(16) float s[kPerLane], bias[kPerLane] = {};
    unsigned keys[kPerLane];
    if (p.bias) read_row(p, p.bias, lane, 0.f, bias);
    affinities<kPerLane>(p, token, lane, s);
    make_keys(p, lane, s, bias, keys);
    write_row(affinity, lane, s);
    route(p, token, lane, keys, affinity, shared.counts);
  }
  add_counts(p, shared);
}

template <int kPerLane>
__global__ void __launch_bounds__(kBackwardWarps* kWarpSize) gate_backward_kernel(GateParams p) {
  wait_for_inputs();
  release_dependents();
  const int lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kBackwardWarps + threadIdx.x / kWarpSize;
  if (token >= p.tokens) return;
  alignas(16) float s[kPerLane], ds[kPerLane] = {};
  affinities<kPerLane>(p, token, lane, s);
  weights_gradient(p, token, lane, s, ds);
  write_dlogits(p, token, lane, s, ds);
}

}  // namespace

void moe_gate(Tensor index, Tensor weights, Tensor counts, Tensor logits, std::optional<Tensor> bias,
              GateSettings settings, cudaStream_t stream) {
  const GateParams p = gate_params(index, weights, counts, logits, bias, settings);
  const DeviceGuard guard(logits);
  visit_per_lane(p.experts, [&](auto per_lane) {
    check_groups(p, per_lane());
    const int64_t needed = ceil_div(p.tokens, int64_t{kWarps});
    const Launch shape = gate_shape(std::min<int64_t>(needed, std::max(kCluster, kBlocksASm * sm_count())));
    if (shape.cluster < shape.grid.x) {
      check_cuda(cudaMemsetAsync(p.counts, 0, p.experts * sizeof(int), stream), "cudaMemsetAsync");
    }
    launch("moe_gate", gate_kernel<per_lane()>, shape, stream, p);
  });
}

void moe_gate_backward(Tensor dlogits, Tensor dweights, Tensor logits, Tensor index, double route_scale, bool softmax,
                       bool normalize, cudaStream_t stream) {
  const GateParams p = gate_backward_params(dlogits, dweights, logits, index, route_scale, softmax, normalize);
  const DeviceGuard guard(logits);
  visit_per_lane(p.experts, [&](auto per_lane) {
    launch("moe_gate_backward", gate_backward_kernel<per_lane()>, backward_shape(p.tokens), stream, p);
  });
}

}  // namespace dsv3
