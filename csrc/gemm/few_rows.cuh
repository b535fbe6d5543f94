// The kernel for up to 128 rows, bound by reading B once: a block takes 64 rows of B and a part of K; the blocks of a
// cluster hold the parts, and add their partial sums through distributed shared memory in the order of K. Two producer
// warps, one for B and one for A and its scales, fill a ring by TMA, deep enough for the latency of device memory; a
// warpgroup multiplies by up to 64 rows of A. Roofline: README.md.
#pragma once

#include "transposed.cuh"

namespace dsv3 {

template <class Out_, int kTokens_, bool kDeep_>
struct FewRowsConfig {
  using Out = Out_;
  static constexpr int kTokens = kTokens_;          // 16, 32, 64 or 128: rows of A
  static constexpr int kN = std::min(kTokens, 64);  // of a warpgroup: columns of the tensor core
  static constexpr int kRows = 64;                  // of B
  static constexpr int kGroups = kTokens / kN, kWarps = kGroups * kWarpgroupWarps;
  static constexpr int kProducers = 2;  // NOTE: one warp takes 0.22 us for the copies of a K block
  static constexpr int kThreads = (kWarps + kProducers) * kWarpSize;
  // A whole multiprocessor's memory in flight, or half of it, so that the next kernel's blocks can move in early.
  static constexpr int kBlocks = kDeep_ ? 1 : 2;
  static constexpr int kStageBytes = (kRows + kTokens) * kBlockK + kTokens * 4 + 32;
  // Sums travel in units of 16 tokens of a warp's 16 weights.
  static constexpr int kUnitsAWarp = kN / 16, kUnits = kWarps * kUnitsAWarp;
  static constexpr int kStages = ((kBlocks == 1 ? 225 : 111) * 1024 - kTokens * 128) / kStageBytes;
  static constexpr int kAtOnce = kN <= 32 ? 4 : 2;  // K blocks whose products are under way: as many as registers hold
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
    };
    Unit received[C::kUnits +
                  8];  // once no ring of the cluster is in use: what others send of the units that this block adds
  };
  alignas(16) uint8_t scratch[C::kGroups][C::kN * 128];
  RingBarriers<C::kStages, C::kWarps, 1, C::kProducers - 1> ring;
  uint64_t arrived;  // what others send
};

struct FewRowsParams {
  CUtensorMap a, b;
  void* out;
  RowScales a_sf;
  const float* b_sf;  // [ceil(N / 128), depth_blocks]
  int rows, columns, depth_blocks;
  int tokens;  // of a tile, a multiple of 8. NOTE: a copy of rows that do not exist takes longer than one of others
  int tiles, token_shift;  // 1 << token_shift tiles have the same weights
  int splits;              // of K, the blocks of a cluster
  bool accumulate, static_weights;
};

// The tiles of a block, and its part of K. Tiles of the same weights follow each other. By a whole warp.
template <class C>
struct FewRowsWork {
  int split, tile, step, tiles, token_shift, begin, end;
  __device__ __forceinline__ explicit FewRowsWork(const FewRowsParams& p) {
    // NOTE: no divisions where K is whole: a launch would wait for each.
    const bool whole = p.splits == 1;
    split = whole ? 0 : uniform(cute::block_rank_in_cluster());
    tile = uniform(whole ? blockIdx.x : cute::cluster_id_in_grid().x);
    step = uniform(whole ? gridDim.x : cute::cluster_grid_dims().x);
    tiles = p.tiles;
    token_shift = p.token_shift;
    begin = whole ? 0 : uniform(p.depth_blocks * split / p.splits);
    end = whole ? p.depth_blocks : uniform(p.depth_blocks * (split + 1) / p.splits);
  }
  // The first of a tile's weights, and its number among those of the same weights.
  __device__ __forceinline__ int weight(int of_tile) const { return (of_tile >> token_shift) * C::kRows; }
  __device__ __forceinline__ int token_tile() const { return tile & ((1 << token_shift) - 1); }
};

