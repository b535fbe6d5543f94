// The kernel of mla_attention_backward: a block has 128 keys of one head and goes through the tiles of 64 queries that
// see them. Two warpgroups have 64 keys each, whose dK and dV stay in registers (160 a thread):
//
//   S^T = K Q^T   P^T = exp(S^T - lse)   dV += P^T dO   dP^T = V dO^T   dS^T = P^T (dP^T - delta)   dK += dS^T Q
//
// dS^T goes through shared memory, and each warpgroup multiplies all of it by half of the columns of K: dQ = dS K, which
// is added to the workspace. That is a step behind, so that no warpgroup waits for the other: while one makes
// probabilities the tensor cores have the other's products. Lse and delta are the values that S and dP start from.
#pragma once

#include "backward_dq.cuh"
#include "backward_mma.cuh"

namespace dsv3 {

// How many of a thread's 12 vectors of dQ are added by a bulk copy out of shared memory; the others it adds itself.
constexpr int kDqSteps = 12, kBulkSteps = 8;

template <bool kDeterministic_>
struct BackwardConfig {
  static constexpr bool kDeterministic = kDeterministic_;
  static constexpr int kStages = 2;
  static constexpr int kThreads = 2 * kWarpgroup;
};

template <class C>
struct BackwardShared {
  alignas(1024) uint8_t keys[kQuerySubs][2 * kSubBytes];
  alignas(1024) uint8_t values[kValueSubColumns][2 * kSubBytes];
  alignas(1024) uint8_t queries[C::kStages][kQuerySubs][kSubBytes];
  alignas(1024) uint8_t dout[C::kStages][kValueSubColumns][kSubBytes];
  alignas(1024) uint8_t ds[2][2][kSubBytes];  // of every second tile
  alignas(128) float dq[kBackwardWarps][kBulkSteps][4 * kWarpSize];
  alignas(16) float stats[C::kStages][kStatsTile];
  uint64_t keys_full, full[C::kStages], ds_full[2], ds_free[2];
  int done[C::kStages];  // warps that have done with the stage, of all uses
  bool last_of_rope, last_of_unit;
};

enum : int { kDsStored = 1, kTailZeroed = 3 };  // named barriers, one a warpgroup

template <class C>
struct KeyBlock {
  const BackwardParams& p;
  BackwardShared<C>& s;
  const BackwardWork& w;
  const int warp, group, lane;  // of the block; warpgroup
  const uint32_t base;          // all addresses from one: each in a register of its own would be too many

  __device__ __forceinline__ KeyBlock(const BackwardParams& params, BackwardShared<C>& shared, const BackwardWork& work)
      : p(params),
        s(shared),
        w(work),
        warp(uniform_warp()),
        group(uniform_warp() / kWarpgroupWarps),
        lane(threadIdx.x % kWarpSize),
        base(shared_address(&shared)) {}
  using Shared = BackwardShared<C>;
  __device__ __forceinline__ uint32_t keys() const { return base + offsetof(Shared, keys); }
  __device__ __forceinline__ uint32_t values() const { return base + offsetof(Shared, values); }
  __device__ __forceinline__ uint32_t queries(int stage) const {
    return base + offsetof(Shared, queries) + stage * (kQuerySubs * kSubBytes);
  }
  __device__ __forceinline__ uint32_t dout(int stage) const {
    return base + offsetof(Shared, dout) + stage * (kValueSubColumns * kSubBytes);
  }
  __device__ __forceinline__ uint32_t stats(int stage) const {
    return base + offsetof(Shared, stats) + stage * (kStatsTile * 4);
  }
  __device__ __forceinline__ uint32_t gradients(int step) const {
    return base + offsetof(Shared, ds) + step % 2 * (2 * kSubBytes);
  }
  __device__ __forceinline__ uint32_t scratch() const { return keys() + warp * 4 * kScratch; }

