// What lies in a rank's part of the symmetric memory, and how warps send through it.
//
// A ring leads from every rank to the ranks that have its place in the other nodes, on each channel. Slots are filled in the
// sender's own memory (staging) and put from there into the same slot of the receiver's; a signal follows the data. Signals are
// 8 bytes, of which the lower half counts as the flags of the rings within a node do. A slot of either side is free once the
// receiver has said so, so nobody waits for a put. Where the receiver's memory is mapped, its slot is filled itself.
//
// In low-latency mode a rank sends to every rank of every node itself. The windows lie behind the rings, and behind them as much
// again to put from. A signal has the tokens that were sent in its upper half.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "../windows.cuh"
#include "network.h"

namespace dsv3 {

struct alignas(kLine) SymmetricLocal {
  uint32_t sent[kMaxNodes][kMaxChannels];  // items so far, to every node
  uint32_t received[kMaxNodes][kMaxChannels];
  uint64_t noticed[2][kMaxGroup];     // signals behind the notices
  Notice notices[2][kMaxGroup];       // of even and odd exchanges, from other nodes' ranks
  Notice outgoing[2][kMaxGroup];      // and to them
  uint64_t arrived[2][2][kMaxGroup];  // of the windows, [way][epoch % 2]: as of WindowState
  uint64_t taken[2][2][kMaxGroup];
};

inline __host__ __device__ int64_t far_flags(const Rings& r) {
  return static_cast<int64_t>(r.nodes) * r.channels * r.slots;
}
inline __host__ __device__ int64_t far_slots_begin(const Rings& r) {
  const int64_t end = sizeof(SymmetricLocal) + 2 * far_flags(r) * sizeof(uint64_t);
  return (end + alignof(Slot) - 1) / alignof(Slot) * alignof(Slot);
}
inline __host__ __device__ int64_t far_windows_begin(const Rings& r) {
  return far_slots_begin(r) + 2 * far_flags(r) * static_cast<int64_t>(sizeof(Slot));
}

// The lower half of a signal.
__device__ __forceinline__ const uint32_t* counted(const uint64_t* signal) {
  return reinterpret_cast<const uint32_t*>(signal);
}

struct Far : NetworkMemory {
  static constexpr bool kNodes = true;
  struct Link;

  __device__ __forceinline__ SymmetricLocal& local() const { return *reinterpret_cast<SymmetricLocal*>(base); }
  __device__ __forceinline__ uint32_t& sent(int node, int channel) const { return local().sent[node][channel]; }
  __device__ __forceinline__ uint32_t& received(int node, int channel) const { return local().received[node][channel]; }

  __device__ __forceinline__ int64_t index(const Rings& r, int node, int channel, uint32_t item) const {
    return (static_cast<int64_t>(node) * r.channels + channel) * r.slots + item % r.slots;
  }
  __device__ __forceinline__ int64_t flags(const Rings& r) const { return far_flags(r); }
  // The part of the rank that has this one's place in a node, where it is mapped.
  __device__ __forceinline__ char* mapped_in(const Rings& r, int node) const {
    return mapped[of_node(r, node, r.rank)];
  }
  __device__ __forceinline__ uint64_t* signals() const {
    return reinterpret_cast<uint64_t*>(base + sizeof(SymmetricLocal));
  }
  // Of the ring from a node, and of that to it.
  __device__ __forceinline__ const uint32_t* ready_flag(const Rings& r, int node, int channel, uint32_t item) const {
    return counted(signals() + index(r, node, channel, item));
  }
  __device__ __forceinline__ const uint32_t* done_flag(const Rings& r, int node, int channel, uint32_t item) const {
    return counted(signals() + flags(r) + index(r, node, channel, item));
  }
  __device__ __forceinline__ Slot* slots(const Rings& r, char* part) const {
    return reinterpret_cast<Slot*>(part + far_slots_begin(r));
  }
  // What has come from a node.
  __device__ __forceinline__ Slot* slot(const Rings& r, int node, int channel, uint32_t item) const {
    return slots(r, base) + index(r, node, channel, item);
  }
  // Where to put what is to go to it.
  __device__ __forceinline__ Slot* outbox(const Rings& r, int node, int channel, uint32_t item) const {
    if (char* const part = mapped_in(r, node)) return slots(r, part) + index(r, r.node, channel, item);
    return slots(r, base) + flags(r) + index(r, node, channel, item);
  }
  __device__ __forceinline__ Notice& notice(int parity, int rank) const { return local().notices[parity][rank]; }
  __device__ __forceinline__ Notice& outgoing(int parity, int rank) const { return local().outgoing[parity][rank]; }
  __device__ __forceinline__ const uint32_t* noticed(int parity, int rank) const {
    return counted(&local().noticed[parity][rank]);
  }