// NOTE: by an elected lane, not by lane 0: around each copy of a lane that it does not know to be the only one the
// compiler puts a loop over lanes.
template <class C>
__device__ __forceinline__ void produce_weights(const FewRowsParams& p, FewRowsShared<C>& shared) {
  constexpr auto kOnce = cute::TMA::CacheHintSm90::EVICT_FIRST;
  // Weights that nobody writes need not wait for the kernel ahead. NOTE: asking the L2 cache for the others meanwhile
  // (cp.async.bulk.prefetch) made every shape slower, by 0.7 to 2 us, and by half where they exceed the cache.
  FewRowsWork<C> work(p);
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.b));
  if (!p.static_weights) wait_for_inputs();
  RingState<C::kStages> at;
  for (; work.tile < work.tiles; work.tile += work.step) {
    const int weight = work.weight(work.tile);
    for (int block = work.begin; block < work.end; ++block, at.advance()) {
      shared.ring.wait_empty(at);
      if (!cute::elect_one_sync()) continue;
      shared.ring.expect(at.stage, sizeof(shared.b[0]));
      tma_load(shared.b[at.stage], p.b, shared.ring.full[at.stage], block * kBlockK, weight, kOnce);
    }
  }
}

template <class C>
__device__ __forceinline__ void produce_tokens(const FewRowsParams& p, FewRowsShared<C>& shared) {
  constexpr auto kOften = cute::TMA::CacheHintSm90::EVICT_LAST;
  FewRowsWork<C> work(p);
  cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.a));
  wait_for_inputs();
  release_dependents();
  RingState<C::kStages> at;
  for (; work.tile < work.tiles; work.tile += work.step) {
    const int token = work.token_tile() * p.tokens, sf_bytes = p.a_sf.bytes(token, p.tokens);
    for (int block = work.begin; block < work.end; ++block, at.advance()) {
      shared.ring.wait_empty(at);
      if (!cute::elect_one_sync()) continue;
      uint64_t& full = shared.ring.full[at.stage];
      shared.ring.expect(at.stage, p.tokens * kBlockK + sf_bytes);
      tma_load(shared.a[at.stage], p.a, full, block * kBlockK, token, kOften);
      load_scales(shared.a_sf[at.stage], p.a_sf.at(token, block), sf_bytes, full);
    }
  }
}

// Where a warp finds a stage's operands and scales, as addresses that are computed once.
template <class C>
struct FewRowsStages {
  uint32_t full, empty, a, b, a_sf;
  __device__ __forceinline__ explicit FewRowsStages(const FewRowsShared<C>& shared)
      : full(shared_address(shared.ring.full)), empty(shared.ring.empty_address()) {
    const uint32_t token = uniform_warp() / kWarpgroupWarps * C::kN;  // the warpgroup's first
    a = uniform(matrix_descriptor(shared_address(shared.a)) + token * (kBlockK / 16));
    b = uniform(matrix_descriptor(shared_address(shared.b)));
    a_sf = shared_address(shared.a_sf) + token * 4;
  }
};

// A K block whose product is under way, with the scales that it will be multiplied by. Scales are loaded before a
// product begins: a load after it, also one of another warpgroup, queues behind its operands.
template <class C>
struct FewRowsProduct {
  using Shared = FewRowsShared<C>;
  using Ring = decltype(Shared::ring);
  float values[C::kN / 2], weight;
  TokenScales<C::kN> tokens;
  int stage;

  __device__ __forceinline__ void start(const FewRowsStages<C>& stages, RingState<C::kStages>& at, float weight_sf) {
    stage = at.stage;
    weight = weight_sf;
    Ring::wait_full(stages.full, at);
    tokens.template load<true>(stages.a_sf + at.stage * sizeof(Shared::a_sf[0]));
    start_product<C::kN>(stages.b + at.stage * (sizeof(Shared::b[0]) / 16),
                         stages.a + at.stage * (sizeof(Shared::a[0]) / 16), values);
    at.advance();
  }
  // The `pending` products started last may go on.
  template <class Pending>
  __device__ __forceinline__ void finish(const FewRowsStages<C>& stages, float (&sum)[C::kN / 2], Pending pending) {
    finish_product<C::kN, pending>(values);
    Ring::release(stages.empty, stage);
    promote_transposed<C::kN>(sum, values, weight, tokens);
  }
};

