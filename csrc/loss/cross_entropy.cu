// Cross-entropy of logits and, in place, its gradient:
//
//   loss_t = logsumexp_v x_tv - x_t,target;   x_tv <- exp(x_tv - logsumexp) - [v == target]
//
// Memory-bound: logits are read once and written once. A row of V3's vocabulary (129280 bf16, 253 KiB) is larger than
// the shared memory of a multiprocessor and as large as its registers, so a cluster of blocks holds it: every thread
// keeps up to kVecs 16-byte vectors in registers between the reductions and the write, and the blocks exchange one
// (maximum, sum) pair each through distributed shared memory, combined in the order of their ranks.
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/util.hpp>

#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kThreads = 512;
constexpr int kMaxCluster = 8;
constexpr int64_t kIgnored = -100;
constexpr float kLog2e = 1.4426950408889634f;

struct CrossEntropyParams {
  void* logits;            // [T, V]
  float* loss;             // [T]
  const int64_t* targets;  // [T]
  int vocab;
  bool write_gradient;
};

// Maximum and sum of exponentials (relative to the maximum) of a part of a row.
struct alignas(8) Partial {
  float max;
  float sum;
};

template <int kCluster>
__device__ __forceinline__ Partial combine_cluster(Partial mine, Partial* shared) {
  if constexpr (kCluster == 1) return mine;
  const int rank = static_cast<int>(cute::block_rank_in_cluster());
  // Each block stores its pair into slot `rank` of every block, so that the exit of a block can not race with a read.
  // The first wait is for the arrival at the top of the kernel: every block of the cluster is running.
  cute::cluster_wait();
  if (threadIdx.x < kCluster) {
    const uint32_t slot = cute::set_block_rank(cute::cast_smem_ptr_to_uint(shared + rank), threadIdx.x);
    asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(slot), "f"(mine.max), "f"(mine.sum) : "memory");
  }
  cute::cluster_arrive();
  cute::cluster_wait();
  Partial total = shared[0];
#pragma unroll
  for (int r = 1; r < kCluster; ++r) total.max = fmaxf(total.max, shared[r].max);
  total.sum = 0.f;
#pragma unroll
  for (int r = 0; r < kCluster; ++r) total.sum += shared[r].sum * exp2f((shared[r].max - total.max) * kLog2e);
  return total;
}

template <class T, int kCluster, int kVecs>
__global__ void __launch_bounds__(kThreads, 2) cross_entropy_kernel(CrossEntropyParams p) {
  constexpr int kSize = Vec<T>::kSize;
  __shared__ float scratch[2][kThreads / kWarpSize];
  __shared__ Partial partials[kCluster];
  if constexpr (kCluster > 1) cute::cluster_arrive_relaxed();
  wait_for_inputs();
  release_dependents();
  const int64_t t = blockIdx.x / kCluster;
  const int part = blockIdx.x % kCluster;
  const int vecs = p.vocab / kSize;
  T* const row = static_cast<T*>(p.logits) + t * p.vocab;
  const int64_t target = p.targets[t];
  const bool ignored = target == kIgnored, valid = target >= 0 && target < p.vocab;

  Vec<T> x[kVecs];
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = (i * kCluster + part) * kThreads + threadIdx.x;
    if (v < vecs) x[i] = load_streaming(row + v * kSize);
  }
  // Read before any block of the cluster can write: writes come after the exchange.
  const float target_logit = valid ? to_float(row[target]) : NAN;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if ((i * kCluster + part) * kThreads + threadIdx.x >= vecs) continue;
    float values[kSize];
    unpack(x[i], values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) max = fmaxf(max, values[j]);
  }
  max = block_reduce<Max, kThreads>(max, scratch[0]);
  const float offset = max == -INFINITY ? 0.f : max;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if ((i * kCluster + part) * kThreads + threadIdx.x >= vecs) continue;
    float values[kSize];
    unpack(x[i], values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) sum += exp2f((values[j] - offset) * kLog2e);
  }
  sum = block_reduce<Sum, kThreads>(sum, scratch[1]);
  const Partial total = combine_cluster<kCluster>({offset, sum}, partials);

  const float lse = total.max + logf(total.sum);
  if (part == 0 && threadIdx.x == 0) p.loss[t] = ignored ? 0.f : lse - target_logit;
  if (!p.write_gradient) return;
  // Ignored rows have a zero gradient; a target outside the vocabulary makes its row NaN, like its loss.
  const float one = valid ? 1.f : NAN;
  const int column = valid ? static_cast<int>(target) : -1;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = (i * kCluster + part) * kThreads + threadIdx.x;
    if (v >= vecs) continue;
    const int target_in_vector = column - v * kSize;
    float values[kSize];
    unpack(x[i], values);
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      const float probability = exp2f((values[j] - lse) * kLog2e);
      values[j] = ignored ? 0.f : probability * one - (j == target_in_vector ? 1.f : 0.f);
    }
    pack(values, x[i]);
    store_streaming(row + v * kSize, x[i]);
  }
}

template <class T>
void launch_cross_entropy(const CrossEntropyParams& p, int64_t tokens, cudaStream_t stream) {
  const int blocks = (p.vocab / Vec<T>::kSize + kThreads - 1) / kThreads;  // of one vector a thread
  const auto run = [&](auto kernel, int cluster) {
    launch("cross_entropy", kernel, {.grid = dim3(tokens * cluster), .block = dim3(kThreads), .cluster = cluster},
           stream, p);
  };
  if (blocks <= 1) return run(cross_entropy_kernel<T, 1, 1>, 1);
  if (blocks <= 4) return run(cross_entropy_kernel<T, 1, 4>, 1);
  if (blocks <= 8) return run(cross_entropy_kernel<T, 1, 8>, 1);
  if (blocks <= 16) return run(cross_entropy_kernel<T, 2, 8>, 2);
  if (blocks <= 32) return run(cross_entropy_kernel<T, 4, 8>, 4);
  return run(cross_entropy_kernel<T, kMaxCluster, 8>, kMaxCluster);
}

}  // namespace

void cross_entropy_(Tensor loss, Tensor logits, Tensor targets, bool write_gradient, cudaStream_t stream) {
  DSV3_CHECK(logits.dim() == 2, "logits must be (tokens, vocabulary), got ", logits);
  check_operand("logits", logits, logits.dtype());
  check_operand("loss", loss, Dtype::kFloat32, logits.size(0));
  check_operand("targets", targets, Dtype::kInt64, logits.size(0));
  const DeviceGuard guard(logits);
  visit_float("logits", logits.dtype(), [&](auto zero) {
    using T = decltype(zero);
    constexpr int64_t kSize = Vec<T>::kSize, kMaxVocab = kMaxCluster * 8 * kThreads * kSize;
    DSV3_CHECK(logits.size(1) % kSize == 0 && logits.size(1) <= kMaxVocab, "the vocabulary must be a multiple of ",
               kSize, " and at most ", kMaxVocab, ", got ", logits.size(1));
    launch_cross_entropy<T>({.logits = logits.data<T>(),
                             .loss = loss.data<float>(),
                             .targets = targets.data<int64_t>(),
                             .vocab = static_cast<int>(logits.size(1)),
                             .write_gradient = write_gradient},
                            logits.size(0), stream);
  });
}

}  // namespace dsv3
