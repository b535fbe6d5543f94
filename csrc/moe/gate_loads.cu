// The gate (gate.cu) that also sums up, for every sequence of its tokens, what the sequence-wise balance loss is made of
// (V3 report, equations 17 to 20); and its backward.
//
//   chosen[q, i] = tokens of sequence q whose topk best s include expert i, without bias and groups: f_i = E chosen / (k T_q)
//   affinity[q, i] = the sum of p_i = s_i / sum_j s_j over its tokens: P_i = affinity / T_q
//   ds_i = (gradient of weights)_i + (daffinity[q, i] - sum_j daffinity[q, j] p_j) / sum_j s_j
//
// A warp has neighbouring tokens, as many as the number of all tokens says (so bits depend on nothing else), and adds its
// p in registers, a block its warps' in shared memory. What a block has of a sequence is rounded to a multiple of 2^-32
// and added in fp64, which is exact: atomics have no order. A block that a sequence ends in adds warp by warp, its counts
// one by one. Sums are zeroed by a kernel ahead, which lets this one begin at once: it waits for that one before its first
// atomic; of at most 128 tokens by the one cluster itself.
#include "../common/device_error.cuh"
#include "gate.cuh"

namespace dsv3 {
namespace {

constexpr int kMostBlocks = 264;  // two for each multiprocessor of an H100; the same everywhere, for the same bits
constexpr int kZeroThreads = 256;
constexpr int kMostTokens = 1 << 30;

struct LoadParams : GateParams {
  const int* cu_seqlens;    // [n + 1]
  int* chosen;              // [n, E]
  double* affinity;         // [n, E]
  const double* daffinity;  // backward: [n, E]
  int sequences, per_warp;  // n, tokens
  DeviceError* error;
};

template <int kPerLane>
struct LoadShared : GateShared<kPerLane> {
  int chosen[kPerLane * kWarpSize];
};

// The sequence of a token, n where it is behind the last: how many of cu_seqlens[1..n], which do not decrease, are at most
// its number. The warp looks at 32 of them at a time.
__device__ __forceinline__ int sequence_of(const LoadParams& p, int token, int lane) {
  int first = 0, left = p.sequences;
  while (left > 0) {
    const int step = ceil_div(left, kWarpSize), at = (lane + 1) * step;
    const bool ended = at <= left && __ldcg(p.cu_seqlens + first + at) <= token;
    const int skipped = step * __popc(__ballot_sync(kAll, ended));
    first += skipped;
    left = min(left - skipped, step - 1);
  }
  return first;
}

__device__ __forceinline__ int end_of(const LoadParams& p, int sequence) {
  return sequence < p.sequences ? __ldcg(p.cu_seqlens + sequence + 1) : static_cast<int>(p.tokens);
}

// Reports cu_seqlens that do not begin at 0, decrease, or end behind the tokens, and makes the affinities of such a sequence NaN.
// By one block, when its own sums have been added.
__device__ __forceinline__ void check_sequences(const LoadParams& p) {
#pragma unroll 1
  for (int i = threadIdx.x; i < p.sequences; i += blockDim.x) {
    const int begin = __ldcg(p.cu_seqlens + i), end = __ldcg(p.cu_seqlens + i + 1);
    if ((i > 0 || begin == 0) && end >= begin && end <= p.tokens) continue;
    report(p.error, DeviceErrorCode::kOffsets, i, begin, end, p.tokens);
    for (int e = 0; e < p.experts; ++e) atomicAdd(p.affinity + static_cast<int64_t>(i) * p.experts + e, NAN);
  }
}

// Zeros of all counts and sums, by threads first, first + step, ...
__device__ __forceinline__ void zero_sums(const LoadParams& p, int64_t first, int64_t step) {
#pragma unroll 1
  for (int64_t i = first; i < static_cast<int64_t>(p.sequences) * p.experts; i += step) {
    p.chosen[i] = 0;
    p.affinity[i] = 0.;
  }
#pragma unroll 1
  for (int64_t i = first; i < p.experts; i += step) p.counts[i] = 0;
}

__global__ void __launch_bounds__(kZeroThreads) zero_sums_kernel(LoadParams p) {
  wait_for_inputs();
  release_dependents();
  zero_sums(p, static_cast<int64_t>(blockIdx.x) * kZeroThreads + threadIdx.x,
            static_cast<int64_t>(gridDim.x) * kZeroThreads);
}

// x >= 0 as a multiple of 2^-32: sums of them below 2^21 are exact.
__device__ __forceinline__ double exact_part(float x) {
  constexpr double kUnit = 0x1p20;  // times 2^-52
  return (x + kUnit) - kUnit;
}

// Adds the warp's sums to those of a sequence, and begins new ones. `row` is the warp's place in shared memory.
template <int kPerLane>
__device__ __forceinline__ void add_affinity(const LoadParams& p, int sequence, int lane, float* row,
                                             float (&sum)[kPerLane]) {
  if (sequence == p.sequences) return;
  write_row(row, lane, sum);
  __syncwarp();
#pragma unroll 1
  for (int e = lane; e < p.experts; e += kWarpSize) {
    atomicAdd(p.affinity + static_cast<int64_t>(sequence) * p.experts + e, exact_part(row[e]));
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum[i] = 0.f;
}

// The same of a block that has tokens of one sequence alone, whose warps have written their sums, with its counts.
template <int kPerLane>
__device__ __forceinline__ void add_block(const LoadParams& p, int sequence, const LoadShared<kPerLane>& shared) {
  const int e = static_cast<int>(threadIdx.x);
  if (sequence == p.sequences || e >= p.experts) return;
  const int64_t at = static_cast<int64_t>(sequence) * p.experts + e;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shared.affinities[w][e];
  atomicAdd(p.affinity + at, exact_part(sum));
  if (shared.chosen[e] > 0) atomicAdd(p.chosen + at, shared.chosen[e]);
}

// Bit i: whether the lane's expert i is among the topk best s of the warp's token. As `choose`, but without their order, so
// that a lane sorts keys alone: its own are those above the least that it gave, and of that one's equals the first. No s is
// negative, so their bits are in order.
template <int kPerLane>
__device__ __forceinline__ unsigned best_experts(const LoadParams& p, int lane, const float (&s)[kPerLane]) {
  unsigned keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) keys[i] = kPerLane > 1 || lane < p.experts ? __float_as_uint(s[i]) + 1u : 0u;
#pragma unroll
  for (int round = 0; round < kPerLane; ++round) {
#pragma unroll
    for (int i = round % 2; i + 1 < kPerLane; i += 2) {
      const unsigned first = keys[i], second = keys[i + 1];
      keys[i] = max(first, second), keys[i + 1] = min(first, second);
    }
  }
  unsigned least = kAll, bits = 0;
  int given = 0;
#pragma unroll 1
  for (int j = 0; j < p.topk; ++j) {
    const unsigned most = __reduce_max_sync(kAll, keys[0]);
    if (lane == __ffs(__ballot_sync(kAll, keys[0] == most)) - 1) {
      least = most - 1u;
      ++given;
#pragma unroll
      for (int i = 0; i + 1 < kPerLane; ++i) keys[i] = keys[i + 1];
      keys[kPerLane - 1] = 0u;
    }
  }
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) given -= __float_as_uint(s[i]) > least;  // what is left are equals
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool equal = __float_as_uint(s[i]) == least && given > 0;
    given -= equal;
    bits |= (__float_as_uint(s[i]) > least || equal) << i;
  }
  return bits;
}