  // By a whole warp, which has written it: what is in the outbox to its node.
  __device__ __forceinline__ void put(const Rings& r, int node, int channel, uint32_t item, int bytes) const {
    const int64_t there = index(r, r.node, channel, item);
    if (mapped_in(r, node) != nullptr) {
      __syncwarp();
      if (threadIdx.x % kWarpSize == 0) store_release(mapped_flag(r, node, there), item + 1);
      return;
    }
    __threadfence_system();
    __syncwarp();
    nvshmemx_putmem_signal_nbi_warp(slots(r, base) + there, outbox(r, node, channel, item), bytes, signals() + there,
                                    uint64_t{item + 1}, NVSHMEM_SIGNAL_SET, pes[of_node(r, node, r.rank)]);
  }
  // A slot from that node is free again.
  __device__ __forceinline__ void tell_done(const Rings& r, int node, int channel, uint32_t item) const {
    const int64_t there = flags(r) + index(r, r.node, channel, item);
    if (mapped_in(r, node) != nullptr) return store_relaxed(mapped_flag(r, node, there), item + 1);
    nvshmemx_signal_op(signals() + there, uint64_t{item + 1}, NVSHMEM_SIGNAL_SET, pes[of_node(r, node, r.rank)]);
  }
  // The lower half of a signal in mapped memory.
  __device__ __forceinline__ uint32_t* mapped_flag(const Rings& r, int node, int64_t signal) const {
    return reinterpret_cast<uint32_t*>(mapped_in(r, node) + sizeof(SymmetricLocal) + signal * sizeof(uint64_t));
  }
  // By a whole warp: the notice to a rank, which the block has written.
  __device__ __forceinline__ void tell_notice(const Rings& r, int parity, int rank, int bytes, uint32_t value) const {
    __threadfence_system();
    __syncwarp();
    const int self = own_rank(r);
    nvshmemx_putmem_signal_nbi_warp(&local().notices[parity][self], &outgoing(parity, rank), bytes,
                                    &local().noticed[parity][self], uint64_t{value}, NVSHMEM_SIGNAL_SET, pes[rank]);
  }
};

// The ring that a lane of dispatch's sender fills, of `pieces` slots a token, of which the last has other bytes.
struct Far::Link {
  const Rings& r;
  const Far& far;
  const int node;
  const uint32_t begin;
  const int pieces, bytes, last_bytes, peer;

  __device__ __forceinline__ Link(const Rings& r, const Far& far, int node, uint32_t begin, int pieces, int bytes,
                                  int last_bytes)
      : r(r),
        far(far),
        node(node),
        begin(begin),
        pieces(pieces),
        bytes(bytes),
        last_bytes(last_bytes),
        peer(of_node(r, node, r.rank)) {}
  __device__ __forceinline__ const uint32_t* done_flag(uint32_t item) const {
    return far.done_flag(r, node, blockIdx.x, item);
  }
  __device__ __forceinline__ Slot* slot(uint32_t item) const { return far.outbox(r, node, blockIdx.x, item); }
  __device__ __forceinline__ void send(uint32_t first, int count) const {
    const bool direct = far.mapped_in(r, node) != nullptr;
    if (direct && count > 0) {
      __threadfence_system();
      for (uint32_t item = first; item != first + count; ++item) {
        store_relaxed(far.mapped_flag(r, node, far.index(r, r.node, blockIdx.x, item)), item + 1);
      }
    }
    for (unsigned left = __ballot_sync(kAllLanes, !direct && count > 0); left != 0; left &= left - 1) {
      const int lane = __ffs(left) - 1, items = __shfl_sync(kAllLanes, count, lane);
      const uint32_t start = __shfl_sync(kAllLanes, first, lane), origin = __shfl_sync(kAllLanes, begin, lane);
      for (uint32_t item = start; item != start + items; ++item) {
        const bool last = (item - origin) % pieces == pieces - 1;
        far.put(r, lane - kMaxRanks, blockIdx.x, item, last ? last_bytes : bytes);
      }
    }
  }
};

// Windows of the ranks of several nodes: as of windows::NearWindows.
struct FarWindows : NetworkMemory {
  static constexpr int kMost = kMaxGroup;
  using Mask = uint64_t;
  static_assert(kMost <= 8 * sizeof(Mask));
  using Half = windows::Half;

