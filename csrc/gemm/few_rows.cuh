// The kernel for up to 128 rows, bound by reading B once: a block takes 64 or 128 rows of B and a part of K; the blocks
// of a cluster hold the parts, and add their partial sums through distributed shared memory in the order of K. A
// producer warp fills a ring by TMA, deep enough for the latency of device memory; one warpgroup for every 64 rows
// multiplies. Roofline: README.md.
#pragma once

#include "transposed.cuh"

namespace dsv3 {

template <class Out_, int kTokens_, int kGroups_, bool kDeep_>
struct FewRowsConfig {
  using Out = Out_;
  static constexpr int kTokens = kTokens_;  // 16, 32, 64 or 128: rows of A, columns of the tensor core
  static constexpr int kGroups = kGroups_;  // warpgroups that multiply, 64 rows of B each
  static constexpr int kRows = kGroups * 64;
  static constexpr int kWarps = kGroups * kWarpgroupWarps;
  static constexpr int kThreads = (kWarps + 1) * kWarpSize;
  // A whole multiprocessor's memory in flight, or half of it, so that the next kernel's blocks can move in early.
  static constexpr int kBlocks = kDeep_ || kRows + kTokens > 192 ? 1 : 2;
  static constexpr int kStageBytes = (kRows + kTokens) * kBlockK + kTokens * 4 + 32;
  static constexpr int kStages = (kBlocks == 1 ? 216 : 104) * 1024 / kStageBytes;
  // K blocks whose products are under way at once: as many as registers hold.
  static constexpr int kRegisters = kGroups == 2 ? (kBlocks == 2 ? 96 : 168) : kBlocks == 2 ? 168 : 240;
  static constexpr bool fits(int products) { return kTokens / 2 * (1 + products) + 46 <= kRegisters; }
  static constexpr int kAtOnce = kTokens <= 32 && fits(4) ? 4 : fits(2) ? 2 : 1;
  // Sums travel in units of 16 tokens of a warp's 16 weights.
  static constexpr int kUnitsAWarp = kTokens / 16, kUnits = kWarps * kUnitsAWarp;
};

// Eight fp32 a lane, as two vectors.
struct Unit {
  float4 values[2][kWarpSize];
};

template <class C>
struct FewRowsShared {
  union {
    struct {
      alignas(1024) uint8_t b[C::kStages][C::kRows * kBlockK];
      alignas(1024) uint8_t a[C::kStages][C::kTokens * kBlockK];
      alignas(16) float a_sf[C::kStages][C::kTokens];
      float b_sf[C::kStages];
    };
    Unit received[C::kUnits + 8];  // once no ring of the cluster is in use: of every block's units that this one adds
  };
  alignas(16) uint8_t scratch[C::kWarps][kScratchBytes];
  RingBarriers<C::kStages, C::kWarps, 1, 1> ring;
  uint64_t arrived;  // the units of all blocks
};

struct FewRowsParams {
  CUtensorMap a, b;
  void* out;
  RowScales a_sf;
  const float* b_sf;  // [ceil(N / 128), depth_blocks]
  int rows, columns, depth_blocks;
  int splits;  // of K, the blocks of a cluster
  bool accumulate, static_weights;
};

// The tiles of a block, and its part of K.
template <class C>
struct FewRowsWork {
  int tile, step, tiles, begin, end;
  __device__ __forceinline__ explicit FewRowsWork(const FewRowsParams& p) {
    const int split = blockIdx.x % p.splits;
    tile = blockIdx.x / p.splits;
    step = gridDim.x / p.splits;
    tiles = ceil_div(p.columns, C::kRows);
    begin = p.depth_blocks * split / p.splits;
    end = p.depth_blocks * (split + 1) / p.splits;
  }
};

template <class C>
__device__ __forceinline__ void produce(const FewRowsParams& p, FewRowsShared<C>& shared) {
  constexpr auto kOnce = cute::TMA::CacheHintSm90::EVICT_FIRST, kOften = cute::TMA::CacheHintSm90::EVICT_LAST;
  const int lane = threadIdx.x % kWarpSize;
  const int sf_bytes = p.a_sf.bytes(0, C::kTokens);
  const int bytes = (C::kRows + C::kTokens) * kBlockK + sf_bytes;
  FewRowsWork<C> work(p);
  if (lane == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.a));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.b));
  }
  // Weights that nobody writes need not wait for the kernel ahead. NOTE: asking the L2 cache for the others meanwhile
  // (cp.async.bulk.prefetch) made every shape slower, by 0.7 to 2 us, and by half where they exceed the cache.
  const int early = p.static_weights ? min(work.end - work.begin, C::kStages) : 0;
  if (lane == 0) {
    for (int i = 0; i < early; ++i) {
      shared.ring.expect(i, bytes);
      tma_load(shared.b[i], p.b, shared.ring.full[i], (work.begin + i) * kBlockK, work.tile * C::kRows, kOnce);
    }
  }
  wait_for_inputs();
  release_dependents();
  RingState<C::kStages> at;
  int loaded = early;
  for (; work.tile < work.tiles; work.tile += work.step) {
    const float* const b_sf = p.b_sf + static_cast<int64_t>(work.tile * C::kRows / kBlockK) * p.depth_blocks;
    for (int block = work.begin; block < work.end; ++block, at.advance(), --loaded) {
      shared.ring.wait_empty(at);
      uint64_t& full = shared.ring.full[at.stage];
      if (lane == 0) {
        if (loaded <= 0) {
          shared.ring.expect(at.stage, bytes);
          tma_load(shared.b[at.stage], p.b, full, block * kBlockK, work.tile * C::kRows, kOnce);
        }
        tma_load(shared.a[at.stage], p.a, full, block * kBlockK, 0, kOften);
        load_scales(shared.a_sf[at.stage], p.a_sf.at(0, block), sf_bytes, full);
      } else if (lane == 1) {
        copy_float_async(&shared.b_sf[at.stage], b_sf + block);
        arrive_when_copied(full);
      }
    }
  }
}

