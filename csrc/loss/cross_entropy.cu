// Cross-entropy of logits and, in place, its gradient:
//
//   loss_t = logsumexp_v x_tv - x_t,target;   x_tv <- exp(x_tv - logsumexp) - [v == target]
//
// Memory-bound: logits are read once and written once. A row of V3's vocabulary (129280 bf16, 253 KiB) is larger than
// the shared memory of a multiprocessor, so a cluster of up to 8 blocks holds it, a slice of at most 32 KiB (64 KiB in
// fp32) each. The kernel is persistent: while a row is worked on, the next slices arrive in a ring of three stages by
// bulk copies, and the gradient of the last row leaves by another; two blocks a multiprocessor hide each other's
// latencies. A thread keeps its part of the slice in registers between the two passes. There is one barrier a row:
// before it every warp sends its (maximum, sum of exponentials) to all blocks of the cluster; behind it each combines
// all of them in the same order.
#include <cute/arch/cluster_sm90.hpp>

#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "../hopper/bulk.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kStages = 3;
constexpr int kMaxCluster = 8;
constexpr int64_t kIgnored = -100;
constexpr float kLog2e = 1.4426950408889634f;

struct CrossEntropyParams {
  void* logits;            // [T, V]
  float* loss;             // [T]
  const int64_t* targets;  // [T]
  int64_t tokens;
  int vocab;
  int slice;  // values of a row that a block holds, a multiple of a vector; the last block's may be shorter
  bool write_gradient;
};

// Maximum and sum of exponentials relative to the maximum, of a part of a row.
struct alignas(8) Partial {
  float max;
  float sum;
};

// Integers in the order of the floats, so that the maximum of a warp is one instruction.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float warp_max(float x) {
  const int best = __reduce_max_sync(0xffffffffu, ordered(x));
  return __int_as_float(best ^ (best >> 31 & 0x7fffffff));
}
// exp(max - offset), 1 for an empty or infinite pair against itself.
__device__ __forceinline__ float rescale(float max, float offset) {
  return max == offset ? 1.f : fast_exp2((max - offset) * kLog2e);
}

// A thread's part of a slice: reads it from shared memory, leaves exp(x - maximum) in `exps`, and returns maximum and
// sum. One exponential a logit: the probabilities are these, scaled.
template <class T, int kVecs>
__device__ __forceinline__ Partial exponentials(const T* stage, int vecs, float (&exps)[kVecs][Vec<T>::kSize]) {
  constexpr int kSize = Vec<T>::kSize;
  float max = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    const int v = threadIdx.x + i * kThreads;
    if (v >= vecs) continue;
    unpack(load(stage + v * kSize), exps[i]);
#pragma unroll
    for (int j = 0; j < kSize; ++j) max = fmaxf(max, exps[i][j]);
  }
  const float offset = max == -INFINITY ? 0.f : max * kLog2e;
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    if (static_cast<int>(threadIdx.x) + i * kThreads >= vecs) continue;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      exps[i][j] = fast_exp2(exps[i][j] * kLog2e - offset);
      sum += exps[i][j];
    }
  }
  return {max, sum};
}

// Writes a pair into the shared memory of another block of the cluster and counts its 8 bytes on that block's barrier:
// data and signal in one, without the fence over all of memory that a cluster barrier brings.
__device__ __forceinline__ void send(Partial x, Partial* slot, TransactionBarrier* arrived, int block) {
  const uint32_t target = cute::set_block_rank(shared_pointer(slot), block);
  const uint32_t barrier = cute::set_block_rank(shared_pointer(arrived), block);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(target),
               "f"(x.max), "f"(x.sum), "r"(barrier)
               : "memory");
}