template <int kPerLane>
__global__ void __launch_bounds__(kWarps* kWarpSize, kBlocksASm) gate_loads_kernel(LoadParams p) {
  __shared__ LoadShared<kPerLane> shared;
  const auto cluster = cooperative_groups::this_cluster();
  const bool one_cluster = gridDim.x == cluster.num_blocks();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (threadIdx.x < p.experts) shared.counts[threadIdx.x] = shared.chosen[threadIdx.x] = 0;
  if (one_cluster) {
    wait_for_inputs();
    release_dependents();
  }
  const int tokens = static_cast<int>(p.tokens);
  const int block_first = static_cast<int>(blockIdx.x) * kWarps * p.per_warp;
  const int block_last = min(block_first + kWarps * p.per_warp, tokens);
  const int first = block_first + warp * p.per_warp, last = min(first + p.per_warp, tokens);
  alignas(16) float s[kPerLane], bias[kPerLane] = {}, sum[kPerLane] = {};
  float* const row = shared.affinities[warp];
  const bool same_choice = p.bias == nullptr && p.num_groups == 1;
  if (first < last) read_row<kPerLane, true>(p, p.logits + static_cast<int64_t>(first) * p.experts, lane, -INFINITY, s);
  if (p.bias) read_row<kPerLane, true>(p, p.bias, lane, 0.f, bias);
  if (one_cluster) zero_sums(p, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  int sequence = sequence_of(p, block_first, lane);
  if (one_cluster) cluster.barrier_arrive();
  __syncthreads();
  const auto wait_for_zeros = [&] {
    if (one_cluster) return cluster.barrier_wait();
    wait_for_inputs();
    release_dependents();
  };
  const bool together = block_last <= end_of(p, sequence);
  if (!together) {
    wait_for_zeros();
    sequence = sequence_of(p, first, lane);
  }
  int end = end_of(p, sequence);

  for (int token = first; token < last; ++token) {
    if (token >= end) {
      if (token > first) add_affinity(p, sequence, lane, row, sum);
      sequence = sequence_of(p, token, lane);
      end = end_of(p, sequence);
    }
    const auto count = [&](int expert) {
      if (together) {
        atomicAdd(shared.chosen + expert, 1);
      } else if (sequence < p.sequences) {
        atomicAdd(p.chosen + static_cast<int64_t>(sequence) * p.experts + expert, 1);
      }
    };
    affinities(p, s);
    write_row(row, lane, s);
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) total += s[i];
    const float inverse = 1.f / warp_reduce<Sum>(total);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) sum[i] += s[i] * inverse;
    if (!same_choice) {
      for (unsigned bits = best_experts(p, lane, s); bits > 0; bits &= bits - 1)
        count(lane * kPerLane + __ffs(bits) - 1);
    }
    unsigned keys[kPerLane];
    make_keys(p, lane, s, bias, keys);
    if (token + 1 < last)
      read_row<kPerLane, true>(p, p.logits + static_cast<int64_t>(token + 1) * p.experts, lane, -INFINITY, s);
    const int expert = route(p, token, lane, keys, row, shared.counts);
    if (same_choice && lane < p.topk) count(expert);
  }
  if (together) {
    wait_for_zeros();
    write_row(row, lane, sum);
  } else if (first < last) {
    add_affinity(p, sequence, lane, row, sum);
  }
  add_counts(p, shared);  // the block has met in it
  if (together) add_block(p, sequence, shared);
  if (blockIdx.x == 0) check_sequences(p);
}

