// The way back: every rank sums a token's rows, the token's own rank sums what the ranks send.
//
//   out[t] = sum over nodes of (sum over their ranks of (sum over the token's rows there))
//
// each in fp32, ascending, with one rounding to the dtype of the sums. Most of a block's warps read a token's rows
// and write their sum to a slot of its rank's ring; the owners wait for a token's slots of all its ranks and add them.
// All of them take the tokens of a channel in the same order, so the first token that is not finished always can be.
//
// Of several nodes, a token's sums of another node go to the rank that has there the place of its rank here. Relays add them
// there, each for one node, and put the node's sum into the ring that leads to that.
//
// Bytes that count: every row read once, out written once; between them each (token, rank) passes a slot in the L2 cache.
#pragma once

#include "../ops.h"
#include "sums.cuh"

namespace dsv3::combining {

template <bool kNodes>
struct Roles {  // warps: the first are producers
  static constexpr int kWarps = kNodes ? 20 : 24;
  static constexpr int kOwners = kNodes ? 5 : 6;
  static constexpr int kRelays = kNodes ? 4 : 0;  // or one for each of more other nodes

  static __device__ __forceinline__ int relays(const Rings& r) { return kNodes ? max(kRelays, r.nodes - 1) : 0; }
  static __device__ __forceinline__ int producers(const Rings& r) { return kWarps - kOwners - relays(r); }
  // Of them those for tokens of the own node, the first. The others fill rings to relays, so neither waits for the other's room.
  static __device__ __forceinline__ int near_producers(const Rings& r) {
    return kNodes ? max(producers(r) / r.nodes, 1) : producers(r);
  }
};
static_assert(Roles<true>::kWarps - Roles<true>::kOwners > kMaxNodes);

struct CombineParams {
  OwnTokens own;
  void* out;                 // [T, H]
  float* weights;            // [T, k], or null: what row_weights hold of the own pairs
  const void* rows;          // [R, H]
  const float* row_weights;  // [R]
  bool weighted;             // whether there are such, also for a rank that only passes them on
  const int64_t*
      position;  // [N * max_tokens, k]: rows ascending; R first for a token that did not come, beyond R for none
  const int*
      relay;  // [nodes, max_tokens]: a bit for every rank of this node that has rows of a token passed on; or null
  int num_rows, max_tokens;
  int hidden, piece, pieces;  // columns
  int ranks_per_node;
};

// Ranks of the group, as bits, and what lanes know of 32 of them each.
template <bool kNodes>
struct Ranks {
  static constexpr int kWords = kNodes ? kMaxGroup / 32 : 1;
  using Mask = std::conditional_t<kNodes, unsigned long long, unsigned>;