// The sum over the row: every warp gives its partial to every block of the cluster, then all combine all of them in
// order.
template <int kCluster>
__device__ __forceinline__ Partial exchange(Partial mine, Partial* slots, TransactionBarrier* arrived, int phase) {
  const int rank = kCluster > 1 ? static_cast<int>(cute::block_rank_in_cluster()) : 0;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const float warp_best = warp_max(mine.max);
  mine = {warp_best, warp_reduce<Sum>(mine.sum * rescale(mine.max, warp_best))};
  Partial* const slot = slots + rank * kWarps + warp;
  if constexpr (kCluster == 1) {
    if (lane == 0) *slot = mine;
    __syncthreads();
  } else {
    if (threadIdx.x == 0) arrived->arrive_and_expect_tx(kCluster * kWarps * sizeof(Partial));
    if (lane < kCluster) send(mine, slot, arrived, lane);
    arrived->wait(phase);
  }
  constexpr int kPerLane = (kCluster * kWarps + kWarpSize - 1) / kWarpSize;
  Partial parts[kPerLane];
  float max = -INFINITY, sum = 0.f;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    const int index = lane + i * kWarpSize;
    parts[i] = index < kCluster * kWarps ? slots[index] : Partial{-INFINITY, 0.f};
    max = fmaxf(max, parts[i].max);
  }
  max = warp_max(max);
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) sum += parts[i].sum * rescale(parts[i].max, max);
  return {max, warp_reduce<Sum>(sum)};
}

template <class T, int kCluster, int kVecs>
__global__ void __launch_bounds__(kThreads, kVecs* Vec<T>::kSize <= 32 ? 2 : 1)
    cross_entropy_kernel(CrossEntropyParams p) {
  constexpr int kSize = Vec<T>::kSize;
  extern __shared__ __align__(128) uint8_t ring[];
  __shared__ uint64_t barriers[kStages + 2];
  // Of even and odd rows: a warp sends its partial of the next row when it has read all of this one, so that two are
  // enough.
  __shared__ __align__(16) Partial slots[2][kCluster * kWarps];
  TransactionBarrier* const full = reinterpret_cast<TransactionBarrier*>(barriers);
  TransactionBarrier* const arrived = full + kStages;
  const int begin = static_cast<int>(blockIdx.x % kCluster) * p.slice;
  const int size = max(0, min(p.slice, p.vocab - begin)), vecs = size / kSize;
  const int64_t stride = gridDim.x / kCluster;
  T* const logits = static_cast<T*>(p.logits) + begin;
  const auto stage_of = [&](int stage) { return reinterpret_cast<T*>(ring) + stage * p.slice; };
  const auto request = [&](int64_t row, int stage) {
    if (row >= p.tokens || size == 0) return;
    const int bytes = size * static_cast<int>(sizeof(T));
    full[stage].arrive_and_expect_tx(bytes);
    bulk_load(stage_of(stage), logits + row * p.vocab, bytes, full[stage]);
  };
  const auto target_of = [&](int64_t row) { return row < p.tokens ? p.targets[row] : kIgnored; };

  if (threadIdx.x == 0) init_barriers(full, kStages + 2);
  if constexpr (kCluster > 1) {
    cute::cluster_arrive();  // also: every block of the cluster runs before one writes to its shared memory
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
  wait_for_inputs();
  release_dependents();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage + 1 < kStages; ++stage) request(blockIdx.x / kCluster + stage * stride, stage);
  }
  int stage_index = 0, phase = 0, parity = 0, exchange_phase = 0;
  int64_t row = blockIdx.x / kCluster;
  int64_t next_target = target_of(row);
  for (; row < p.tokens; row += stride) {
    const int64_t target = next_target;
    next_target = target_of(row + stride);
    const bool ignored = target == kIgnored, valid = target >= 0 && target < p.vocab;
    const int column = valid ? static_cast<int>(target) - begin : -1;  // in this block's slice, if in [0, size)
    T* const stage = stage_of(stage_index);
    if (size > 0) full[stage_index].wait(phase);
    // The thread that holds the target reports the loss; where there is none, the cluster's first.
    const bool holds = column >= 0 && column < size && column / kSize % kThreads == static_cast<int>(threadIdx.x);
    const float target_logit = holds ? to_float(stage[column]) : NAN;
    float exps[kVecs][kSize];
    const Partial mine = exponentials<T, kVecs>(stage, vecs, exps);
    const Partial total = exchange<kCluster>(mine, slots[parity], arrived + parity, exchange_phase);
    const float lse = total.max + logf(total.sum);
    if (holds || (!valid && begin == 0 && threadIdx.x == 0)) p.loss[row] = ignored ? 0.f : lse - target_logit;
    if (p.write_gradient) {
      // Ignored rows have a zero gradient; a target outside the vocabulary makes its row NaN, like its loss.
      const float scale = ignored ? 0.f : valid ? fast_exp2((mine.max - lse) * kLog2e) : NAN;
#pragma unroll
      for (int i = 0; i < kVecs; ++i) {
        const int v = threadIdx.x + i * kThreads;
        if (v >= vecs) continue;
#pragma unroll
        for (int j = 0; j < kSize; ++j) exps[i][j] = ignored ? 0.f : exps[i][j] * scale;
        Vec<T> gradient;
        pack(exps[i], gradient);
        store(stage + v * kSize, gradient);
      }
      if (holds) stage[column] = from_float<T>(fast_exp2((target_logit - lse) * kLog2e) - 1.f);
      fence_shared_writes();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      if (p.write_gradient && size > 0) {
        bulk_store(logits + row * p.vocab, stage, size * static_cast<int>(sizeof(T)));
        wait_bulk_stores_read<1>();  // the row before has left its stage, which is the next to fill
      }
      request(row + (kStages - 1) * stride, stage_index == 0 ? kStages - 1 : stage_index - 1);
    }
    if (++stage_index == kStages) stage_index = 0, phase ^= 1;
    parity ^= 1;
    if (parity == 0) exchange_phase ^= 1;
  }
  if (threadIdx.x == 0) wait_bulk_stores_read<0>();
}