// Up to 32 K blocks; lane l of weight_sf has the weights' scale of K block l. A block's chain of waits is longer than its
// product, so several products are under way before the first is promoted.
template <class C>
__device__ __forceinline__ void multiply(const FewRowsStages<C>& stages, float (&sum)[C::kN / 2], float weight_sf,
                                         int blocks, RingState<C::kStages>& at) {
  using Product = FewRowsProduct<C>;
  const auto start = [&](Product& product, int block) {
    product.start(stages, at, __shfl_sync(0xffffffffu, weight_sf, block));
  };
  const auto finish = [&](Product& product, auto pending) { product.finish(stages, sum, pending); };
  if constexpr (C::kAtOnce == 2) {
    multiply_in_turn<Product>(blocks, start, finish);
  } else {
    static_assert(C::kAtOnce == 4);
    int i = 0;
#pragma unroll 1
    for (; i + 4 <= blocks; i += 4) {
      Product a, b, c, d;
      start(a, i);
      start(b, i + 1);
      start(c, i + 2);
      start(d, i + 3);
      finish(a, std::integral_constant<int, 3>{});
      finish(b, std::integral_constant<int, 2>{});
      finish(c, std::integral_constant<int, 1>{});
      finish(d, std::integral_constant<int, 0>{});
    }
#pragma unroll 1
    for (; i < blocks; ++i) {
      Product a;
      start(a, i);
      finish(a, std::integral_constant<int, 0>{});
    }
  }
}

__device__ __forceinline__ void sync_splits() {
  __syncwarp();  // a producer's lanes have gone different ways
  cute::cluster_arrive_relaxed();
  cute::cluster_wait();
}

// Unit u of the tile is added by block u % splits of the cluster, whose warp has its own sums; the others send theirs.
struct FewRowsUnit {
  int splits, owner, number;  // the block that adds it, and how many units of that block are before
  __device__ __forceinline__ FewRowsUnit(int unit, int of) : splits(of), owner(unit % of), number(unit / of) {}
  __device__ __forceinline__ void advance() {
    if (++owner == splits) owner = 0, ++number;
  }
  // Where the owner keeps what block `split` sends.
  __device__ __forceinline__ int slot(int split) const { return number * (splits - 1) + split - (split > owner); }
};

// From the warp's first unit on.
template <class C>
__device__ __forceinline__ void send_units(FewRowsShared<C>& shared, const float (&sum)[C::kN / 2], int split,
                                           FewRowsUnit unit) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int j = 0; j < C::kUnitsAWarp; ++j, unit.advance()) {
    if (unit.owner == split) continue;
    const int slot = unit.slot(split);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const v = &sum[8 * j + 4 * i];
      const uint32_t local = shared_pointer(&shared.received[slot].values[i][lane]);
      const uint32_t barrier = shared_pointer(&shared.arrived);
      asm volatile(
          "{ .reg .b32 data, done; mapa.shared::cluster.u32 data, %0, %2; mapa.shared::cluster.u32 done, %1, %2;"
          " st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [data], {%3, %4, %5, %6}, [done]; }" ::"r"(
              local),
          "r"(barrier), "r"(unit.owner), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
          : "memory");
    }
  }
}

