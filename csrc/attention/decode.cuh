// The kernel of mla_decode for a bf16 cache: absorbed attention of a piece of a sequence (schedule.cuh) by a cluster of blocks, of which
// each has 64 rows (a step and a head each) and all share the keys, which arrive once for the cluster by multicast.
//
// A block keeps its queries and two tiles of keys, and no values: those are the keys' first 512 columns. Two warpgroups
// keep half of the output's columns each, in registers, and take turns with the scores: one has the even tiles, the other
// the odd ones, so that while one makes probabilities of its scores the tensor cores have the other's products. Each
// hands its probabilities to the other through shared memory.
//
//   even:  K0  soft 0        P0 V0 left            P1 V1 left    K2 ...
//   odd:       K1     P0 V0 right   soft 1  P1 V1 right              K3 ...
//
#pragma once

#include <cuda_bf16.h>
#include <cutlass/arch/reg_reconfig.h>

#include "../common/device_error.cuh"
#include "../common/vector.cuh"
#include "../hopper/pipeline.cuh"
#include "mma.cuh"
#include "schedule.cuh"
#include "warpgroup.cuh"

namespace dsv3 {

constexpr int kLatent = 512, kKeyColumns = 576, kSubs = kKeyColumns / kSubColumns, kValueSubs = kLatent / kSubColumns;
constexpr int kHalfColumns = kLatent / 2;

template <int kCluster_>
struct DecodeConfig {
  static constexpr int kCluster = kCluster_;  // blocks
  static constexpr int kThreads = 3 * kWarpgroup;
  // Of 504 a thread of each warpgroup.
  static constexpr int kConsumerRegisters = 232, kLoaderRegisters = 40;
};

struct DecodeParams {
  CUtensorMap queries, keys;  // [batch * steps * heads, 576], [pages * page, 576], of a bf16 cache
  CUtensorMap key_subs;       // the keys again, several sub-blocks at once, where a tile's are rows of one page
  const __nv_bfloat16* q;     // the same queries
  const uint8_t* cache;       // where it is FP8
  const int* block_table;     // [batch, table_width], rows table_stride apart
  const int* seq_lens;        // [batch]
  DecodeSchedule schedule;
  __nv_bfloat16* out;  // [batch * steps * heads, 512]
  float* lse;          // [batch, heads, steps]
  float* partial;      // [partials, rows of a cluster, 512]
  float* partial_lse;  // [partials, rows of a cluster], to base 2
  DeviceError* error;
  int64_t table_stride;
  int table_width, pages, page, partials;
  int rows, heads, steps;  // rows = steps * heads, of a sequence
  float scale_log2;
  bool causal;
};

// A tile arrives in two halves, each with a barrier: the columns that one warpgroup uses as values and, beside those of the
// warpgroup that does not make its scores, the rotated ones. These are not needed once there are scores; the
// probabilities then take their place, on their way to that warpgroup.
struct DecodeShared {
  alignas(1024) uint8_t queries[kSubs][kSubBytes];
  alignas(1024) uint8_t keys[2][kSubs][kSubBytes];
  float row_max[kBlockRows];
  float row_sum[2][2][kBlockRows];
  uint64_t queries_full, queries_empty, full[4], empty[4];  // [buffer * 2 + half]
  int bad[2];  // of every second piece: it has a page that the pool does not have
};

// Named barriers: 0 is __syncthreads.
enum : int { kReady = 1, kEnd = 3, kTail = 4 };  // kReady and kTail: one a warpgroup

constexpr int half_subs(int buffer, int half) { return buffer == half ? 4 : 5; }

template <class C>
__device__ __forceinline__ void init_decode_barriers(DecodeShared& s) {
  using cutlass::arch::ClusterBarrier;
  ClusterBarrier::init(&s.queries_full, 1);
  ClusterBarrier::init(&s.queries_empty, 2 * kWarpgroupWarps);
  for (int slot = 0; slot < 4; ++slot) {
    ClusterBarrier::init(&s.full[slot], 1);
    ClusterBarrier::init(&s.empty[slot], kWarpgroupWarps * C::kCluster);
  }
  cutlass::arch::fence_barrier_init();
}

// By a whole warp: it is done with a half of a buffer, in every block of the cluster.
template <class C>
__device__ __forceinline__ void release_half(uint32_t empty, int slot, uint32_t rank) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(empty + slot * 8) : "memory");
  if (C::kCluster == 2 && lane == 1) {
    // NOTE: without .release.cluster, as in RingBarriers::release.
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; mbarrier.arrive.shared::cluster.b64 _, "
        "[remote]; }" ::"r"(empty + slot * 8),
        "r"(rank ^ 1)
        : "memory");
  }
}

}  // namespace dsv3