  // ---- loads, by one thread ----
  __device__ __forceinline__ void load_keys() {
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.keys_full, sizeof(s.keys) + sizeof(s.values));
    const int row = w.key + w.tile * kKeyTile;
    for (int c = 0; c < 2; ++c) {
      tma_load(s.keys[c], p.k_nope, s.keys_full, w.head * p.k_stride + c * kSubColumns, row);
      tma_load(s.values[c], p.v, s.keys_full, w.head * p.v_stride + c * kSubColumns, row);
    }
    tma_load(s.keys[2], p.k_rope, s.keys_full, 0, row);
  }
  __device__ __forceinline__ void load_queries(int tile, int stage) {
    constexpr int kBytes = (kQuerySubs + kValueSubColumns) * kSubBytes + kStatsTile * 4;
    uint64_t& arrived = s.full[stage];
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&arrived, kBytes);
    const int row = w.query + tile * kQueryTile;
    const int64_t packed = static_cast<int64_t>(w.head) * p.query_tiles + w.packed_queries + tile;
    load_scales(s.stats[stage], p.work.stats + packed * kStatsTile, kStatsTile * 4, arrived);
#pragma unroll
    for (int c = 0; c < kQuerySubs; ++c) {
      tma_load(s.queries[stage][c], p.q, arrived, w.head * kQueryColumns + c * kSubColumns, row);
    }
#pragma unroll
    for (int c = 0; c < kValueSubColumns; ++c) {
      tma_load(s.dout[stage][c], p.dout, arrived, w.head * kValueColumns + c * kSubColumns, row);
    }
  }
  // By a warp that has done with a stage: the last of them asks for the tile after the next.
  __device__ __forceinline__ void release(int tile, int stage) {
    if (lane == 0) {
      if (tile < w.end && count_up(s.done[stage]) % kBackwardWarps == kBackwardWarps - 1) load_queries(tile, stage);
    }
    __syncwarp();
  }

  // Rows behind the end of a sequence may hold anything, and zero times anything may be NaN.
  template <int kThreads>
  __device__ __forceinline__ void zero_rows(uint32_t subs, int count, int bytes, int row) {
    for (int c = 0; c < count; ++c) {
#pragma unroll 1
      for (int i = row * 128 + static_cast<int>(threadIdx.x) % kThreads * 16; i < bytes; i += kThreads * 16) {
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(subs + c * bytes + i), "r"(0) : "memory");
      }
    }
  }
  __device__ __forceinline__ void wait_keys() {
    wait_barrier(base + offsetof(Shared, keys_full), 0);
    const int rows = w.keys - w.tile * kKeyTile;
    if (rows >= kKeyTile) return;
    zero_rows<C::kThreads>(keys(), kQuerySubs + kValueSubColumns, 2 * kSubBytes, rows);
    fence_shared_writes();
    __syncthreads();
  }
  __device__ __forceinline__ void wait_queries(int tile, int step) {
    const int stage = step % C::kStages, rows = w.queries - tile * kQueryTile;
    wait_barrier(base + offsetof(Shared, full) + stage * 8, step / C::kStages % 2);
    if (rows >= kQueryTile) return;
    zero_rows<kWarpgroup>(queries(stage), kQuerySubs, kSubBytes, rows);
    zero_rows<kWarpgroup>(dout(stage), kValueSubColumns, kSubBytes, rows);
    fence_shared_writes();
    named_sync(kTailZeroed + group, kWarpgroup);
  }

  // ---- a tile of queries ----
  // What every row (key) of a fragment starts from: a number a column (query).
  __device__ __forceinline__ void start_from(uint32_t numbers, float (&d)[32]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 x = load_shared_float2(numbers + (8 * j + lane % 4 * 2) * 4);
      d[4 * j] = d[4 * j + 2] = x.x;
      d[4 * j + 1] = d[4 * j + 3] = x.y;
    }
  }
  __device__ __forceinline__ void start_tile(int step, float (&scores)[32], float (&dscores)[32]) {
    wait_queries(w.first + step, step);
    const int stage = step % C::kStages;
    start_from(stats(stage), scores);
    start_from(stats(stage) + kQueryTile * 4, dscores);
    detail::fence_registers(dscores);  // NOTE: here, since what is loaded behind a product waits for its operands
    add_products<kQuerySubs>(uniform(matrix_descriptor(keys() + group * kSubBytes)), 2 * kSubBytes,
                             uniform(matrix_descriptor(queries(stage))), scores);
    add_products<kValueSubColumns>(uniform(matrix_descriptor(values() + group * kSubBytes)), 2 * kSubBytes,
                                   uniform(matrix_descriptor(dout(stage))), dscores);
  }

  __device__ __forceinline__ void mask(int tile, float (&scores)[32]) {
    const int key = w.tile * kKeyTile, query = tile * kQueryTile, past = w.keys - w.queries;
    const bool whole = key + kKeyTile <= w.keys && (!p.causal || key + kKeyTile - 1 <= query + past);
    if (whole) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {  // queries before `from` do not see the row's key
      const int k = key + warp * 16 + lane / 4 + 8 * r;
      const int from = (k >= w.keys ? kQueryTile : p.causal ? k - past - query : 0) - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (8 * j < from) scores[4 * j + 2 * r] = -INFINITY;
        if (8 * j + 1 < from) scores[4 * j + 2 * r + 1] = -INFINITY;
      }
    }
  }
  // The left operand of a product over queries.
  __device__ __forceinline__ void round(const float (&x)[32], uint32_t (&left)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) left[i] = pack_bf16(x[2 * i], x[2 * i + 1]);
  }

  // dS^T of this warp to shared memory; when it returns, those of its warpgroup are there.
  __device__ __forceinline__ void store_gradients(int step, const uint32_t (&left)[16]) {
    const int row = lane % 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      store_matrices(gradients(step) + (warp * 16 + row) * 128 + ((2 * k + lane / 16) ^ (row % 8)) * 16, &left[4 * k]);
    }
    fence_shared_writes();
    __syncwarp();
    if (lane == 0) cutlass::arch::ClusterBarrier::arrive(&s.ds_full[step % 2]);
    named_sync(kDsStored + group, kWarpgroup);
  }

  // Columns of K that are this warpgroup's part of dQ: 64 of the first or second sub-block, 32 of the third.
  __device__ __forceinline__ uint32_t dq_keys() const {
    const uint32_t distance = group == 0 ? 4 * kSubBytes : 2 * kSubBytes + 64;
    return distance / 16 << 16 | ((keys() + group * 2 * kSubBytes) >> 4 & 0x3fff);
  }
  // By a warp: what it has added to a tile is there, and it is the next block's turn.
  __device__ __forceinline__ void pass_turn(int tile) {
    __syncwarp();
    if (lane == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
      store_release(w.turn(p, tile, warp), w.last_seen(p, tile) - w.tile + 1);
    }
  }
  // Until this warp may add to a tile's dQ: its place is empty, and where the order matters it is this block's turn.
  __device__ __forceinline__ void take_turn(int tile) {
    if (C::kDeterministic && tile > w.first) pass_turn(tile - 1);
    if (lane == 0) {
      if (tile == w.first) wait_until(p.work.finished + w.place, w.lap);  // for `finish`
      wait_until(p.work.finished + w.place_of(p, tile), w.lap_of(p, tile));
      if (C::kDeterministic) wait_until(w.turn(p, tile, warp), w.last_seen(p, tile) - w.tile);
    }
    __syncwarp();
  }
  __device__ __forceinline__ void add_dq(int tile, const float (&dq)[48]) {
    float* const target = w.dq_part(p, tile, warp);
    const uint32_t staged = base + offsetof(Shared, dq) + warp * (kBulkSteps * kWarpSize * 16);
    if (lane == 0) wait_bulk_stores_read<0>();
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kBulkSteps; ++j) store_shared_float4(staged + (j * kWarpSize + lane) * 16, &dq[4 * j]);
    fence_shared_writes();
    __syncwarp();
    if (lane == 0) bulk_add(target, staged, kBulkSteps * kWarpSize * 16);
    __syncwarp();