  static __device__ __forceinline__ int lowest(Mask mask) {
    if constexpr (kNodes) return __ffsll(mask) - 1;
    return __ffs(mask) - 1;
  }
  static __device__ __forceinline__ Mask all(int count) {
    return count == kWords * 32 ? ~Mask{0} : (Mask{1} << count) - 1;
  }
  template <class T>
  static __device__ __forceinline__ T of(const T (&values)[kWords], int rank) {
    T value = __shfl_sync(kAllLanes, values[0], rank % 32);
    if constexpr (kNodes) {
      const T other = __shfl_sync(kAllLanes, values[1], rank % 32);
      if (rank >= 32) value = other;
    }
    return value;
  }
};

// A token's rows, which lanes hold, in pieces to the ring of its rank, or of the one in this node that relays them.
template <bool kNodes, class Y, class S>
__device__ __forceinline__ bool send_sum(const Rings& r, const CombineParams& p, int source, int token, int piece,
                                         uint32_t item, uint4* memory) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  const int64_t at = (static_cast<int64_t>(source) * p.max_tokens + token) * p.own.topk + lane;
  const int64_t found = lane < p.own.topk ? p.position[at] : p.num_rows;
  const int node = node_of<kNodes>(r, source), place = source - node * r.ranks;
  const int ring = of_node<kNodes>(r, node, r.rank);
  if (!warp_wait<true>(r, true, done_flag(r, r.rank, source, channel, item), item + 1 - r.slots,
                       of_node<kNodes>(r, r.node, place))) {
    return false;
  }
  const bool live = found < p.num_rows, dropped = __any_sync(kAllLanes, found > p.num_rows);
  const int count = __popc(__ballot_sync(kAllLanes, live));
  [[maybe_unused]] const unsigned wanted = kNodes ? __ballot_sync(kAllLanes, found != p.num_rows) : 0;
  const int begin = piece * p.piece;
  const Y* const row = static_cast<const Y*>(p.rows) + (live ? found : 0) * p.hidden + begin;
  Slot* const slot = ring_slot(r, place, ring, channel, item);
  if (p.weighted && piece == 0 && lane < p.own.topk) {
    slot->meta.weights[lane] = live ? p.row_weights[found] : __uint_as_float(0x7fffffffu);
  }
  if constexpr (kNodes) {  // who joins them asks how many there are
    if (lane == 0) slot->meta.token = __popc(wanted);
  }
  const int columns = min(p.piece, p.hidden - begin);
  if (dropped) {
    for (int v = lane; v < columns * static_cast<int>(sizeof(S)) / 16; v += kWarpSize) {
      slot->data[v] = make_uint4(kNanWord, kNanWord, kNanWord, kNanWord);
    }
  } else {
    sum_rows<false, Y, S>(reinterpret_cast<S*>(slot->data), columns, row, count, 0, memory);
  }
  __syncwarp();
  if (lane == 0) store_release(ready_flag(r, place, ring, channel, item), item + 1);
  return true;
}

// Sums of tokens of the ranks in `served`, one node or several; the work of `parts` warps, of which this is one.
// Lane i counts, in word w, the ring of rank 32 w + i from `next` on, which holds the counts of all ranks at the end.
template <bool kNodes, class Y, class S>
__device__ __forceinline__ void produce(const Rings& r, const CombineParams& p, typename Ranks<kNodes>::Mask served,
                                        int part, int parts, uint32_t (&next)[Ranks<kNodes>::kWords], uint4* memory) {
  using Set = Ranks<kNodes>;
  using Mask = typename Set::Mask;
  constexpr int kWords = Set::kWords;
  const int lane = threadIdx.x % kWarpSize, group = group_size<kNodes>(r), self = own_rank<kNodes>(r);
  int items = 0;  // of all rings, in turn one a warp
  for (int first = blockIdx.x; first < p.max_tokens; first += kWarpSize * r.channels) {
    const int token = first + lane * r.channels;
    Mask from = 0;  // the ranks from which the lane's token came
    for (int source = 0; token < p.max_tokens && source < group; ++source) {
      const int64_t at = (static_cast<int64_t>(source) * p.max_tokens + token) * p.own.topk;
      from |= static_cast<Mask>(p.position[at] != p.num_rows) << source;
    }
    unsigned came[kWords];  // of the 32 tokens of a rank
#pragma unroll
    for (int w = 0; w < kWords; ++w)
      came[w] = users_of_lane(static_cast<unsigned>(from >> 32 * w), min(group - 32 * w, 32));
    for (int i = 0; i < kWarpSize; ++i) {
      Mask sources = 0;
      uint32_t item[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        sources |= static_cast<Mask>(__ballot_sync(kAllLanes, came[w] >> i & 1)) << 32 * w;
        item[w] = next[w] + __popc(came[w] & ((1u << i) - 1)) * p.pieces;
      }
      if constexpr (kNodes) sources &= served;
      const Mask turned = sources >> self | sources << 1 << (group - self - 1);  // not all ranks begin with the same
      for (int piece = 0; piece < p.pieces; ++piece) {
        for (Mask left = turned & Set::all(group); left != 0; left &= left - 1) {
          if (items++ % parts != part) continue;
          const int source = (Set::lowest(left) + self) % group;
          const uint32_t of_source = Set::of(item, source) + piece;
          if (!send_sum<kNodes, Y, S>(r, p, source, first + i * r.channels, piece, of_source, memory)) return;
        }
      }
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) next[w] += __popc(came[w]) * p.pieces;
  }
}

