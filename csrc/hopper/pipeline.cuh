// A ring of shared-memory stages between a producer warp, which fills them by TMA, and consumer warps, in one block or
// in a cluster whose blocks fill each other's stages by multicast.
#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/arch/copy_sm90_desc.hpp>
#include <cute/arch/copy_sm90_tma.hpp>

#include "shared_memory.cuh"

namespace dsv3 {

// Named barriers, of which 0 is __syncthreads, between so many threads.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// mbarriers by their addresses in shared memory.
__device__ __forceinline__ void wait_barrier(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{ .reg .pred done; wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra wait; }" ::"r"(
          barrier),
      "r"(phase)
      : "memory");
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Which stage is next, and the parity of its use.
template <int kStages>
struct RingState {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// `full`: the stage's data has arrived (one arrival with the number of bytes, and kLoaders asynchronous ones). `empty`:
// every consumer warp of every block of the cluster is done with it, so that any of them may write it again.
template <int kStages, int kConsumerWarps, int kCluster, int kLoaders>
struct RingBarriers {
  uint64_t full[kStages];
  uint64_t empty[kStages];

  // By one thread; a cluster (or block) barrier must follow.
  __device__ __forceinline__ void init() {
    for (int i = 0; i < kStages; ++i) {
      cutlass::arch::ClusterBarrier::init(&full[i], 1 + kLoaders);
      cutlass::arch::ClusterBarrier::init(&empty[i], kConsumerWarps * kCluster);
    }
    cutlass::arch::fence_barrier_init();
  }
  // By the address of `full`, which the caller keeps in a register: the compiler makes a member's anew at every use.
  __device__ static __forceinline__ void wait_full(uint32_t full, const RingState<kStages>& at) {
    wait_barrier(full + at.stage * 8, at.phase);
  }
  __device__ __forceinline__ void wait_empty(const RingState<kStages>& at) {
    cutlass::arch::ClusterBarrier::wait(&empty[at.stage], at.phase ^ 1);
  }
  __device__ __forceinline__ void expect(int stage, uint32_t bytes) {
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&full[stage], bytes);
  }
  // Where this lane's arrivals go, for `release`: the address of `empty`, lane l's in block l of the cluster.
  __device__ __forceinline__ uint32_t empty_address() const {
    const uint32_t local = shared_pointer(empty);
    if constexpr (kCluster == 1) {
      return local;
    } else {
      uint32_t remote;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(threadIdx.x % kCluster));
      return remote;
    }
  }
  // By a whole warp: one arrival at each block of the cluster. NOTE: without .release.cluster, which makes memory
  // visible to the whole device (MEMBAR.ALL.GPU); what a stage held was only read, and by instructions that are done.
  __device__ static __forceinline__ void release(uint32_t empty_address, int stage) {
    if (threadIdx.x % 32 >= kCluster) return;
    if constexpr (kCluster == 1) {
      asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty_address + stage * 8) : "memory");
    } else {
      asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(empty_address + stage * 8) : "memory");
    }
  }
};

template <int kCluster>
__device__ __forceinline__ void sync_cluster() {
  if constexpr (kCluster > 1) {
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();
  } else {
    __syncthreads();
  }
}
template <int kCluster>
__device__ __forceinline__ uint32_t rank_in_cluster() {
  return kCluster > 1 ? cute::block_rank_in_cluster() : 0;
}

// A box of a two-dimensional tensor at (inner, outer) to shared memory; to every block of the cluster where `mask`
// says.
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap& map, uint64_t& full, int inner, int outer,
                                         cute::TMA::CacheHintSm90 hint = cute::TMA::CacheHintSm90::EVICT_NORMAL) {
  cute::SM90_TMA_LOAD_2D::copy(&map, &full, static_cast<uint64_t>(hint), shared, inner, outer);
}
__device__ __forceinline__ void tma_load_multicast(
    void* shared, const CUtensorMap& map, uint64_t& full, int inner, int outer, uint16_t mask,
    cute::TMA::CacheHintSm90 hint = cute::TMA::CacheHintSm90::EVICT_NORMAL) {
  cute::SM90_TMA_LOAD_MULTICAST_2D::copy(&map, &full, mask, static_cast<uint64_t>(hint), shared, inner, outer);
}

// `bytes` (a multiple of 16, perhaps none) of scales in a row.
__device__ __forceinline__ void load_scales(float* shared, const float* global, int bytes, uint64_t& full) {
  if (bytes > 0) cute::SM90_BULK_COPY_G2S::copy(global, &full, shared, bytes);
}

}  // namespace dsv3
