// What lies in a rank's memory, and how ranks wait for each other.
//
// A ring is a queue of slots of one piece of a row each: the sender fills slot n % slots with item n and then sets its
// `ready` flag, in the receiver's memory, to n + 1; the receiver takes it and then sets the `done` flag, in the sender's
// memory, to n + 1. Both count on from call to call, in device memory, so that a graph can be replayed; nobody reads
// another's memory, and every wait is on one's own. Numbers may wrap.
//
// All ranks have the same number of blocks, one a channel, and token t travels on channel t % channels, in the order of
// the tokens. All blocks of a rank must be resident at once.
//
// Of several nodes, a rank exchanges tokens of its own with the ranks that have its place in other nodes, over the network,
// and these pass them on in their nodes, in rings of the same kind: one for each node from which tokens come.
#pragma once

#include "../common/launch.cuh"
#include "../common/vector.cuh"
#include "peers.h"

namespace dsv3 {

constexpr int kMaxChannels = 132;
constexpr int kMaxTopk = 16;
constexpr int kMaxCommExperts = 1024;
constexpr int kPieceBytes = 8192;               // of a row in a slot
constexpr int kPieceTiles = kPieceBytes / 128;  // scales of a piece in FP8
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kLine = 128;  // bytes of the cache: what one writes and another polls shares none with what others write

// Makes a device current; the host functions of kernels have a tensor to take it from.
class Current {
 public:
  explicit Current(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~Current() { cudaSetDevice(previous_); }

 private:
  int previous_ = 0;
};

// What travels with a piece: all pairs of the token, by rank, then by row: the row at that rank, and a number.
struct Meta {
  int token;
  int rows[kMaxTopk];
  float weights[kMaxTopk];
  uint8_t ranks[kMaxTopk];  // kNoRank behind the last
};
constexpr uint8_t kNoRank = 255;

// Bulk copies bring it from the top to the last byte in use.
struct alignas(kLine) Slot {
  Meta meta;
  alignas(16) float sf[kPieceTiles];
  alignas(128) uint4 data[kPieceBytes / 16];
};

// What a rank tells all others before a dispatch.
constexpr int kHeadInts = 8;
struct alignas(16) Notice {
  int head[kHeadInts];
  int arrivals[kMaxChannels];   // tokens for the reader of this notice
  int relayed[kMaxChannels];    // tokens for its node
  int counts[kMaxCommExperts];  // pairs for every expert
};

// Low-latency mode has windows instead of rings: a slot for every token of every rank, twice, so that a call can be under way
// while the one before is still received. What a rank knows and is told of them, for the ways there and back:
constexpr int kMaxWindowTokens = 1024;
enum : int { kThere, kBack };
struct alignas(kLine) WindowState {
  uint32_t epoch[2];                              // calls that have been sent, received
  uint32_t blocks[2];                             // that are done with the call, of either half
  alignas(kLine) uint32_t arrived[2][kMaxRanks];  // [epoch % 2]: epoch + 1, from every rank, once all it sends is there
  alignas(kLine) uint32_t counts[2][kMaxRanks];   // tokens that it sent
  alignas(kLine) uint32_t taken[2][kMaxRanks];  // epoch + 1, from every rank, once it has taken all that was sent to it
};

// A rank's memory: `Local`, then flags and slots of the rings, each [ring][channel][slot]; a ring is called by the node whose
// tokens it carries and by its other side's place in this node, in one number as of the group's ranks.
struct alignas(kLine) Local {
  uint32_t failed;                                // a wait was given up: nothing is to be waited for any more
  uint32_t epoch;                                 // exchanges so far
  uint32_t sent[kMaxGroup][kMaxChannels];         // items so far, on every ring that leads away
  uint32_t received[kMaxGroup][kMaxChannels];     // and on every ring that leads here
  alignas(kLine) uint32_t noticed[2][kMaxRanks];  // flags of the notices
  WindowState windows[2];                         // there and back
  Notice notices[2][kMaxRanks];                   // of even and odd exchanges, from the ranks of this node
};

// What leads to other nodes, for kernels of one node: nothing (of several: nvshmem/network.cuh).
struct OneNode {
  static constexpr bool kNodes = false;
};

// Of one node alone (kNodes false) ranks and rings are its places.
template <bool kNodes = true>
__host__ __device__ inline int group_size(const Rings& r) {
  return kNodes ? r.nodes * r.ranks : r.ranks;
}
// A rank of the group, or a ring: see Local.
template <bool kNodes = true>
__host__ __device__ inline int of_node(const Rings& r, int node, int place) {
  return kNodes ? node * r.ranks + place : place;
}
template <bool kNodes = true>
__host__ __device__ inline int own_rank(const Rings& r) {
  return of_node<kNodes>(r, r.node, r.rank);
}
template <bool kNodes = true>
__host__ __device__ inline int node_of(const Rings& r, int ring) {
  return kNodes ? ring / r.ranks : 0;
}

__host__ __device__ inline int64_t ring_flags(const Rings& r) {
  return static_cast<int64_t>(group_size(r)) * r.channels * r.slots;
}
__host__ __device__ inline int64_t slots_begin(const Rings& r) {
  const int64_t end = sizeof(Local) + 2 * ring_flags(r) * sizeof(uint32_t);
  return (end + alignof(Slot) - 1) / alignof(Slot) * alignof(Slot);
}
__host__ __device__ inline int64_t windows_begin(const Rings& r) {
  return slots_begin(r) + ring_flags(r) * static_cast<int64_t>(sizeof(Slot));
}
// A rank's windows: [way][epoch % 2][rank of the other side][token][piece]. Those of several nodes lie elsewhere.
template <bool kNodes = true>
__host__ __device__ inline int64_t window_index(const Rings& r, int way, int parity, int other, int token, int piece) {
  const int64_t row =
      (static_cast<int64_t>(way * 2 + parity) * group_size<kNodes>(r) + other) * r.window_tokens + token;
  return row * r.window_pieces + piece;
}
__host__ __device__ inline int64_t window_bytes(const Rings& r) {
  return window_index(r, 2, 0, 0, 0, 0) * static_cast<int64_t>(sizeof(Slot));
}
inline int64_t peer_bytes(const Rings& r) { return windows_begin(r) + (r.nodes == 1 ? window_bytes(r) : 0); }

__device__ __forceinline__ Local* local_of(const Rings& r, int rank) { return reinterpret_cast<Local*>(r.base[rank]); }
__device__ __forceinline__ int64_t ring_index(const Rings& r, int ring, int channel, uint32_t item) {
  return (static_cast<int64_t>(ring) * r.channels + channel) * r.slots + item % r.slots;
}
// In the memory of `owner`, a place of this node: of a ring that leads there (ready, slot), or from there (done).
__device__ __forceinline__ uint32_t* ready_flag(const Rings& r, int owner, int ring, int channel, uint32_t item) {
  return reinterpret_cast<uint32_t*>(r.base[owner] + sizeof(Local)) + ring_index(r, ring, channel, item);
}
__device__ __forceinline__ uint32_t* done_flag(const Rings& r, int owner, int ring, int channel, uint32_t item) {
  return ready_flag(r, owner, ring, channel, item) + ring_flags(r);
}
__device__ __forceinline__ Slot* ring_slot(const Rings& r, int owner, int ring, int channel, uint32_t item) {
  return reinterpret_cast<Slot*>(r.base[owner] + slots_begin(r)) + ring_index(r, ring, channel, item);
}

__device__ __forceinline__ Slot* window_slot(const Rings& r, int owner, int way, int parity, int other, int token,
                                             int piece) {
  return reinterpret_cast<Slot*>(r.base[owner] + windows_begin(r)) +
         window_index<false>(r, way, parity, other, token, piece);
}

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// For `done` flags: what was loaded from a slot has arrived by then, and nothing that was written has to be seen with them.
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
__device__ __forceinline__ uint64_t now_ns() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// A lane has waited for `ns`, if `late` for `peer`: tells the host after a second, and whether to give up, which then holds for
// this and all later kernels.
inline __device__ __noinline__ bool wait_longer(const Rings& r, bool late, uint64_t ns, int peer) {
  constexpr uint64_t kLong = 1000000000;
  uint32_t* const failed = &local_of(r, r.rank)->failed;
  if (late && ns > kLong) {
    volatile Waiting* const waiting = r.waiting;
    waiting->long_wait = 1;
    if (ns > r.timeout_ns && waiting->lost == 0) waiting->lost = peer + 1;
    if (waiting->lost != 0) atomicExch(failed, 1u);
  }
  return *static_cast<volatile uint32_t*>(failed) == 0;
}

__device__ __forceinline__ bool reached(const uint32_t* flag, uint32_t value) {
  return static_cast<int32_t>(load_relaxed(flag) - value) >= 0;
}

constexpr int kPolls = 256;  // between two looks at the clock

// Lanes that have `wants` wait until their flag has reached `value`; false, for the whole warp, where one gave up; peer: of the
// group, whom they wait for.
// After it the warp sees what the peers wrote before, unless kRoom: then it may write where they have read.
template <bool kRoom = false>
__device__ __forceinline__ bool warp_wait(const Rings& r, bool wants, const uint32_t* flag, uint32_t value, int peer) {
  uint64_t start = 0;
  for (int polls = 1;; ++polls) {
    const bool there = !wants || reached(flag, value);
    if (__all_sync(kAllLanes, there)) {
      if (!kRoom && wants) load_acquire(flag);  // once: each empties the L1 cache
      __syncwarp();                             // a lane may read what another has waited for
      return true;
    }
    if (polls % kPolls != 0) continue;
    const uint64_t now = now_ns();
    if (start == 0) start = now;
    if (!__all_sync(kAllLanes, wait_longer(r, !there, now - start, peer))) return false;
  }
}

// The same until the flag of any has: those lanes; none where one gave up. (One loop for both, with the clock in a struct, cost
// comm_combine 3%.)
__device__ __forceinline__ unsigned warp_wait_any(const Rings& r, bool wants, const uint32_t* flag, uint32_t value,
                                                  int peer) {
  uint64_t start = 0;
  for (int polls = 1;; ++polls) {
    const bool there = wants && reached(flag, value);
    const unsigned found = __ballot_sync(kAllLanes, there);
    if (found != 0) {
      if (there) load_acquire(flag);
      __syncwarp();
      return found;
    }
    if (polls % kPolls != 0) continue;
    const uint64_t now = now_ns();
    if (start == 0) start = now;
    if (!__all_sync(kAllLanes, wait_longer(r, wants, now - start, peer))) return 0;
  }
}

// Whether a wait has been given up before; the same for all threads of the block.
__device__ __forceinline__ bool has_failed(const Rings& r) {
  return __syncthreads_or(*static_cast<volatile uint32_t*>(&local_of(r, r.rank)->failed) != 0);
}

// What a kernel gives that gave up waiting: NaN in e4m3, bf16 and fp32. By each of its blocks that did, for all of them: others may
// have had nothing to wait for.
constexpr unsigned kNanWord = 0x7fff7fffu;
__device__ __forceinline__ void fill_nan(void* begin, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) static_cast<unsigned*>(begin)[i] = kNanWord;
}

// Where a rank's own tokens go. Ranks hold equal runs of experts.
struct OwnTokens {
  const int64_t* topk_idx;  // [tokens, topk]
  int tokens, topk, local_experts, experts;

