// What the last block of a unit does: dQ of all its queries from the sums in fp32 to bf16, and zeros in their places. Each
// warp has its part of every tile, and several tiles under way by bulk copies.
#pragma once

#include "backward_rows.cuh"

namespace dsv3 {

struct DqWriter {
  static constexpr int kAhead = 3, kPartBytes = kDqPart * 4;
  struct Shared {
    alignas(128) float parts[kBackwardWarps][kAhead][kDqPart];
    alignas(128) uint8_t rows[kBackwardWarps][2 * kScratch];
    alignas(128) float zeros[kDqPart];
    uint64_t full[kBackwardWarps][kAhead];
  };

  const BackwardParams& p;
  const BackwardWork& w;
  Shared& s;
  const int warp, lane;

  __device__ __forceinline__ DqWriter(const BackwardParams& params, const BackwardWork& work, void* shared)
      : p(params), w(work), s(*static_cast<Shared*>(shared)), warp(uniform_warp()), lane(threadIdx.x % kWarpSize) {}

  __device__ __forceinline__ void load(int tile) {
    const int stage = tile % kAhead;
    cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(&s.full[warp][stage], kPartBytes);
    cute::SM90_BULK_COPY_G2S::copy(w.dq_part(p, tile, warp), &s.full[warp][stage], s.parts[warp][stage], kPartBytes);
  }
  __device__ __forceinline__ void start() {
    for (int i = threadIdx.x; i < kDqPart; i += blockDim.x) s.zeros[i] = 0.f;
    if (lane == 0) {
      for (int i = 0; i < kAhead; ++i) cutlass::arch::ClusterBarrier::init(&s.full[warp][i], 1);
      cutlass::arch::fence_barrier_init();
    }
    asm volatile("fence.proxy.async;" ::: "memory");  // of shared memory, and of the sums that others have added
    __syncthreads();
    for (int tile = 0; lane == 0 && tile < min(kAhead, w.end); ++tile) load(tile);
    __syncwarp();
  }
  // The tile's sums; another takes its stage, zeros its place in the ring.
  __device__ __forceinline__ void take(int tile, float (&sums)[48]) {
    const int stage = tile % kAhead;
    wait_barrier(shared_address(&s.full[warp][stage]), tile / kAhead % 2);
#pragma unroll
    for (int j = 0; j < 12; ++j) {
      const float4 x = reinterpret_cast<const float4*>(s.parts[warp][stage])[j * kWarpSize + lane];
      sums[4 * j] = x.x, sums[4 * j + 1] = x.y, sums[4 * j + 2] = x.z, sums[4 * j + 3] = x.w;
    }
    __syncwarp();
    if (lane == 0) {
      if (w.comes_again(p, tile)) bulk_store(w.dq_part(p, tile, warp), s.zeros, kPartBytes);
      *w.turn(p, tile, warp) = 0;
      if (tile + kAhead < w.end) load(tile + kAhead);
    }
  }
  __device__ __forceinline__ void write(int tile, const float (&sums)[48]) {
    const int group = warp / kWarpgroupWarps, row = tile * kQueryTile + warp % kWarpgroupWarps * 16;
    const int64_t stride = static_cast<int64_t>(p.heads) * kQueryColumns;
    const uint32_t rows = shared_address(s.rows[warp]);
    __nv_bfloat16* const target = p.dq + (w.query + row) * stride + w.head * kQueryColumns;
    stage_rows<4>(sums, p.scale, rows);
    stage_rows<2>(&sums[32], p.scale, rows + kScratch);
    __syncwarp();
    copy_rows<4>(rows, target + group * 64, stride, w.queries - row);
    copy_rows<2>(rows + kScratch, target + 128 + group * 32, stride, w.queries - row);
    __syncwarp();
  }
  __device__ __forceinline__ void run() {
    for (int tile = threadIdx.x; tile < w.places; tile += blockDim.x) {  // of a unit without keys nobody has waited
      wait_until(p.work.finished + w.place_of(p, tile), w.lap_of(p, tile));
    }
    start();
    for (int tile = 0; tile < w.end; ++tile) {
      float sums[48];
      take(tile, sums);
      write(tile, sums);
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    if (threadIdx.x == 0) p.work.arrived[w.place] = 0;
    __threadfence();
    __syncthreads();
    for (int tile = threadIdx.x; tile < w.places; tile += blockDim.x) {
      store_release(p.work.finished + w.place_of(p, tile), w.lap_of(p, tile) + 1);
    }
  }
};

}  // namespace dsv3