// What the slots of the ranks in `mask` hold of weights, one behind the other.
__device__ __forceinline__ void join_weights(float* weights, unsigned mask, const Slot* slot) {
  const int lane = threadIdx.x % kWarpSize;
  const int count = mask >> lane & 1 ? __ldcg(&slot->meta.token) : 0;
  int begin = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int rank = __ffs(left) - 1, of_rank = __shfl_sync(kAllLanes, count, rank);
    if (lane > rank) begin += of_rank;
  }
  for (int j = 0; j < count; ++j) weights[begin + j] = __ldcg(&slot->meta.weights[j]);
}

// Sums of this node's ranks, of tokens of `node`, to the ring of their rank's node; the work of `parts` warps, of which this is one.
// Lane i counts the ring of rank i from `next` on; returns the counts at the end, and moves `sent` to its own.
template <class S, class Far>
__device__ __forceinline__ uint32_t relay(const Rings& r, const Far& far, const CombineParams& p, int node, int part,
                                          int parts, uint32_t next, uint32_t& sent, uint4* memory) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x, ring = of_node(r, node, lane);
  int items = 0;
  for (int first = channel; first < p.max_tokens; first += kWarpSize * r.channels) {
    const int token = first + lane * r.channels;
    const unsigned ranks = token < p.max_tokens ? p.relay[node * p.max_tokens + token] : 0;
    const unsigned users = users_of_lane(ranks, r.ranks), tokens = __ballot_sync(kAllLanes, ranks != 0);
    for (unsigned left = tokens; left != 0; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const unsigned mask = __shfl_sync(kAllLanes, ranks, i), before = (1u << i) - 1;
      const bool used = mask >> lane & 1;
      for (int piece = 0; piece < p.pieces; ++piece) {
        if (items++ % parts != part) continue;
        const uint32_t item = next + __popc(users & before) * p.pieces + piece;
        const uint32_t away = sent + __popc(tokens & before) * p.pieces + piece;
        if (!warp_wait(r, used, ready_flag(r, r.rank, used ? ring : 0, channel, item), item + 1,
                       of_node(r, r.node, lane)) ||
            !warp_wait<true>(r, true, far.done_flag(r, node, channel, away), away + 1 - r.slots,
                             of_node(r, node, r.rank))) {
          return next;
        }
        const Slot* const slot = used ? ring_slot(r, r.rank, ring, channel, item) : nullptr;
        Slot* const out = far.outbox(r, node, channel, away);
        const Parts from = parts_of(r.ranks, mask, slot);
        const int columns = min(p.piece, p.hidden - piece * p.piece);
        sum_rows<false, S, S>(reinterpret_cast<S*>(out->data), columns, reinterpret_cast<const S*>(from.slot->data),
                              __popc(mask), 0, memory);
        if (p.weighted && piece == 0) join_weights(out->meta.weights, mask, slot);
        __syncwarp();
        if (used) store_relaxed(done_flag(r, lane, of_node(r, node, r.rank), channel, item), item + 1);
        far.put(r, node, channel, away, static_cast<int>(offsetof(Slot, data) + columns * sizeof(S)));
      }
    }
    next += __popc(users) * p.pieces;
    sent += __popc(tokens) * p.pieces;
  }
  return next;
}