#pragma unroll
    for (int j = kBulkSteps; j < kDqSteps; ++j) add_float4(target + (j * kWarpSize + lane) * 4, &dq[4 * j]);
  }

  // The gradients of a step's tile are in shared memory and this warpgroup's.
  __device__ __forceinline__ void start_dq(int step, float (&dq)[48]) {
    wait_barrier(base + offsetof(Shared, ds_full) + step % 2 * 8, step / 2 % 2);
    start_query_gradient(uniform(columns_descriptor(gradients(step))), uniform(dq_keys()), dq);
  }
  __device__ __forceinline__ void finish_dq(int step, float (&dq)[48]) {
    detail::fence_registers(dq);
    if (lane == 0) cutlass::arch::ClusterBarrier::arrive(&s.ds_free[step % 2]);
    __syncwarp();
    add_dq(w.first + step, dq);
  }

  // Scores and their gradients are under way, and those of the next tile are when it returns; scores are there.
  template <bool kFirst, bool kLast>
  __device__ __forceinline__ void differentiate(int step, float (&scores)[32], float (&dscores)[32], float (&dk)[96],
                                                float (&dv)[64]) {
    const int tile = w.first + step, stage = step % C::kStages;
    mask(tile, scores);
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = fast_exp2(scores[i] * p.scale_log2);
    uint32_t probabilities[16], left[16];
    round(scores, probabilities);
    detail::fence_registers(scores);
    detail::fence_registers(probabilities);
    // NOTE: a loop between the exponentials and the wait for dP, else the assembler puts them behind it.
    wait_barrier(base + offsetof(Shared, ds_free) + step % 2 * 8, step / 2 % 2 ^ 1);
    cute::warpgroup_wait<0>();
    detail::fence_registers(dscores);
#pragma unroll
    for (int i = 0; i < 32; ++i) dscores[i] *= scores[i];
    round(dscores, left);
    // NOTE: dV here and waited for before dQ: with dscores or dQ to be read while it is under way the compiler finds too
    // few registers and waits for every product at once. So it does if dK's left operand, too, is in registers.
    start_key_gradient(probabilities, uniform(columns_descriptor(dout(stage))), dv);
    store_gradients(step, left);
    cute::warpgroup_wait<0>();
    float dq[48];
    if constexpr (!kFirst) start_dq(step - 1, dq);
    start_key_gradient(uniform(matrix_descriptor(gradients(step) + group * kSubBytes)),
                       uniform(columns_descriptor(queries(stage))), dk);
    if constexpr (!kFirst) {
      take_turn(tile - 1);  // while the products go on
      cute::warpgroup_wait<1>();
      finish_dq(step - 1, dq);
    }
    if constexpr (kLast) {
      cute::warpgroup_wait<0>();
    } else {
      start_tile(step + 1, scores, dscores);
      cute::warpgroup_wait<2>();
      release(tile + C::kStages, stage);
      cute::warpgroup_wait<1>();
      detail::fence_registers(scores);
    }
  }

  __device__ __forceinline__ void differentiate_all(float (&dk)[96], float (&dv)[64]) {
    const int steps = w.end - w.first;
    if (steps <= 0) return;
    wait_keys();
    float scores[32], dscores[32];
    start_tile(0, scores, dscores);
    cute::warpgroup_wait<1>();
    detail::fence_registers(scores);
    if (steps == 1) {
      differentiate<true, true>(0, scores, dscores, dk, dv);
    } else {
      differentiate<true, false>(0, scores, dscores, dk, dv);
      for (int step = 1; step < steps - 1; ++step) differentiate<false, false>(step, scores, dscores, dk, dv);
      differentiate<false, true>(steps - 1, scores, dscores, dk, dv);
    }
    float dq[48];
    start_dq(steps - 1, dq);
    take_turn(w.end - 1);
    cute::warpgroup_wait<0>();
    finish_dq(steps - 1, dq);
    detail::fence_registers(dk);
    detail::fence_registers(dv);
    if (C::kDeterministic) {
      pass_turn(w.end - 1);
    } else if (lane == 0) {
      asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    }
  }

  // ---- results ----
  __device__ __forceinline__ float* rope_sums() const {
    return p.work.dk_rope + static_cast<int64_t>(w.packed_keys) * kRopeTile + warp * (kRopeTile / kBackwardWarps) +
           lane * 4;
  }
  // The rotated columns to the sum over the heads, in the order of the heads where that matters; the others to memory.
  __device__ __forceinline__ void write_keys(const float (&dk)[96], const float (&dv)[64]) {
    if (C::kDeterministic && threadIdx.x == 0) wait_until(p.work.rope_added + w.packed_keys, w.head);
    __syncthreads();  // also until both warpgroups have done with the keys
#pragma unroll
    for (int j = 0; j < 8; ++j) add_float4(rope_sums() + j * 128, &dk[64 + 4 * j]);
    const uint32_t scratch = this->scratch();
    for (int c = 0; c < 2; ++c) {
      stage_rows<4>(&dk[32 * c], p.scale, scratch + c * kScratch);
      stage_rows<4>(&dv[32 * c], 1.f, scratch + (2 + c) * kScratch);
    }
    __syncwarp();
    const int row = w.tile * kKeyTile + warp * 16;
    const int64_t stride = static_cast<int64_t>(p.heads) * (kNopeColumns + kValueColumns);
    __nv_bfloat16* const target = p.dkv + (w.key + row) * stride + w.head * (kNopeColumns + kValueColumns);
#pragma unroll
    for (int c = 0; c < 4; ++c) copy_rows<4>(scratch + c * kScratch, target + c * kSubColumns, stride, w.keys - row);
  }

  // By the last head: the sum of all.
  __device__ __forceinline__ void write_rope() {
    float sum[32];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(rope_sums() + j * 128));
      sum[4 * j] = x.x, sum[4 * j + 1] = x.y, sum[4 * j + 2] = x.z, sum[4 * j + 3] = x.w;
    }
    const uint32_t scratch = this->scratch();
    __syncwarp();
    stage_rows<4>(sum, p.scale, scratch);
    __syncwarp();
    const int row = w.tile * kKeyTile + warp * 16;
    copy_rows<4>(scratch, p.dk_rope + static_cast<int64_t>(w.key + row) * kRopeColumns, kRopeColumns, w.keys - row);
  }

  __device__ __forceinline__ void finish() {
    __threadfence();  // of this thread's sums, those that bulk copies added among them
    __syncthreads();
    if (threadIdx.x == 0) {
      if (w.first >= w.end) wait_until(p.work.finished + w.place, w.lap);
      s.last_of_rope = atomicAdd(p.work.rope_added + w.packed_keys, 1) == p.heads - 1;
      s.last_of_unit = atomicAdd(p.work.arrived + w.place, 1) == w.tiles - 1;
      __threadfence();
    }
    __syncthreads();
    const bool last_of_unit = s.last_of_unit;
    if (s.last_of_rope) write_rope();
    if (last_of_unit) DqWriter(p, w, &s).run();
  }
};