// Where a warp finds a stage's operands and scales, as addresses that are computed once.
template <class C>
struct FewRowsStages {
  uint32_t full, empty, a, b, a_sf, b_sf;
  __device__ __forceinline__ explicit FewRowsStages(const FewRowsShared<C>& shared)
      : full(shared_address(shared.ring.full)),
        empty(shared.ring.empty_address()),
        a(uniform(matrix_descriptor(shared_address(shared.a)))),
        b(uniform(matrix_descriptor(shared_address(shared.b)) +
                  uniform_warp() / kWarpgroupWarps * (64 * kBlockK / 16))),
        a_sf(shared_address(shared.a_sf)),
        b_sf(shared_address(shared.b_sf)) {}
};

// kCount K blocks at once: a block's chain of waits is longer than its product, so several products are under way
// before the first is promoted.
template <class C, int... kIndex>
__device__ __forceinline__ void multiply_blocks(const FewRowsStages<C>& stages, float (&sum)[C::kTokens / 2],
                                                RingState<C::kStages>& at, std::integer_sequence<int, kIndex...>) {
  using Shared = FewRowsShared<C>;
  using Ring = decltype(Shared::ring);
  constexpr int kCount = sizeof...(kIndex), kTokens = C::kTokens;
  float product[kCount][kTokens / 2];
  int stage[kCount];
  const auto start = [&](int i) {
    stage[i] = at.stage;
    Ring::wait_full(stages.full, at);
    start_product<kTokens>(stages.b + at.stage * (sizeof(Shared::b[0]) / 16),
                           stages.a + at.stage * (sizeof(Shared::a[0]) / 16), product[i]);
    at.advance();
  };
  const auto finish = [&](auto i) {
    finish_product<kTokens, kCount - 1 - i>(product[i]);
    promote_transposed<kTokens, true>(sum, product[i],
                                      load_shared_float(stages.b_sf + stage[i] * sizeof(Shared::b_sf[0])),
                                      stages.a_sf + stage[i] * sizeof(Shared::a_sf[0]));
    Ring::release(stages.empty, stage[i]);
  };
  (start(kIndex), ...);
  (finish(std::integral_constant<int, kIndex>{}), ...);
}

template <class C>
__device__ __forceinline__ void multiply(const FewRowsShared<C>& shared, float (&sum)[C::kTokens / 2], int blocks,
                                         RingState<C::kStages>& at) {
  constexpr int kCount = C::kAtOnce;
  const FewRowsStages<C> stages(shared);
  int i = 0;
#pragma unroll 1
  for (; i + kCount <= blocks; i += kCount) {
    multiply_blocks<C>(stages, sum, at, std::make_integer_sequence<int, kCount>{});
  }
#pragma unroll 1
  for (; i < blocks; ++i) {
    multiply_blocks<C>(stages, sum, at, std::make_integer_sequence<int, 1>{});
  }
}