// What row_weights hold of the token's pairs: each from the slot of its way, where they stand by expert.
template <bool kNodes>
__device__ __forceinline__ void take_weights(const Rings& r, const CombineParams& p, int64_t token, const Slot* slot) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t at = token * p.own.topk + lane;
  const int expert = lane < p.own.topk ? p.own.expert(at) : -1;
  const int way = expert >= 0 ? p.own.way_to<kNodes>(r, expert) : -1;
  int place = 0;
  for (int j = 0; j < p.own.topk; ++j) {
    const int other = __shfl_sync(kAllLanes, expert, j);
    if (__shfl_sync(kAllLanes, way, j) == way && (other < expert || (other == expert && j < lane))) ++place;
  }
  const Slot* const from =
      reinterpret_cast<const Slot*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), max(way, 0)));
  if (expert >= 0) p.weights[at] = __ldcg(&from->meta.weights[place]);
}

// Lane i counts what comes on way i from `next` on; returns the count at the end. kNested: sums of nodes are rounded.
template <bool kNested, class Y, class S, class Far>
__device__ __forceinline__ uint32_t own(const Rings& r, const Far& far, const CombineParams& p, int warp, uint32_t next,
                                        uint4* memory) {
  constexpr bool kNodes = Far::kNodes;
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  const int node = kNodes ? min(max(lane - kMaxRanks, 0), r.nodes - 1) : 0;
  const bool near = !kNodes || lane < kMaxRanks;
  const int ring = of_node<kNodes>(r, r.node, lane), peer = near ? ring : of_node(r, node, r.rank);
  const auto ready = [&](uint32_t item) {
    if constexpr (kNodes) {
      if (!near) return far.ready_flag(r, node, channel, item);
    }
    return static_cast<const uint32_t*>(ready_flag(r, r.rank, ring, channel, item));
  };
  const auto slot_of = [&](uint32_t item) {
    if constexpr (kNodes) {
      if (!near) return static_cast<const Slot*>(far.slot(r, node, channel, item));
    }
    return static_cast<const Slot*>(ring_slot(r, r.rank, ring, channel, item));
  };
  return for_own_tokens<kNodes>(
      r, p.own, p.pieces, next, warp, Roles<kNodes>::kOwners, kAllLanes, [&](int token, unsigned mask, uint32_t item) {
        const bool used = mask >> lane & 1;
        for (int piece = 0; piece < p.pieces; ++piece, ++item) {
          if (!warp_wait(r, used, ready(item), item + 1, peer)) return false;
          const Slot* const slot = used ? slot_of(item) : nullptr;
          const int begin = piece * p.piece;
          Y* const out = static_cast<Y*>(p.out) + static_cast<int64_t>(token) * p.hidden + begin;
          const Parts parts = kNodes ? parts_of_ways(r, mask, slot) : parts_of(p.ranks_per_node, mask, slot);
          const S* const part = reinterpret_cast<const S*>(parts.slot->data);
          sum_rows<kNested, S, S>(out, min(p.piece, p.hidden - begin), part, __popc(mask), parts.ends, memory);
          if (p.weights != nullptr && piece == 0) take_weights<kNodes>(r, p, token, slot);
          __syncwarp();
          if (used && near) store_relaxed(done_flag(r, lane, own_rank<kNodes>(r), channel, item), item + 1);
          if constexpr (kNodes) {
            if (used && !near) far.tell_done(r, node, channel, item);
          }
        }
        return true;
      });
}

// A rank was waited for in vain.
template <class Y>
__device__ __forceinline__ void spoil(const CombineParams& p) {
  fill_nan(p.out, static_cast<int64_t>(p.own.tokens) * p.hidden * sizeof(Y));
  if (p.weights != nullptr) fill_nan(p.weights, p.own.tokens * p.own.topk * sizeof(float));
}