// What offsets without sense give.
inline __device__ __noinline__ void poison(const BackwardParams& p) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto fill = [&](__nv_bfloat16* x, int64_t count) {
    for (int64_t i = first; i < count / 8; i += step) {
      reinterpret_cast<uint4*>(x)[i] = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
    }
  };
  fill(p.dq, p.rows_q * p.heads * kQueryColumns);
  fill(p.dkv, p.rows_k * p.heads * (kNopeColumns + kValueColumns));
  fill(p.dk_rope, p.rows_k * kRopeColumns);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) backward_kernel(const __grid_constant__ BackwardParams p) {
  static_assert(sizeof(DqWriter::Shared) <= sizeof(BackwardShared<C>));
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<BackwardShared<C>*>(memory);
  wait_for_inputs();
  release_dependents();
  const int bad = *p.work.bad;  // asked for together with the offsets
  const BackwardWork work(p, blockIdx.x, C::kDeterministic);
  if (bad != 0) return poison(p);
  if (!work.real) return;
  KeyBlock<C> block(p, s, work);
  if (threadIdx.x == 0) {
    using cutlass::arch::ClusterBarrier;
    ClusterBarrier::init(&s.keys_full, 1);
    for (int i = 0; i < 2; ++i) {
      ClusterBarrier::init(&s.ds_full[i], kBackwardWarps);
      ClusterBarrier::init(&s.ds_free[i], kBackwardWarps);
    }
    for (int i = 0; i < C::kStages; ++i) {
      ClusterBarrier::init(&s.full[i], 1);
      s.done[i] = 0;
    }
    cutlass::arch::fence_barrier_init();
    if (work.first < work.end) block.load_keys();
    for (int i = 0; i < C::kStages; ++i) {
      if (work.first + i < work.end) block.load_queries(work.first + i, i);
    }
  }
  __syncthreads();
  float dk[96] = {}, dv[64] = {};
  block.differentiate_all(dk, dv);
  block.write_keys(dk, dv);
  block.finish();
}

}  // namespace dsv3