__device__ __forceinline__ void sync_splits() {
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
}

// Unit u of the tile is added by block u % splits of the cluster, there as number u / splits. Every block sends its
// sums.
template <class C>
__device__ __forceinline__ void send_units(FewRowsShared<C>& shared, const float (&sum)[C::kTokens / 2], int split,
                                           int splits) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < C::kUnitsAWarp; ++j) {
    const int unit = warp * C::kUnitsAWarp + j, target = unit % splits, slot = unit / splits * splits + split;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const v = &sum[8 * j + 4 * i];
      const auto local = static_cast<uint32_t>(__cvta_generic_to_shared(&shared.received[slot].values[i][lane]));
      const auto barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&shared.arrived));
      asm volatile(
          "{ .reg .b32 data, done; mapa.shared::cluster.u32 data, %0, %2; mapa.shared::cluster.u32 done, %1, %2;"
          " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [data], {%3, %4, %5, %6}, [done]; }" ::"r"(
              local),
          "r"(barrier), "r"(target), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
          : "memory");
    }
  }
}

// The sum of a unit over the blocks, in the order of K.
template <class C>
__device__ __forceinline__ void add_unit(const FewRowsShared<C>& shared, int slot, int splits, float (&sum)[8]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0.f;
  for (int s = 0; s < splits; ++s) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = shared.received[slot * splits + s].values[i][lane];
      sum[4 * i] += v.x;
      sum[4 * i + 1] += v.y;
      sum[4 * i + 2] += v.z;
      sum[4 * i + 3] += v.w;
    }
  }
}

template <class C>
__device__ __forceinline__ void consume(const FewRowsParams& p, FewRowsShared<C>& shared) {
  using Out = typename C::Out;
  const int warp = threadIdx.x / kWarpSize;
  FewRowsWork<C> work(p);
  RingState<C::kStages> at;
  const auto target = [&](int tile, int of_warp) {
    return Target<Out>{static_cast<Out*>(p.out),       p.columns, p.rows,
                       tile * C::kRows + of_warp * 16, p.columns, p.accumulate};
  };
  for (; work.tile < work.tiles; work.tile += work.step) {
    float sum[C::kTokens / 2] = {};
    multiply<C>(shared, sum, work.end - work.begin, at);
    if (p.splits > 1) {
      // One tile a block. All rings of the cluster must be done before sums may land in their place.
      const int split = blockIdx.x % p.splits;
      // Nothing is read that others wrote before, so their arrival need not release memory, which takes a microsecond.
      sync_splits();
      send_units<C>(shared, sum, split, p.splits);
      cutlass::arch::ClusterBarrier::wait(&shared.arrived, 0);
      asm volatile("" ::: "memory");  // the loads of what arrived stay below
      for (int slot = warp; slot * p.splits + split < C::kUnits; slot += C::kWarps) {
        const int unit = slot * p.splits + split;
        float total[8];
        add_unit<C>(shared, slot, p.splits, total);
        write_tokens(target(work.tile, unit / C::kUnitsAWarp), unit % C::kUnitsAWarp * 16, total, shared.scratch[warp]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < C::kUnitsAWarp; ++j) {
        write_tokens(target(work.tile, warp), 16 * j, &sum[8 * j], shared.scratch[warp]);
      }
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) few_rows_kernel(const __grid_constant__ FewRowsParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<FewRowsShared<C>*>(raw);
  if (threadIdx.x == C::kWarps * kWarpSize) {
    shared.ring.init();
    const int split = blockIdx.x % p.splits, mine = ceil_div(C::kUnits - split, p.splits);
    cutlass::arch::ClusterBarrier::init(&shared.arrived, 1);
    cutlass::arch::fence_barrier_init();
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&shared.arrived, mine * p.splits * sizeof(Unit));
  }
  __syncthreads();
  if (threadIdx.x < C::kWarps * kWarpSize) {
    wait_for_inputs();
    release_dependents();
    consume<C>(p, shared);
  } else {
    produce<C>(p, shared);
    if (p.splits > 1) sync_splits();
  }
}

}  // namespace dsv3