// dlogits of a token from the gradients of its weights and of its sequence's affinities.
template <int kPerLane>
__global__ void __launch_bounds__(kBackwardWarps* kWarpSize) gate_loads_backward_kernel(LoadParams p) {
  __shared__ alignas(16) float rows[kBackwardWarps][kPerLane * kWarpSize];
  wait_for_inputs();
  release_dependents();
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kBackwardWarps + warp;
  if (token >= p.tokens) return;
  alignas(16) float s[kPerLane], ds[kPerLane] = {}, dp[kPerLane];
  read_row(p, p.logits + token * p.experts, lane, -INFINITY, s);
  const int sequence = sequence_of(p, static_cast<int>(token), lane);
  if (sequence < p.sequences) {  // through shared memory, for reads of whole lines
    const double* const row = p.daffinity + static_cast<int64_t>(sequence) * p.experts;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * kWarpSize + lane;
      if (kPerLane > 1 || e < p.experts) rows[warp][e] = static_cast<float>(row[e]);
    }
  }
  affinities(p, s);
  weights_gradient(p, token, lane, s, ds);
  if (sequence < p.sequences) {
    __syncwarp();
    read_row(p, rows[warp], lane, 0.f, dp);
    float total = 0.f, dot = 0.f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) total += s[i], dot += dp[i] * s[i];
    total = warp_reduce<Sum>(total);
    dot = warp_reduce<Sum>(dot) / total;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) ds[i] += (dp[i] - dot) / total;
  }
  write_dlogits(p, token, lane, s, ds);
}

