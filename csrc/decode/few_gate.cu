// What stands between attention and experts, for few tokens, in one kernel: the residual added, the norm, the gate's logits and
// its choice.
//
//   sum = x + residual;  u = rmsnorm(sum) * norm_weight;  logits = u W^T in fp32;  then as moe/gate.cu has it
//
// Latency-bound: as four kernels it takes as long as reading an expert. A block a token; every block reads the gate's
// matrix [E, H] (128 KB of `mini`) from the L2 cache, the first 64 experts' first 1024 columns before the kernel ahead has ended
// where nobody writes them. A warp takes every sixteenth expert; one warp chooses.
#include "../common/launch.cuh"
#include "../common/rmsnorm.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

using bf16 = __nv_bfloat16;
constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;
constexpr int kMaxHidden = 8192, kMaxExperts = 256, kMaxGroups = 32;
constexpr int kRows = 4, kVectors = 4;  // experts of a warp at a time, vectors of 8 columns of a lane
constexpr unsigned kAll = 0xffffffffu;

struct FewGateParams {
  bf16 *sum, *u;   // [T, H]
  int64_t* index;  // [T, k]
  float* weights;  // [T, k]
  const bf16 *x, *residual, *norm_weight, *gate;
  const float* bias;  // [E] or null
  int hidden, experts, topk, num_groups, topk_groups;
  float eps, route_scale;
  bool softmax, top2_sum, normalize, static_weights;
};

struct FewGateShared {
  alignas(16) float u[kMaxHidden];
  float logits[kMaxExperts], choices[kMaxExperts], bias[kMaxExperts];
  float scratch[kWarps];
};

// The lane's vectors of kRows of the warp's experts.
struct GateTile {
  uint4 values[kRows][kVectors];
  __device__ __forceinline__ void load(const FewGateParams& p, int first_expert, int first_column) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int expert = first_expert + r * kWarps + threadIdx.x / kWarpSize;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int column = first_column + (v * kWarpSize + threadIdx.x % kWarpSize) * 8;
        const bool there = expert < p.experts && column < p.hidden;
        values[r][v] = there
                           ? *reinterpret_cast<const uint4*>(p.gate + static_cast<int64_t>(expert) * p.hidden + column)
                           : uint4{};
      }
    }
  }
  __device__ __forceinline__ void multiply(float (&dots)[kRows], const float* u, int first_column, int hidden) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int column = first_column + (v * kWarpSize + threadIdx.x % kWarpSize) * 8;
      if (column >= hidden) break;
      const float4 low = *reinterpret_cast<const float4*>(u + column);
      const float4 high = *reinterpret_cast<const float4*>(u + column + 4);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float w[8];
        unpack(reinterpret_cast<const Vec<bf16>&>(values[r][v]), w);
        dots[r] += w[0] * low.x + w[1] * low.y + w[2] * low.z + w[3] * low.w + w[4] * high.x + w[5] * high.y +
                   w[6] * high.z + w[7] * high.w;
      }
    }
  }
};

__device__ __forceinline__ void keep(float* u, const float (&values)[8]) {
  *reinterpret_cast<float4*>(u) = float4{values[0], values[1], values[2], values[3]};
  *reinterpret_cast<float4*>(u + 4) = float4{values[4], values[5], values[6], values[7]};
}

// sum and u of the block's token, written and, u, kept. `factors`: the norm's weight in the thread's first columns.
__device__ __forceinline__ void add_and_normalize(const FewGateParams& p, FewGateShared& shared, Vec<bf16> factors) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.hidden;
  float squares = 0.f;
  for (int column = threadIdx.x * 8; column < p.hidden; column += kThreads * 8) {
    float a[8], b[8];
    unpack(load(p.x + row + column), a);
    unpack(load(p.residual + row + column), b);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] += b[i];
    Vec<bf16> rounded;
    pack(a, rounded);
    store(p.sum + row + column, rounded);
    unpack(rounded, a);
    squares = add_squares(a, squares);
    keep(shared.u + column, a);
  }
  const float rstd = rsqrtf(block_reduce<Sum, kThreads>(squares, shared.scratch) / p.hidden + p.eps);
  for (int column = threadIdx.x * 8; column < p.hidden; column += kThreads * 8) {
    float w[8], a[8];
    unpack(column == threadIdx.x * 8 ? factors : load(p.norm_weight + column), w);
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = shared.u[column + i];
    normalise(a, rstd, w);
    Vec<bf16> rounded;
    pack(a, rounded);
    store(p.u + row + column, rounded);
    unpack(rounded, a);
    keep(shared.u + column, a);
  }
  __syncthreads();
}

