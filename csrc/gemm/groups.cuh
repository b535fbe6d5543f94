// The kernel for groups of few rows and of many, whose numbers only the device knows: first the tiles of narrow.cuh, then,
// where a group has more rows than those take, the tiles of wide.cuh, in the same shared memory.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>

#include "narrow.cuh"
#include "wide.cuh"

namespace dsv3 {

template <class Few, class Many>
struct GroupsConfig {
  static_assert(Few::kLayout == Many::kLayout && Few::kCluster == Many::kCluster);
  static_assert(Few::kConsumerWarps == Many::kConsumerWarps);
  static constexpr int kCluster = Few::kCluster, kThreads = Many::kThreads;
  static constexpr size_t kSharedBytes = std::max(sizeof(NarrowShared<Few>), sizeof(WideShared<Many>));
};

// Whether a group has more than kTokens rows. By a whole warp. NOTE: behind a loop whose bound depends on the lane the
// compiler keeps nothing in uniform registers.
template <class Few>
__device__ __forceinline__ bool exceed(const NarrowParams& p) {
  bool more = false;
  for (int base = 0; base < p.groups && !more; base += kWarpSize) {
    const int g = base + static_cast<int>(threadIdx.x) % kWarpSize;
    int rows = 0;
    if (g < p.groups) {
      rows = __ldg(p.numbers + g);
      if constexpr (Few::kLayout == Layout::kRows) rows = __ldg(p.numbers + g + 1) - rows;
    }
    more = uniform(__any_sync(0xffffffffu, rows > Few::kTokens));
  }
  return more;
}

// Shared memory from one to the other, by all threads of the cluster.
template <class Few, class Many>
__device__ __forceinline__ void pass_on(NarrowShared<Few>& few, WideShared<Many>& many) {
  fence_shared_writes();  // what was written here may be written by TMA now
  __syncwarp();
  sync_cluster<Few::kCluster>();
  if (threadIdx.x == 0) {
    for (int i = 0; i < Few::kStages; ++i) {
      cutlass::arch::ClusterBarrier::invalidate(&few.ring.full[i]);
      cutlass::arch::ClusterBarrier::invalidate(&few.ring.empty[i]);
    }
    many.ring.init();
  }
  __syncwarp();
  sync_cluster<Few::kCluster>();
}

template <class Few, class Many>
__global__ void __launch_bounds__(GroupsConfig<Few, Many>::kThreads, 1)
    groups_kernel(const __grid_constant__ NarrowParams few, const __grid_constant__ WideParams many) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& few_shared = *reinterpret_cast<NarrowShared<Few>*>(raw);
  auto& many_shared = *reinterpret_cast<WideShared<Many>*>(raw);
  if (threadIdx.x == 0) few_shared.ring.init();
  sync_cluster<Few::kCluster>();
  wait_for_inputs();
  release_dependents();
  const uint32_t warp = uniform_warp();  // NOTE: else the compiler keeps little in uniform registers
  if (warp < kWarpgroupWarps) {
    cutlass::arch::warpgroup_reg_dealloc<Many::kProducerRegisters>();
    if (warp == 0) produce<Few, true>(few, few_shared);
    if (warp == 1) produce<Few, false>(few, few_shared);
    if (!exceed<Few>(few)) return;
    pass_on<Few, Many>(few_shared, many_shared);
    if (warp == 0) produce<Many>(many, many_shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Many::kConsumerRegisters>();
    const bool more = exceed<Few>(few);  // while the first stages are loaded
    consume<Few>(few, few_shared);
    if (!more) return;
    pass_on<Few, Many>(few_shared, many_shared);
    consume<Many>(many, many_shared);
  }
}

}  // namespace dsv3