// The parameters of both kernels: those of the gate, and the sequences.
LoadParams load_params(const GateParams& gate, const Tensor& affinity, const Tensor& cu_seqlens) {
  check_operand("cu_seqlens", cu_seqlens, Dtype::kInt32);
  DSV3_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, "cu_seqlens must be (sequences + 1), got ", cu_seqlens);
  DSV3_CHECK(gate.tokens <= kMostTokens, "there must be at most ", kMostTokens, " tokens, got ", gate.tokens);
  LoadParams p{gate};
  p.cu_seqlens = cu_seqlens.data<int>();
  p.sequences = static_cast<int>(cu_seqlens.size(0)) - 1;
  check_operand("affinity", affinity, Dtype::kInt64, p.sequences, p.experts);
  return p;
}

}  // namespace

void moe_gate_loads(Tensor index, Tensor weights, Tensor counts, Tensor chosen, Tensor affinity, Tensor logits,
                    std::optional<Tensor> bias, Tensor cu_seqlens, GateSettings settings, cudaStream_t stream) {
  LoadParams p = load_params(gate_params(index, weights, counts, logits, bias, settings), affinity, cu_seqlens);
  check_operand("chosen", chosen, Dtype::kInt32, p.sequences, p.experts);
  p.chosen = chosen.data<int>();
  p.affinity = affinity.data<double>();
  p.per_warp = static_cast<int>(ceil_div(p.tokens, int64_t{kMostBlocks} * kWarps));
  const DeviceGuard guard(logits);
  p.error = device_error();
  visit_per_lane(p.experts, [&](auto per_lane) {
    check_groups(p, per_lane());
    Launch shape = gate_shape(ceil_div(p.tokens, int64_t{kWarps} * std::max(p.per_warp, 1)));
    if (shape.cluster < shape.grid.x) {
      const int64_t sums = std::max(p.sequences, 1) * int64_t{p.experts};
      const int64_t blocks = std::min<int64_t>(ceil_div(sums, int64_t{kZeroThreads}), sm_count());
      launch("moe_gate_loads", zero_sums_kernel, {.grid = dim3(blocks), .block = dim3(kZeroThreads)}, stream, p);
    }
    launch("moe_gate_loads", gate_loads_kernel<per_lane()>, shape, stream, p);
  });
}

void moe_gate_loads_backward(Tensor dlogits, Tensor dweights, Tensor daffinity, Tensor logits, Tensor index,
                             Tensor cu_seqlens, double route_scale, bool softmax, bool normalize, cudaStream_t stream) {
  LoadParams p = load_params(gate_backward_params(dlogits, dweights, logits, index, route_scale, softmax, normalize),
                             daffinity, cu_seqlens);
  p.daffinity = daffinity.data<double>();
  const DeviceGuard guard(logits);
  visit_per_lane(p.experts, [&](auto per_lane) {
    launch("moe_gate_loads_backward", gate_loads_backward_kernel<per_lane()>, backward_shape(p.tokens), stream, p);
  });
}

}  // namespace dsv3