// The affinities of the lane's experts, per_lane neighbours, at most kPerLane; 0 past the last expert.
template <int kPerLane>
__device__ __forceinline__ void affinities(const FewGateParams& p, const float* logits, int first, int per_lane,
                                           float (&s)[kPerLane]) {
  float most = -INFINITY, total = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    s[i] = i < per_lane && first + i < p.experts ? logits[first + i] : -INFINITY;
    most = fmaxf(most, s[i]);
  }
  if (!p.softmax) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) s[i] = 1.f / (1.f + expf(-s[i]));
    return;
  }
  most = warp_reduce<Max>(most);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) total += s[i] = expf(s[i] - most);
  total = warp_reduce<Sum>(total);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) s[i] /= total;
}

// Which groups stay, a bit each; lane g sums up group g.
__device__ __forceinline__ unsigned kept_groups(const FewGateParams& p, const float* choices) {
  const int lane = threadIdx.x % kWarpSize, size = p.experts / p.num_groups;
  float first = -INFINITY, second = -INFINITY;
  for (int i = 0; lane < p.num_groups && i < size; ++i) {
    const float choice = choices[lane * size + i];
    second = fmaxf(second, fminf(first, choice));
    first = fmaxf(first, choice);
  }
  const float score = p.top2_sum ? first + second : first;
  int better = 0;
  for (int g = 0; g < p.num_groups; ++g) {
    const float other = __shfl_sync(kAll, score, g);
    better += other > score || (other == score && g < lane);
  }
  return __ballot_sync(kAll, lane < p.num_groups && better < p.topk_groups);
}

// The choice of one warp: the best topk of the groups that stay, ties to the lowest expert.
template <int kPerLane>
__device__ __forceinline__ void choose(const FewGateParams& p, FewGateShared& shared) {
  const int lane = threadIdx.x % kWarpSize, per_lane = ceil_div(p.experts, kWarpSize), first = lane * per_lane;
  float s[kPerLane], choice[kPerLane];
  affinities(p, shared.logits, first, per_lane, s);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool there = i < per_lane && first + i < p.experts;
    choice[i] = there ? s[i] + shared.bias[first + i] : -INFINITY;
    if (there) shared.choices[first + i] = choice[i];
  }
  __syncwarp();
  const unsigned kept = p.num_groups == 1 ? 1u : kept_groups(p, shared.choices);
  unsigned keys[kPerLane];
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const bool there = i < per_lane && first + i < p.experts;
    const int group = there ? (first + i) / (p.experts / p.num_groups) : 0;
    keys[i] = there && (kept >> group & 1) ? key_of(choice[i]) : 0u;
  }
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
      if (i < per_lane && keys[i] == winner) expert = first + i, weight = s[i];
    }
    expert = __shfl_sync(kAll, expert, owner);
    weight = __shfl_sync(kAll, weight, owner);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (first + i == expert && i < per_lane) keys[i] = 0u;
    }
    if (lane == j) my_expert = expert, my_weight = weight;
    total += weight;
  }
  if (lane >= p.topk) return;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * p.topk + lane;
  p.index[at] = my_expert;
  p.weights[at] = (p.normalize ? my_weight / (total + 1e-20f) : my_weight) * p.route_scale;
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads) few_gate_kernel(FewGateParams p) {
  __shared__ FewGateShared shared;
  constexpr int kColumns = kVectors * kWarpSize * 8, kExperts = kRows * kWarps;
  GateTile tile;
  Vec<bf16> factors{};
  const auto load_weights = [&] {
    tile.load(p, 0, 0);
    if (threadIdx.x * 8 < p.hidden) factors = load(p.norm_weight + threadIdx.x * 8);
    if (threadIdx.x < p.experts) shared.bias[threadIdx.x] = p.bias ? p.bias[threadIdx.x] : 0.f;
  };
  if (p.static_weights) load_weights();
  wait_for_inputs();
  release_dependents();
  if (!p.static_weights) load_weights();
  add_and_normalize(p, shared, factors);
  for (int expert = 0; expert < p.experts; expert += kExperts) {
    float dots[kRows] = {};
    for (int column = 0; column < p.hidden; column += kColumns) {
      if (expert > 0 || column > 0) tile.load(p, expert, column);
      tile.multiply(dots, shared.u, column, p.hidden);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float logit = warp_reduce<Sum>(dots[r]);
      const int at = expert + r * kWarps + threadIdx.x / kWarpSize;
      if (threadIdx.x % kWarpSize == 0 && at < p.experts) shared.logits[at] = logit;
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) choose<kPerLane>(p, shared);
}

}  // namespace