template <class T, int kCluster, int kVecs>
void launch_persistent(const CrossEntropyParams& p, cudaStream_t stream) {
  const auto kernel = cross_entropy_kernel<T, kCluster, kVecs>;
  Launch shape{.block = dim3(kThreads), .smem = kStages * p.slice * sizeof(T), .cluster = kCluster};
  const int64_t clusters = std::min<int64_t>(p.tokens, some_clusters("cross_entropy", kernel, shape));
  shape.grid = dim3(clusters * kCluster);
  launch("cross_entropy", kernel, shape, stream, p);
}

template <class T>
void launch_cross_entropy(CrossEntropyParams p, cudaStream_t stream) {
  constexpr int kSize = Vec<T>::kSize;
  const int vecs = p.vocab / kSize, blocks = (vecs + kThreads - 1) / kThreads;  // of one vector a thread
  const auto run = [&](auto cluster, auto slice_vecs) {
    p.slice = (vecs + cluster() - 1) / cluster() * kSize;
    launch_persistent<T, cluster(), slice_vecs()>(p, stream);
  };
  using One = std::integral_constant<int, 1>;
  using Two = std::integral_constant<int, 2>;
  using Four = std::integral_constant<int, 4>;
  using Eight = std::integral_constant<int, 8>;
  if (blocks <= 1) return run(One{}, One{});
  if (blocks <= 4) return run(One{}, Four{});
  if (blocks <= 8) return run(Two{}, Four{});
  if (blocks <= 16) return run(Four{}, Four{});
  if (blocks <= 32) return run(Eight{}, Four{});
  return run(Eight{}, Eight{});
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
                             .tokens = logits.size(0),
                             .vocab = static_cast<int>(logits.size(1)),
                             .write_gradient = write_gradient},
                            stream);
  });
}

}  // namespace dsv3