// The sum of a unit over the blocks in the order of K, this one's being `own`.
template <class C>
__device__ __forceinline__ void add_unit(const FewRowsShared<C>& shared, const FewRowsUnit& unit, const float* own,
                                         float (&sum)[8]) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] = 0.f;
  for (int s = 0; s < unit.splits; ++s) {
    if (s == unit.owner) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += own[i];
      continue;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = shared.received[unit.slot(s)].values[i][lane];
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
  const int warp = uniform_warp();
  const FewRowsStages<C> stages(shared);
  FewRowsWork<C> work(p);
  RingState<C::kStages> at;
  // The scales of the warp's weights, those of 32 K blocks one a lane, loaded ahead.
  const auto load_weights = [&](int tile, int base) {
    const int row = min(work.weight(tile), p.columns - 1) / kBlockK;
    const int block = min(work.begin + base + static_cast<int>(threadIdx.x) % kWarpSize, p.depth_blocks - 1);
    return p.b_sf[static_cast<int64_t>(row) * p.depth_blocks + block];
  };
  const int group = warp / kWarpgroupWarps, token = group * C::kN;
  uint8_t* const scratch = shared.scratch[group];
  const FewRowsUnit first_unit(warp * C::kUnitsAWarp, p.splits);  // divides while the first stages are loaded
  const auto target = [&] {                                       // of the warpgroup
    const int begin = work.token_tile() * p.tokens;
    return Target<Out>{static_cast<Out*>(p.out) + static_cast<int64_t>(begin) * p.columns,
                       p.columns,
                       min(p.tokens, p.rows - begin),
                       work.weight(work.tile),
                       p.columns,
                       p.accumulate};
  };
  if (!p.static_weights) wait_for_inputs();
  float next_weights = load_weights(work.tile, 0);
  if (p.static_weights) wait_for_inputs();  // before anything is written
  release_dependents();
  for (; work.tile < work.tiles; work.tile += work.step) {
    float sum[C::kN / 2] = {};
    const int blocks = work.end - work.begin;
    for (int base = 0; base < blocks; base += kWarpSize) {
      const float weights = next_weights;
      const int next = base + kWarpSize;
      next_weights = next < blocks ? load_weights(work.tile, next) : load_weights(work.tile + work.step, 0);
      multiply<C>(stages, sum, weights, min(kWarpSize, blocks - base), at);
    }
    if (p.splits > 1) {
      // One tile a block. All rings of the cluster must be done before sums may land in their place.
      // Nothing is read that others wrote before, so their arrival need not release memory, which takes a microsecond.
      sync_splits();
      send_units<C>(shared, sum, work.split, first_unit);
      cutlass::arch::ClusterBarrier::wait(&shared.arrived, 0);
      asm volatile("" ::: "memory");  // the loads of what arrived stay below
      FewRowsUnit unit = first_unit;
#pragma unroll
      for (int j = 0; j < C::kUnitsAWarp; ++j, unit.advance()) {
        if (unit.owner != work.split) continue;
        float total[8];
        add_unit<C>(shared, unit, &sum[8 * j], total);
        Target<Out> to = target();
        to.column += warp % kWarpgroupWarps * 16;
        write_tokens(to, token + 16 * j, total, scratch + warp % kWarpgroupWarps * kScratchBytes);
      }
    } else {
      write_tile<C::kN>(target(), token, sum, scratch, 1 + group);  // 0 is __syncthreads
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks) few_rows_kernel(const __grid_constant__ FewRowsParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<FewRowsShared<C>*>(raw);
  const int warp = uniform_warp();  // NOTE: else the compiler keeps nothing in uniform registers
  if (threadIdx.x == C::kWarps * kWarpSize) {
    shared.ring.init();
    if (p.splits > 1) {
      const int split = cute::block_rank_in_cluster(), mine = ceil_div(C::kUnits - split, p.splits);
      cutlass::arch::ClusterBarrier::init(&shared.arrived, 1);
      cutlass::arch::fence_barrier_init();
      cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&shared.arrived,
                                                                     mine * (p.splits - 1) * sizeof(Unit));
    }
  }
  __syncthreads();
  if (warp < C::kWarps) {
    consume<C>(p, shared);
    return;
  }
  warp == C::kWarps ? produce_weights<C>(p, shared) : produce_tokens<C>(p, shared);
  if (p.splits > 1) sync_splits();
}

}  // namespace dsv3