  static __device__ __forceinline__ int self(const Rings& r) { return own_rank(r); }
  static __device__ __forceinline__ int ranks(const Rings& r) { return group_size(r); }
  static __device__ __forceinline__ SymmetricLocal& local(char* part) {
    return *reinterpret_cast<SymmetricLocal*>(part);
  }
  __device__ __forceinline__ const uint32_t* arrived(const Rings& r, const Half& call, int rank) const {
    return counted(&local(base).arrived[call.way][call.parity()][rank]);
  }
  __device__ __forceinline__ const uint32_t* taken(const Rings& r, const Half& call, int rank) const {
    return counted(&local(base).taken[call.way][call.parity()][rank]);
  }
  __device__ __forceinline__ int count(const Rings& r, const Half& call, int rank) const {
    return __ldcg(arrived(r, call, rank) + 1);
  }
  __device__ __forceinline__ void tell_arrived(const Rings& r, const Half& call, int rank, int count) const {
    const uint64_t value = static_cast<uint64_t>(static_cast<uint32_t>(count)) << 32 | (call.epoch + 1);
    tell(local(base).arrived[call.way][call.parity()][self(r)], rank, value);
  }
  __device__ __forceinline__ void tell_taken(const Rings& r, const Half& call, int rank) const {
    tell(local(base).taken[call.way][call.parity()][self(r)], rank, call.epoch + 1);
  }
  __device__ __forceinline__ Slot* inbox(const Rings& r, const Half& call, int rank, int token, int piece) const {
    return window(r, base, call, rank, token, piece);
  }
  __device__ __forceinline__ Slot* outbox(const Rings& r, const Half& call, int rank, int token, int piece) const {
    if (mapped[rank] != nullptr) return window(r, mapped[rank], call, self(r), token, piece);
    return window(r, base + window_bytes(r), call, rank, token, piece);
  }
  template <class F>
  __device__ __forceinline__ void put(const Rings& r, const Half& call, Mask mask, F&& place_of, int piece,
                                      int bytes) const {
    Mask left = 0;
    for (Mask all = mask; all != 0; all &= all - 1) {
      if (mapped[__ffsll(all) - 1] == nullptr) left |= all & ~(all - 1);
    }
    if (left == 0) return;
    wait_bulk_stores();
    __threadfence_system();
    __syncwarp();
    for (; left != 0; left &= left - 1) {
      const int rank = __ffsll(left) - 1, place = place_of(rank);
      nvshmemx_putmem_nbi_warp(window(r, base, call, self(r), place, piece), outbox(r, call, rank, place, piece), bytes,
                               pes[rank]);
    }
  }
  __device__ __forceinline__ void settle(const Rings& r) const {
    bool all = true;
    for (int rank = threadIdx.x % kWarpSize; rank < ranks(r); rank += kWarpSize) all = all && mapped[rank] != nullptr;
    if (__all_sync(kAllLanes, all)) return;
    if (threadIdx.x % kWarpSize == 0) nvshmem_quiet();
    __syncwarp();
  }

 private:
  static __device__ __forceinline__ Slot* window(const Rings& r, char* part, const Half& call, int other, int token,
                                                 int piece) {
    return reinterpret_cast<Slot*>(part + far_windows_begin(r)) +
           window_index(r, call.way, call.parity(), other, token, piece);
  }
  // Sets a signal of a rank, whose own lies at `signal`.
  __device__ __forceinline__ void tell(uint64_t& signal, int rank, uint64_t value) const {
    if (mapped[rank] == nullptr) {
      return nvshmemx_signal_op(&signal, value, NVSHMEM_SIGNAL_SET, pes[rank]);
    }
    char* const there = mapped[rank] + (reinterpret_cast<char*>(&signal) - base);
    asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(there), "l"(value) : "memory");
  }
};

}  // namespace dsv3
