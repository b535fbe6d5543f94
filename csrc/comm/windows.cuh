// What the kernels of low-latency mode share. Windows take turns (peers.cuh): a call may be sent while the one before is still
// received, but no two. Where they lie, and how ranks tell each other of them, is a class: NearWindows here, FarWindows in
// nvshmem/network.cuh.
#pragma once

#include "../common/launch.cuh"
#include "rows.cuh"

namespace dsv3::windows {

constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;

// One half of a call: what it found of the windows when it began.
struct Half {
  WindowState* state;
  int way, half;  // kThere, kBack; 0 sends, 1 receives
  uint32_t epoch;
  __device__ __forceinline__ Half(const Rings& r, int way, int which)
      : state(&local_of(r, r.rank)->windows[way]), way(way), half(which), epoch(state->epoch[which]) {}
  __device__ __forceinline__ int parity() const { return epoch % 2; }
};

// Windows of ranks that write into each other's memory.
struct NearWindows {
  static constexpr int kMost = kMaxRanks;  // ranks
  using Mask = uint16_t;                   // a bit for every rank
  static_assert(kMost <= 8 * sizeof(Mask));

  static __device__ __forceinline__ int self(const Rings& r) { return r.rank; }
  static __device__ __forceinline__ int ranks(const Rings& r) { return r.ranks; }
  // Flags in the own memory, which a rank sets: all that it sends is there; it has taken all that was sent to it.
  __device__ __forceinline__ const uint32_t* arrived(const Rings& r, const Half& call, int rank) const {
    return &call.state->arrived[call.parity()][rank];
  }
  __device__ __forceinline__ const uint32_t* taken(const Rings& r, const Half& call, int rank) const {
    return &call.state->taken[call.parity()][rank];
  }
  // The number that came with the first.
  __device__ __forceinline__ int count(const Rings& r, const Half& call, int rank) const {
    return __ldcg(&call.state->counts[call.parity()][rank]);
  }
  __device__ __forceinline__ void tell_arrived(const Rings& r, const Half& call, int rank, int count) const {
    WindowState& there = local_of(r, rank)->windows[call.way];
    there.counts[call.parity()][r.rank] = count;
    store_release(&there.arrived[call.parity()][r.rank], call.epoch + 1);
  }
  __device__ __forceinline__ void tell_taken(const Rings& r, const Half& call, int rank) const {
    store_release(&local_of(r, rank)->windows[call.way].taken[call.parity()][r.rank], call.epoch + 1);
  }
  // What has come from a rank, and where to write what is to go to it.
  __device__ __forceinline__ Slot* inbox(const Rings& r, const Half& call, int rank, int token, int piece) const {
    return window_slot(r, r.rank, call.way, call.parity(), rank, token, piece);
  }
  __device__ __forceinline__ Slot* outbox(const Rings& r, const Half& call, int rank, int token, int piece) const {
    return window_slot(r, rank, call.way, call.parity(), r.rank, token, piece);
  }
  // By a whole warp, which has written it: what is in the outbox to its rank, from the slot's first byte on. The mask's ranks,
  // whose tokens place_of(rank) has.
  template <class F>
  __device__ __forceinline__ void put(const Rings& r, const Half& call, Mask mask, F&& place_of, int piece,
                                      int bytes) const {}
  // By a warp: all that was put has arrived.
  __device__ __forceinline__ void settle(const Rings& r) const {}
};

// All of the block waits until every rank's flag, flag_of(rank), has reached `value`.
template <class Net, class F>
__device__ __forceinline__ bool block_wait(const Rings& r, F&& flag_of, uint32_t value) {
  __shared__ bool there;
  if (threadIdx.x < kWarpSize) {
    bool all = true;
#pragma unroll
    for (int first = 0; first < Net::kMost; first += kWarpSize) {
      const int rank = first + static_cast<int>(threadIdx.x);
      const bool wants = rank < Net::ranks(r);
      all = all && warp_wait(r, wants, flag_of(wants ? rank : 0), value, rank);
    }
    if (threadIdx.x == 0) there = all;
  }
  __syncthreads();
  return there;
}

// Calls tell(rank) in a thread for every rank once all blocks are here: what any of them wrote is seen with what it tells.
template <class Net, class F>
__device__ __forceinline__ void finish(const Rings& r, const Net& net, const Half& call, F&& tell) {
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
  if (call.half == 0) net.settle(r);
  for (int rank = threadIdx.x; rank < Net::ranks(r); rank += kWarpSize) tell(rank);
  if (threadIdx.x == 0) {
    call.state->blocks[call.half] = 0;
    call.state->epoch[call.half] = call.epoch + 1;
  }
}

// The entries that came, all ranks' one after the other.
template <class Net>
struct Entries {
  int starts[Net::kMost + 1];
  template <class F>
  __device__ __forceinline__ void add_up(int ranks, F&& count_of) {  // by a warp
    const int lane = threadIdx.x % kWarpSize;
    int before = 0;
    if (lane == 0) starts[0] = 0;
#pragma unroll
    for (int first = 0; first < Net::kMost; first += kWarpSize) {
      int end = first + lane < ranks ? count_of(first + lane) : 0;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int further = __shfl_up_sync(kAllLanes, end, step);
        if (lane >= step) end += further;
      }
      if (first + lane < ranks) starts[first + lane + 1] = before + end;
      before += __shfl_sync(kAllLanes, end, kWarpSize - 1);
    }
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
          .local_experts = static_cast<int>(num_experts / group_size(r)),
          .experts = static_cast<int>(num_experts)};
}

inline Launch of_windows(const Rings& r, size_t smem) {
  return {.grid = dim3(r.channels), .block = dim3(kThreads), .smem = smem};
}

}  // namespace dsv3::windows