void few_gate(Tensor sum, Tensor u, Tensor index, Tensor weights, Tensor x, Tensor residual, Tensor norm_weight,
              Tensor gate, std::optional<Tensor> bias, FewGateSettings settings, cudaStream_t stream) {
  check_operand("x", x, Dtype::kBFloat16);
  DSV3_CHECK(x.dim() == 2 && gate.dim() == 2, "x must be (tokens, hidden) and gate (experts, hidden), got ", x, " and ",
             gate);
  const int64_t tokens = x.size(0), hidden = x.size(1), experts = gate.size(0), topk = index.size(1);
  check_operand("residual", residual, Dtype::kBFloat16, tokens, hidden);
  check_operand("sum", sum, Dtype::kBFloat16, tokens, hidden);
  check_operand("u", u, Dtype::kBFloat16, tokens, hidden);
  check_operand("norm_weight", norm_weight, Dtype::kBFloat16, hidden);
  check_operand("gate", gate, Dtype::kBFloat16, experts, hidden);
  check_operand("index", index, Dtype::kInt64, tokens, topk);
  check_operand("weights", weights, Dtype::kFloat32, tokens, topk);
  if (bias) check_operand("bias", *bias, Dtype::kFloat32, experts);
  DSV3_CHECK(hidden % 8 == 0 && hidden <= kMaxHidden && experts >= 1 && experts <= kMaxExperts,
             "hidden must be a multiple "
             "of 8 up to ",
             kMaxHidden, " and experts at most ", kMaxExperts, ", got ", gate);
  const auto& [eps, num_groups, topk_groups, route_scale, softmax, top2_sum, normalize, static_weights] = settings;
  DSV3_CHECK(num_groups >= 1 && num_groups <= kMaxGroups && experts % num_groups == 0 && topk >= 1 &&
                 topk <= kWarpSize && topk <= topk_groups * (experts / num_groups),
             "expected topk of at most ", kWarpSize, " and ", kMaxGroups, " groups that divide the experts, got topk ",
             topk, ", ", num_groups, " groups of ", experts, " experts");
  const DeviceGuard guard(x);
  const FewGateParams p{.sum = sum.data<bf16>(),
                        .u = u.data<bf16>(),
                        .index = index.data<int64_t>(),
                        .weights = weights.data<float>(),
                        .x = x.data<bf16>(),
                        .residual = residual.data<bf16>(),
                        .norm_weight = norm_weight.data<bf16>(),
                        .gate = gate.data<bf16>(),
                        .bias = bias ? bias->data<float>() : nullptr,
                        .hidden = static_cast<int>(hidden),
                        .experts = static_cast<int>(experts),
                        .topk = static_cast<int>(topk),
                        .num_groups = static_cast<int>(num_groups),
                        .topk_groups = static_cast<int>(topk_groups),
                        .eps = static_cast<float>(eps),
                        .route_scale = static_cast<float>(route_scale),
                        .softmax = softmax,
                        .top2_sum = top2_sum,
                        .normalize = normalize,
                        .static_weights = static_weights};
  const auto kernel = experts <= 2 * kWarpSize ? few_gate_kernel<2> : few_gate_kernel<kMaxExperts / kWarpSize>;
  launch("few_gate", kernel, {.grid = dim3(tokens), .block = dim3(kThreads)}, stream, p);
}

}  // namespace dsv3