  // Of a pair; the nearest that there is.
  __device__ __forceinline__ int expert(int64_t pair) const {
    return static_cast<int>(min(max(topk_idx[pair], int64_t{0}), int64_t{experts - 1}));
  }
  __device__ __forceinline__ int rank_of(int expert) const {
    return static_cast<int>(static_cast<unsigned>(expert) / static_cast<unsigned>(local_experts));
  }
  // To the rank of an expert leads the way of its place in this node; from kMaxRanks on are those to other nodes.
  template <bool kNodes>
  __device__ __forceinline__ int way_to(const Rings& r, int expert) const {
    const int rank = rank_of(expert);
    if constexpr (!kNodes) return rank;
    const int node = rank / r.ranks;
    return node == r.node ? rank - node * r.ranks : kMaxRanks + node;
  }
  // A bit for every way that a token takes.
  template <bool kNodes>
  __device__ __forceinline__ unsigned ways(const Rings& r, int64_t token) const {
    unsigned found = 0;
    for (int j = 0; j < topk; ++j) found |= 1u << way_to<kNodes>(r, expert(token * topk + j));
    return found;
  }
  // A bit for every rank of the group that a token goes to.
  template <class Mask>
  __device__ __forceinline__ Mask ranks(int64_t token) const {
    Mask found = 0;
    for (int j = 0; j < topk; ++j) found |= static_cast<Mask>(Mask{1} << rank_of(expert(token * topk + j)));
    return found;
  }
};
constexpr unsigned kNearWays = (1u << kMaxRanks) - 1;  // to this node's ranks
static_assert(kMaxRanks + kMaxNodes <= 32);

// In lane i, which of the 32 lanes' masks have bit i, of `ways` bits.
__device__ __forceinline__ unsigned users_of_lane(unsigned mask, int ways) {
  unsigned users = 0;
  for (int way = 0; way < ways; ++way) {
    const unsigned of_way = __ballot_sync(kAllLanes, mask >> way & 1);
    if (threadIdx.x % kWarpSize == way) users = of_way;
  }
  return users;
}

// Calls f(token, mask of the ways that it takes, item) with this warp's share of the channel's tokens in their order, a
// token's turn being that of its place among them; in lane i, item counts what goes way i from `next` on, `pieces` a
// token. Returns the count after all tokens, whosever they are. Ways that are not in `served` are left out of masks and counts.
template <bool kNodes, class F>
__device__ __forceinline__ uint32_t for_own_tokens(const Rings& r, const OwnTokens& own, int pieces, uint32_t next,
                                                   int warp, int warps, unsigned served, F&& f) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  for (int first = channel; first < own.tokens; first += kWarpSize * r.channels) {
    const int token = first + lane * r.channels;
    const unsigned ways = token < own.tokens ? own.ways<kNodes>(r, token) & served : 0;
    const unsigned users = users_of_lane(ways, kNodes ? kMaxRanks + r.nodes : r.ranks);
    for (int i = warp; i < kWarpSize && first + i * r.channels < own.tokens; i += warps) {
      const unsigned mask = __shfl_sync(kAllLanes, ways, i);
      if (!f(first + i * r.channels, mask, next + __popc(users & ((1u << i) - 1)) * pieces)) return next;
    }
    next += __popc(users) * pieces;
  }
  return next;
}

// A row of `columns` values of `size` bytes in pieces that fit a slot: as many columns in each but the last, a multiple of
// `step` where there are several.
inline int piece_columns(int64_t columns, int size, int step) {
  const int64_t pieces = ceil_div(columns * size, kPieceBytes);
  return static_cast<int>(pieces <= 1 ? columns : ceil_div(ceil_div(columns, pieces), step) * step);
}

}  // namespace dsv3
