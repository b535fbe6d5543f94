// What the kernels of low-latency mode share. Windows take turns (peers.cuh): a call may be sent while the one before is still
// received, but no two.
#pragma once

#include "../common/launch.cuh"
#include "rows.cuh"

namespace dsv3::windows {

constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;

// One half of a call: what it found of the windows when it began.
struct Half {
  WindowState* state;
  int half;  // 0 sends, 1 receives
  uint32_t epoch;
  __device__ __forceinline__ Half(const Rings& r, int way, int which)
      : state(&local_of(r, r.rank)->windows[way]), half(which), epoch(state->epoch[which]) {}
  __device__ __forceinline__ int parity() const { return epoch % 2; }
};

// All of the block waits until every rank's flag has reached `value`.
__device__ __forceinline__ bool block_wait(const Rings& r, const uint32_t* flags, uint32_t value) {
  __shared__ bool there;
  if (threadIdx.x < kWarpSize) {
    const int rank = threadIdx.x;
    const bool all = warp_wait(r, rank < r.ranks, flags + rank, value, rank);
    if (rank == 0) there = all;
  }
  __syncthreads();
  return there;
}

// Calls tell(rank) in a thread for every rank once all blocks are here: what any of them wrote is seen with a release of it.
template <class F>
__device__ __forceinline__ void finish(const Rings& r, const Half& call, F&& tell) {
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence_system();
    last = atomicAdd(&call.state->blocks[call.half], 1u) == gridDim.x - 1;
    __threadfence_system();
  }
  if (!__shfl_sync(kAllLanes, last, 0)) return;
  __syncwarp();
  if (threadIdx.x < r.ranks) tell(static_cast<int>(threadIdx.x));
  if (threadIdx.x == 0) {
    call.state->blocks[call.half] = 0;
    call.state->epoch[call.half] = call.epoch + 1;
  }
}

// The entries that came, all ranks' one after the other.
struct Entries {
  int starts[kMaxRanks + 1];
  __device__ __forceinline__ void add_up(int ranks, int count_of_lane) {  // by a warp
    const int lane = threadIdx.x % kWarpSize;
    int end = lane < ranks ? count_of_lane : 0;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += before;
    }
    if (lane == 0) starts[0] = 0;
    if (lane < ranks) starts[lane + 1] = end;
  }
  __device__ __forceinline__ int source_of(int entry, int ranks) const {
    int source = 0;
    while (source + 1 < ranks && starts[source + 1] <= entry) ++source;
    return source;
  }
};

// Columns of a piece, and how many of them: they must fit the windows.
template <class P>
void divide(const Rings& r, P& p, int bytes_of_column, int step) {
  p.piece = piece_columns(p.hidden, bytes_of_column, step);
  p.pieces = static_cast<int>(ceil_div(p.hidden, p.piece));
  DSV3_CHECK(p.pieces <= r.window_pieces, "a row has ", p.pieces, " pieces, and the windows have room for ",
             r.window_pieces);
}

inline OwnTokens own_tokens(const Rings& r, const Tensor& topk_idx, int64_t num_experts) {
  check_operand("topk_idx", topk_idx, Dtype::kInt64);
  DSV3_CHECK(topk_idx.dim() == 2 && topk_idx.size(1) >= 1 && topk_idx.size(1) <= kMaxTopk, "topk must be in 1..",
             kMaxTopk, ", got ", topk_idx);
  DSV3_CHECK(topk_idx.size(0) <= r.window_tokens, topk_idx.size(0), " tokens are more than ", r.window_tokens);
  return {.topk_idx = topk_idx.data<int64_t>(),
          .tokens = static_cast<int>(topk_idx.size(0)),
          .topk = static_cast<int>(topk_idx.size(1)),
          .local_experts = static_cast<int>(num_experts / r.ranks),
          .experts = static_cast<int>(num_experts)};
}

inline Launch of_windows(const Rings& r, size_t smem) {
  return {.grid = dim3(r.channels), .block = dim3(kThreads), .smem = smem};
}

}  // namespace dsv3::windows