// What the warps of a block do, of one node; false where a rank was waited for in vain.
template <bool kNested, class Y, class S>
__device__ __forceinline__ bool work(const Rings& r, const OneNode& one, const CombineParams& p, int warp,
                                     uint4* memory) {
  Local* const local = local_of(r, r.rank);
  const int lane = threadIdx.x % kWarpSize, owner = warp - Roles<false>::producers(r);
  uint32_t* const counter =
      owner < 0 ? &local->sent[lane % kMaxRanks][blockIdx.x] : &local->received[lane % kMaxRanks][blockIdx.x];
  uint32_t next[1] = {lane < r.ranks ? *counter : 0};
  if (owner < 0) {
    produce<false, Y, S>(r, p, Ranks<false>::all(r.ranks), warp, Roles<false>::producers(r), next, memory);
  } else {
    next[0] = own<kNested, Y, S>(r, one, p, owner, next[0], memory);
  }
  if (has_failed(r)) return false;
  if (lane < r.ranks && (warp == 0 || owner == 0)) *counter = next[0];
  return true;
}

// The same of several.
template <bool kNested, class Y, class S, class Far>
__device__ __forceinline__ bool work(const Rings& r, const Far& far, const CombineParams& p, int warp, uint4* memory) {
  using Warps = Roles<true>;
  constexpr int kWords = Ranks<true>::kWords;
  Local* const local = local_of(r, r.rank);
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x, owner = warp - Warps::producers(r);
  const int group = group_size(r), others = r.nodes - 1, parts = Warps::relays(r) / others;
  const int relayer = owner - Warps::kOwners, place = relayer / parts, node = place + (place >= r.node);
  uint32_t *counters[kWords] = {}, next[kWords] = {}, sent = 0;
  if (owner < 0) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      if (lane + 32 * w < group) counters[w] = &local->sent[lane + 32 * w][channel];
    }
  } else if (relayer < 0) {
    const int far_node = lane - kMaxRanks;
    if (lane < r.ranks) counters[0] = &local->received[of_node(r, r.node, lane)][channel];
    if (far_node >= 0 && far_node < r.nodes) counters[0] = &far.received(far_node, channel);
  } else if (place < others && lane < r.ranks) {
    counters[0] = &local->received[of_node(r, node, lane)][channel];
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if (counters[w] != nullptr) next[w] = *counters[w];
  }
  if (owner < 0) {
    const int count = Warps::near_producers(r);
    const bool near = warp < count;
    const auto home = Ranks<true>::all(r.ranks) << of_node(r, r.node, 0);
    produce<true, Y, S>(r, p, near ? home : ~home, near ? warp : warp - count,
                        near ? count : Warps::producers(r) - count, next, memory);
  } else if (relayer < 0) {
    next[0] = own<kNested, Y, S>(r, far, p, owner, next[0], memory);
  } else if (place < others) {
    sent = far.sent(node, channel);
    next[0] = relay<S>(r, far, p, node, relayer % parts, parts, next[0], sent, memory);
  }
  if (has_failed(r)) return false;
  const bool first =
      warp == 0 || owner == 0 || (relayer >= 0 && relayer % parts == 0);  // of those that counted the same
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    if (first && counters[w] != nullptr) *counters[w] = next[w];
  }
  if (first && relayer >= 0 && place < others && lane == 0) far.sent(node, channel) = sent;
  return true;
}

template <bool kNested, class Y, class S, class Far>
__global__ void __launch_bounds__(Roles<Far::kNodes>::kWarps* kWarpSize, 1)
    combine_kernel(const __grid_constant__ Rings r, const __grid_constant__ Far far,
                   const __grid_constant__ CombineParams p) {
  extern __shared__ uint4 memory[];  // [warp][kWarpBytes / 16]
  wait_for_inputs();
  const int warp = threadIdx.x / kWarpSize;
  if (has_failed(r) || !work<kNested, Y, S>(r, far, p, warp, memory + warp * (kWarpBytes / 16))) spoil<Y>(p);
}

// As of comm_combine (ops.h).
struct CombineTensors {
  Tensor out;
  std::optional<Tensor> weights;
  Tensor rows;
  std::optional<Tensor> row_weights;
  Tensor topk_idx, position;
  std::optional<Tensor> relay;
};

// comm_combine, on the rings of a node and what leads to others.
template <class Far>
void combine(const CombineTensors& t, int64_t num_experts, int64_t ranks_per_node, bool fp32_sums, const Rings& r,
             const Far& far, cudaStream_t stream) {
  constexpr bool kNodes = Far::kNodes;
  const auto& [out, weights, rows, row_weights, topk_idx, position, relay] = t;
  const int group = group_size(r);
  DSV3_CHECK(out.dim() == 2 && rows.dim() == 2 && topk_idx.dim() == 2 && position.dim() == 2,
             "out and rows must be (tokens, hidden), got ", out, " and ", rows);
  const int64_t tokens = out.size(0), hidden = out.size(1), topk = topk_idx.size(1), num_rows = rows.size(0);
  DSV3_CHECK(topk >= 1 && topk <= kMaxTopk, "topk must be in 1..", kMaxTopk, ", got ", topk);
  DSV3_CHECK(position.size(0) % group == 0, "position must have as many rows for every rank, got ", position);
  check_operand("out", out, out.dtype());
  check_operand("rows", rows, out.dtype(), num_rows, hidden);
  check_operand("topk_idx", topk_idx, Dtype::kInt64, tokens, topk);
  check_operand("position", position, Dtype::kInt64, position.size(0), topk);
  DSV3_CHECK(weights.has_value() == row_weights.has_value(), "weights and row_weights go together");
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, tokens, topk);
  if (row_weights) check_operand("row_weights", *row_weights, Dtype::kFloat32, num_rows);
  DSV3_CHECK(relay.has_value() == kNodes && (!kNodes || ranks_per_node == r.ranks), "relay and nodes go together");
  if (relay) check_operand("relay", *relay, Dtype::kInt32, r.nodes, position.size(0) / group);
  const DeviceGuard guard(out);
  CombineParams p{.own = {.topk_idx = topk_idx.data<int64_t>(),
                          .tokens = static_cast<int>(tokens),
                          .topk = static_cast<int>(topk),
                          .local_experts = static_cast<int>(num_experts / group),
                          .experts = static_cast<int>(num_experts)},
                  .out = out.data<void>(),
                  .weights = weights ? weights->data<float>() : nullptr,
                  .rows = rows.data<void>(),
                  .row_weights = row_weights ? row_weights->data<float>() : nullptr,
                  .weighted = row_weights.has_value(),
                  .position = position.data<int64_t>(),
                  .relay = relay ? relay->data<int>() : nullptr,
                  .num_rows = static_cast<int>(num_rows),
                  .max_tokens = static_cast<int>(position.size(0) / group),
                  .hidden = static_cast<int>(hidden),
                  .ranks_per_node = static_cast<int>(ranks_per_node)};
  visit_float("out", out.dtype(), [&](auto zero) {
    using Y = decltype(zero);
    DSV3_CHECK(hidden % Vec<Y>::kSize == 0, "hidden must be a multiple of ", Vec<Y>::kSize, ", got ", hidden);
    const bool narrow = sizeof(Y) == 2 && !fp32_sums;
    p.piece = piece_columns(hidden, narrow ? 2 : 4, kSumStep);
    p.pieces = static_cast<int>(ceil_div(hidden, p.piece));
    constexpr int kThreads = Roles<kNodes>::kWarps * kWarpSize;
    const Launch shape{.grid = dim3(r.channels), .block = dim3(kThreads), .smem = Roles<kNodes>::kWarps * kWarpBytes};
    const auto start = [&](auto zero, auto nested) {
      launch("comm_combine", combine_kernel<nested(), Y, decltype(zero), Far>, shape, stream, r, far, p);
    };
    if constexpr (kNodes) {
      visit_sums<Y>(narrow, [&](auto zero) { start(zero, std::true_type{}); });
    } else {
      visit_sums<Y>(narrow, ranks_per_node < r.ranks, start);
    }
  });
}

}  // namespace dsv3::combining
