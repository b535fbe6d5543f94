// Tokens to the rows of their experts.
//
// Warps of a block, all by themselves: some read a piece of a token once, cast it where the wire is FP8, and put it into a slot
// in shared memory, with the token's rows at all ranks. One takes these slots in their order and has bulk copies bring each to
// the rings of the ranks of its node that need it: lane r serves rank r. Others receive: a bulk copy brings a slot of a ring to
// shared memory, others bring it from there to all its rows. A receiver takes whatever comes on any of its rings, so they
// always drain; a ring's slot is free once it lies in shared memory. Tokens for the own rank go to their rows without a ring.
//
// Of several nodes, a second sender puts each token once into the ring of every other node that needs it. What comes from there a
// forwarder a node brings to shared memory and from there to the rings of the ranks that need it.
//
// Bytes that count: x read once, every row written once; beside them each (token, rank) passes a slot. Memory-bound.
#pragma once

#include "../ops.h"
#include "rows.cuh"
#include "scales.cuh"

namespace dsv3::dispatching {

template <bool kNodes>
struct Roles {  // warps
  static constexpr int kSenders = kNodes ? 2 : 1;
  static constexpr int kCasters = kNodes ? 7 : 10;  // each has its stage, so that it is never more than a phase ahead
  static constexpr int kReceivers = kNodes ? 8 : 16;
  static constexpr int kForwarders = kNodes ? kMaxNodes - 1 : 0;
  static constexpr int kHops = kNodes ? 11 : 0;  // slots, which the forwarders share
  static constexpr int kThreads = (kSenders + kCasters + kReceivers + kForwarders) * kWarpSize;
};
constexpr int kFlight = 5;  // slots of a sender on their way at once
constexpr int kAhead = 8;   // slots of a ring that are looked at together for room

struct DispatchParams {
  OwnTokens own;
  const void* x;         // [T, H]
  const int64_t* pairs;  // [T, k]: each pair's place in the own order by expert
  const int* shift;      // [E]
  const float* weights;  // [T, k], or null
  RowTarget to;          // [R, H], scales [R, tiles]
  float* row_weights;    // [R], or null
  int64_t* position;     // [N * max_tokens, k], or null
  int* relay;            // [nodes, max_tokens], or null: a bit for every rank of this node that needs a token passed on
  const int* arrivals;   // [N, C]; of several nodes [N + nodes, C]: tokens to be passed on come last
  const int* total;      // rows that there are; where they are more than R, all of them become NaN
  int max_tokens;
  int hidden, piece, pieces;  // columns
  ScaleRule rule;
};

__device__ __forceinline__ Pair pair_of(const DispatchParams& p, int64_t token) {
  const int lane = threadIdx.x % kWarpSize;
  Pair pair{.rank = -1, .place = 0, .row = 0, .weight = 0.f};
  if (lane < p.own.topk) {
    const int64_t at = token * p.own.topk + lane;
    const int expert = p.own.expert(at);
    pair.rank = expert / p.own.local_experts;
    pair.row = static_cast<int>(p.pairs[at]) + p.shift[expert];
    if (p.weights != nullptr) pair.weight = p.weights[at];
  }
  return placed(pair, p.own.topk);
}

// What all receive of a slot: positions and weights, then rows.
template <class Way>
__device__ __forceinline__ void deliver(const Rings& r, const DispatchParams& p, int source, Slot* slot, int piece,
                                        bool spoiled) {
  const int lane = threadIdx.x % kWarpSize, begin = piece * p.piece, num_rows = p.to.num_rows;
  const Meta& meta = slot->meta;
  const Here here = pairs_here(meta, own_rank(r));
  const int row = lane < here.count ? meta.rows[here.first + lane] : 0;
  if (piece == 0 && lane < here.count && p.position != nullptr) {
    const int64_t token = static_cast<int64_t>(source) * p.max_tokens + meta.token;
    p.position[token * p.own.topk + lane] = row < num_rows ? row : row + 1;
    if (row < num_rows) p.row_weights[row] = meta.weights[here.first + lane];
  }
  write_rows<Way>(p.to, slot, begin, min(p.piece, p.hidden - begin), here.count, row, spoiled);
}

template <bool kNodes>
struct Hops {
  Slot boxes[Roles<kNodes>::kHops];
  uint64_t there[Roles<kNodes>::kHops];
};
template <>
struct Hops<false> {};

template <bool kNodes>
struct Memory {
  using Warps = Roles<kNodes>;
  Slot stages[Warps::kCasters], boxes[Warps::kReceivers];
  uint64_t full[Warps::kCasters], empty[Warps::kCasters], there[Warps::kReceivers];
  Hops<kNodes> hops;
  volatile bool stopped;  // a sender has given up

  __device__ __forceinline__ void init() {
    for (int i = 0; i < Warps::kCasters; ++i) {
      cutlass::arch::ClusterBarrier::init(&full[i], 1);
      cutlass::arch::ClusterBarrier::init(&empty[i], Warps::kSenders);
    }
    init_boxes(there);
    if constexpr (kNodes) init_boxes(hops.there);
    stopped = false;
  }
  // Whether the stage of slot n has passed a barrier; the same for all lanes.
  __device__ __forceinline__ bool has_passed(const uint64_t* barriers, int n, int flip) const {
    const uint32_t parity = n / Warps::kCasters % 2 ^ flip;
    const uint64_t* const barrier = &barriers[n % Warps::kCasters];
    return __all_sync(kAllLanes, cutlass::arch::ClusterBarrier::try_wait(barrier, parity));
  }
  __device__ __forceinline__ bool has_stopped() const { return __any_sync(kAllLanes, stopped); }
};

// Slot n of the channel's, in the order of its tokens, goes through the stage of caster n % kCasters.
// direct: the own rank's rows are written from there.
template <class Way, bool kNodes>
__device__ __forceinline__ void cast(const Rings& r, const DispatchParams& p, int warp, bool direct,
                                     Memory<kNodes>& memory) {
  for (int n = warp;; n += Roles<kNodes>::kCasters) {
    const int token = blockIdx.x + n / p.pieces * r.channels, begin = n % p.pieces * p.piece;
    if (token >= p.own.tokens) break;
    const typename Way::X* const x = static_cast<const typename Way::X*>(p.x) + static_cast<int64_t>(token) * p.hidden;
    const Pair pair = pair_of(p, token);
    while (!memory.has_passed(memory.empty, n, 1)) {
      if (memory.has_stopped()) return wait_bulk_stores();
    }
    wait_bulk_stores_read<0>();
    __syncwarp();
    Slot* const stage = &memory.stages[warp];
    fill_slot<Way>(stage, p.rule, x + begin, min(p.piece, p.hidden - begin), pair, token, p.own.topk);
    if (threadIdx.x % kWarpSize == 0) cutlass::arch::ClusterBarrier::arrive(&memory.full[warp]);
    if (direct) deliver<Way>(r, p, own_rank(r), stage, n % p.pieces, false);
  }
  wait_bulk_stores();
}

// Brings the slots of the stages to those of the rings that need them, in their order: lane i those of way i, which it counts
// from `next` on; returns the count at the end. Of what leads to each way the sender knows: Link has
//   done_flag(item), ready to be looked at, slot(item), where bulk stores bring it, and send(first, count), by the whole warp.
template <class Way, bool kNodes, class Link>
__device__ __forceinline__ uint32_t send(const Rings& r, const DispatchParams& p, uint32_t next, unsigned served,
                                         const Link& link, Memory<kNodes>& memory) {
  constexpr int kStages = Roles<kNodes>::kCasters;
  const int lane = threadIdx.x % kWarpSize;
  int landed = 0, flying = 0;  // slots of the channel
  uint32_t first = next;       // of this lane's ring on their way
  int mine = 0;
  uint32_t checked = next;  // those before it have room
  const auto look = [&](uint32_t item) {
    uint32_t seen[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) seen[i] = load_relaxed(link.done_flag(item + i));
    bool more = true;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      more = more && static_cast<int32_t>(seen[i] - (item + i + 1 - r.slots)) >= 0;
      if (more) checked = item + i + 1;
    }
  };
  const auto land = [&] {
    wait_bulk_stores();
    link.send(first, mine);
    first += mine;
    mine = 0;
    __syncwarp();
    if (lane < flying) cutlass::arch::ClusterBarrier::arrive(&memory.empty[(landed + lane) % kStages]);
    landed += flying;
    flying = 0;
  };
  next = for_own_tokens<kNodes>(r, p.own, p.pieces, next, 0, 1, served, [&](int, unsigned mask, uint32_t item) {
    const bool used = mask >> lane & 1;
    for (int piece = 0; piece < p.pieces; ++piece, ++item) {
      const int n = landed + flying, columns = min(p.piece, p.hidden - piece * p.piece);
      while (!memory.has_passed(memory.full, n, 0)) {
        if (flying > 0) land();
        if (kNodes && memory.has_stopped()) return false;
      }
      if (used && item == checked) look(item);
      const bool full = used && item == checked;
      if (__any_sync(kAllLanes, full)) {
        land();
        if (!warp_wait<true>(r, full, link.done_flag(item), item + 1 - r.slots, link.peer)) {
          memory.stopped = true;
          return false;
        }
        if (full) ++checked;
      }
      if (used) {
        bulk_store(link.slot(item), &memory.stages[n % kStages], slot_bytes<Way>(columns));
        if (mine++ == 0) first = item;
      }
      if (++flying == kFlight) land();
    }
    return true;
  });
  land();
  return next;
}

// Lane i's ring to rank i of this node, of tokens that come from `node`.
struct NearLink {
  const Rings& r;
  const int node, lane = threadIdx.x % kWarpSize;
  const int peer = of_node(r, r.node, lane);

  __device__ __forceinline__ const uint32_t* done_flag(uint32_t item) const {
    return dsv3::done_flag(r, r.rank, of_node(r, node, lane), blockIdx.x, item);
  }
  __device__ __forceinline__ Slot* slot(uint32_t item) const {
    return ring_slot(r, lane, of_node(r, node, r.rank), blockIdx.x, item);
  }
  __device__ __forceinline__ void send(uint32_t first, int count) const {
    if (count > 0) __threadfence_system();
    for (; count > 0; --count, ++first) {
      store_relaxed(ready_flag(r, lane, of_node(r, node, r.rank), blockIdx.x, first), first + 1);
    }
  }
};

// What a receiver does with the slots of its rings, in each of which it takes every `sharing`-th. Lane i has one ring.
template <class Way, bool kNodes>
__device__ __forceinline__ void receive(const Rings& r, const DispatchParams& p, int warp, bool direct, bool spoiled,
                                        Box box) {
  constexpr int kReceivers = Roles<kNodes>::kReceivers;
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x, nodes = group_size<kNodes>(r) / r.ranks;
  const int writers = r.ranks - direct;  // of a node; the own rank's rows are written elsewhere then
  const int sharing = max(kReceivers / max(nodes * writers, 1), 1);  // warps of a ring
  const int step = kReceivers / sharing, index = warp / sharing + lane * step;
  const bool mine = warp / sharing < step && index < nodes * writers;
  const int node = mine ? index / writers : 0, place = mine ? index - node * writers : 0;
  const int writer = place + (direct && place >= r.rank), ring = of_node<kNodes>(r, node, writer);
  const int items = mine ? p.arrivals[ring * r.channels + channel] * p.pieces : 0;
  const uint32_t begin = mine ? local_of(r, r.rank)->received[ring][channel] : 0;
  const uint32_t* const flags = ready_flag(r, r.rank, mine ? ring : 0, channel, 0);
  int i = warp % sharing;
  while (__any_sync(kAllLanes, i < items)) {
    const uint32_t next = begin + i;
    unsigned there = warp_wait_any(r, i < items, flags + next % r.slots, next + 1, of_node<kNodes>(r, r.node, writer));
    if (there == 0) break;
    for (; there != 0; there &= there - 1) {
      const int from = __ffs(there) - 1, source = __shfl_sync(kAllLanes, ring, from);
      const int piece = __shfl_sync(kAllLanes, i, from) % p.pieces;
      const uint32_t item = __shfl_sync(kAllLanes, next, from);
      const int columns = min(p.piece, p.hidden - piece * p.piece);
      box.take(ring_slot(r, r.rank, source, channel, item), slot_bytes<Way>(columns));
      if (lane == 0) {
        const int node = node_of<kNodes>(r, source), ours = of_node<kNodes>(r, node, r.rank);
        store_relaxed(done_flag(r, source - node * r.ranks, ours, channel, item), item + 1);
      }
      deliver<Way>(r, p, source, box.slot, piece, spoiled);
      if (lane == from) i += sharing;
    }
  }
  wait_bulk_stores();
}

// From the ring of another node to those of this node's ranks, several slots at once where they are there. Lane i counts the
// ring to rank i from `next` on; returns the count at the end.
template <class Way, class Far>
__device__ __forceinline__ uint32_t forward(const Rings& r, const Far& far, const DispatchParams& p, int node,
                                            uint32_t next, bool direct, Hops<true>& hops, int first_box, int boxes) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  const int items = p.arrivals[of_node(r, r.nodes, 0) * r.channels + node * r.channels + channel] * p.pieces;
  const uint32_t begin = far.received(node, channel);
  const NearLink link{r, node};
  Slot* const slots = hops.boxes + first_box;
  auto* const there = reinterpret_cast<TransactionBarrier*>(hops.there) + first_box;
  const int source = of_node(r, node, r.rank);
  uint32_t phases = 0;  // of the boxes
  const auto columns_of = [&](int i) { return min(p.piece, p.hidden - i % p.pieces * p.piece); };
  for (int i = 0; i < items;) {
    const uint32_t item = begin + i;
    if (!warp_wait(r, true, far.ready_flag(r, node, channel, item), item + 1, source)) return next;
    const bool here =
        lane < min(boxes, items - i) && reached(far.ready_flag(r, node, channel, item + lane), item + lane + 1);
    const int count = __ffs(~__ballot_sync(kAllLanes, here)) - 1;  // one at least
    if (lane < count) {
      load_acquire(far.ready_flag(r, node, channel, item + lane));
      fence_proxy();
      const int bytes = slot_bytes<Way>(columns_of(i + lane));
      there[lane].arrive_and_expect_tx(bytes);
      bulk_load(&slots[lane], far.slot(r, node, channel, item + lane), bytes, there[lane]);
    }
    for (int j = 0; j < count; ++j) {
      there[j].wait(phases >> j & 1);
      phases ^= 1u << j;
    }
    if (lane < count) far.tell_done(r, node, channel, item + lane);
    uint32_t first = next;  // of this lane's ring on their way
    for (int j = 0; j < count; ++j) {
      Slot* const slot = &slots[j];
      const int piece = (i + j) % p.pieces;
      const int place = lane < kMaxTopk ? slot->meta.ranks[lane] - of_node(r, r.node, 0) : -1;
      unsigned needs = __reduce_or_sync(kAllLanes, place >= 0 && place < r.ranks ? 1u << place : 0u);
      if (piece == 0 && lane == 0 && p.relay != nullptr) p.relay[node * p.max_tokens + slot->meta.token] = needs;
      if (direct && needs >> r.rank & 1) {
        deliver<Way>(r, p, source, slot, piece, false);
        needs &= ~(1u << r.rank);
      }
      const bool used = needs >> lane & 1;
      if (!warp_wait<true>(r, used, link.done_flag(next), next + 1 - r.slots, link.peer)) {
        wait_bulk_stores();
        return next;
      }
      if (used) bulk_store(link.slot(next++), slot, slot_bytes<Way>(columns_of(i + j)));
    }
    wait_bulk_stores();
    link.send(first, next - first);
    __syncwarp();
    i += count;
  }
  return next;
}

// A rank was waited for in vain.
template <class Way>
__device__ __forceinline__ void spoil(const DispatchParams& p) {
  const int64_t values = static_cast<int64_t>(p.to.num_rows) * p.hidden;
  if constexpr (Way::kCast && !Way::kDecode) {
    fill_nan(p.to.codes, values);
    fill_nan(p.to.sf, p.to.num_rows * p.to.sf_stride * sizeof(float));
  } else {
    fill_nan(p.to.rows, values * sizeof(typename Way::X));
  }
  if (p.row_weights != nullptr) fill_nan(p.row_weights, p.to.num_rows * sizeof(float));
}

// The warps that serve other nodes.
template <class Way, class Far>
__device__ __forceinline__ void serve_nodes(const Rings& r, const Far& far, const DispatchParams& p, int warp,
                                            bool direct, Memory<true>& memory) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  if (warp == 0) {
    const int node = lane - kMaxRanks;
    const bool counts = node >= 0 && node < r.nodes;
    const uint32_t begin = counts ? far.sent(node, channel) : 0;
    const int last = p.hidden - (p.pieces - 1) * p.piece;
    const typename Far::Link link(r, far, counts ? node : 0, begin, p.pieces, slot_bytes<Way>(p.piece),
                                  slot_bytes<Way>(last));
    const uint32_t next = send<Way>(r, p, begin, ~kNearWays, link, memory);
    if (counts) far.sent(node, channel) = next;
    return;
  }
  const int others = r.nodes - 1, place = warp - 1;
  if (place >= others) return;
  const int node = place + (place >= r.node), boxes = Roles<true>::kHops / others;
  uint32_t* const counter = lane < r.ranks ? &local_of(r, r.rank)->sent[of_node(r, node, lane)][channel] : nullptr;
  const uint32_t next =
      forward<Way>(r, far, p, node, counter != nullptr ? *counter : 0, direct, memory.hops, place * boxes, boxes);
  if (counter != nullptr) *counter = next;
  if (lane == 0) far.received(node, channel) += p.arrivals[(group_size(r) + node) * r.channels + channel] * p.pieces;
}

template <class Way, class Far>
__global__ void __launch_bounds__(Roles<Far::kNodes>::kThreads, 1)
    dispatch_kernel(const __grid_constant__ Rings r, const __grid_constant__ Far far,
                    const __grid_constant__ DispatchParams p) {
  constexpr bool kNodes = Far::kNodes;
  using Warps = Roles<kNodes>;
  extern __shared__ __align__(128) char shared[];
  auto& memory = *reinterpret_cast<Memory<kNodes>*>(shared);
  if (threadIdx.x == 0) memory.init();
  __syncthreads();
  wait_for_inputs();
  Local* const local = local_of(r, r.rank);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (has_failed(r)) return spoil<Way>(p);
  const bool spoiled = *p.total > p.to.num_rows, direct = !Way::kDecode && !spoiled;
  if (warp == 0) {
    uint32_t* const counter = lane < r.ranks ? &local->sent[of_node(r, r.node, lane)][blockIdx.x] : nullptr;
    const unsigned served = kNearWays & ~(direct ? 1u << r.rank : 0);
    const uint32_t next = send<Way>(r, p, counter != nullptr ? *counter : 0, served, NearLink{r, r.node}, memory);
    if (counter != nullptr) *counter = next;
  } else if (warp <= Warps::kCasters) {
    cast<Way>(r, p, warp - 1, direct, memory);
  } else if (const int receiver = warp - 1 - Warps::kCasters; receiver < Warps::kReceivers) {
    receive<Way, kNodes>(r, p, receiver, direct, spoiled, Box(&memory.boxes[receiver], &memory.there[receiver]));
  } else {
    if constexpr (kNodes) serve_nodes<Way>(r, far, p, receiver - Warps::kReceivers, direct, memory);
  }
  if (has_failed(r)) return spoil<Way>(p);
  const int ring = threadIdx.x;
  if (ring < group_size(r) && !(direct && ring % r.ranks == r.rank)) {
    local->received[ring][blockIdx.x] += p.arrivals[ring * r.channels + blockIdx.x] * p.pieces;
  }
}

template <class Way, class Far>
void start(const Rings& r, const Far& far, DispatchParams& p, cudaStream_t stream) {
  p.piece = piece_columns(p.hidden, Way::kBytes, Way::kCast ? kPieceStep : 1);
  p.pieces = static_cast<int>(ceil_div(p.hidden, p.piece));
  p.to.hidden = p.hidden;
  constexpr bool kNodes = Far::kNodes;
  const Launch shape{.grid = dim3(r.channels), .block = dim3(Roles<kNodes>::kThreads), .smem = sizeof(Memory<kNodes>)};
  launch("comm_dispatch", dispatch_kernel<Way, Far>, shape, stream, r, far, p);
}

// As of comm_dispatch (ops.h).
struct DispatchTensors {
  Tensor rows;
  std::optional<Tensor> sf, sf_rows, row_weights, position, relay;
  Tensor x;
  std::optional<Tensor> weights;
  Tensor topk_idx, pairs, shift, arrivals, total;
};

// comm_dispatch, on the rings of a node and what leads to others.
template <class Far>
void dispatch(const DispatchTensors& t, int64_t max_tokens, bool cast, double amax_floor, const Rings& r,
              const Far& far, cudaStream_t stream) {
  const auto& [rows, sf, sf_rows, row_weights, position, relay, x, weights, topk_idx, pairs, shift, arrivals, total] =
      t;
  DSV3_CHECK(x.dim() == 2 && rows.dim() == 2 && topk_idx.dim() == 2, "x and rows must be (tokens, hidden), got ", x,
             " and ", rows);
  const int64_t tokens = x.size(0), hidden = x.size(1), topk = topk_idx.size(1), num_rows = rows.size(0);
  const int64_t size = x.dtype() == Dtype::kFloat32 ? 4 : 2;
  DSV3_CHECK(hidden > 0 && hidden * size % 16 == 0 && (!cast || hidden % 16 == 0),
             "hidden does not fill vectors of 16 bytes: ", hidden);
  DSV3_CHECK(topk >= 1 && topk <= kMaxTopk, "topk must be in 1..", kMaxTopk, ", got ", topk);
  check_operand("x", x, x.dtype());
  check_operand("rows", rows, sf ? Dtype::kE4M3 : x.dtype(), num_rows, hidden);
  check_operand("topk_idx", topk_idx, Dtype::kInt64, tokens, topk);
  check_operand("pairs", pairs, Dtype::kInt64, tokens, topk);
  check_operand("shift", shift, Dtype::kInt32);
  check_operand("arrivals", arrivals, Dtype::kInt32, group_size(r) + (Far::kNodes ? r.nodes : 0), r.channels);
  check_operand("total", total, Dtype::kInt32);
  DSV3_CHECK(row_weights.has_value() == position.has_value(), "row_weights and position go together");
  if (row_weights) check_operand("row_weights", *row_weights, Dtype::kFloat32, num_rows);
  if (position) check_operand("position", *position, Dtype::kInt64, group_size(r) * max_tokens, topk);
  if (relay) check_operand("relay", *relay, Dtype::kInt32, r.nodes, max_tokens);
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, tokens, topk);
  const DeviceGuard guard(x);
  DispatchParams p{.own = {.topk_idx = topk_idx.data<int64_t>(),
                           .tokens = static_cast<int>(tokens),
                           .topk = static_cast<int>(topk),
                           .local_experts = static_cast<int>(shift.numel() / group_size(r)),
                           .experts = static_cast<int>(shift.numel())},
                   .x = x.data<void>(),
                   .pairs = pairs.data<int64_t>(),
                   .shift = shift.data<int>(),
                   .weights = weights ? weights->data<float>() : nullptr,
                   .to = {.rows = rows.data<void>(), .num_rows = static_cast<int>(num_rows)},
                   .row_weights = row_weights ? row_weights->data<float>() : nullptr,
                   .position = position ? position->data<int64_t>() : nullptr,
                   .relay = relay ? relay->data<int>() : nullptr,
                   .arrivals = arrivals.data<int>(),
                   .total = total.data<int>() + total.numel() - 1,
                   .max_tokens = static_cast<int>(max_tokens),
                   .hidden = static_cast<int>(hidden),
                   .rule = scale_rule(amax_floor, true)};
  if (!cast) {
    p.hidden = static_cast<int>(hidden * size / 16);
    return start<Words>(r, far, p, stream);
  }
  const int tiles = static_cast<int>(ceil_div(hidden, kTile));
  DSV3_CHECK(sf.has_value() == sf_rows.has_value(), "sf and sf_rows go together");
  RowCasts casts{};
  if (sf) {
    casts = row_casts("rows", rows, "sf", *sf, num_rows, hidden, p.rule);
    check_operand("sf_rows", *sf_rows, Dtype::kFloat32, num_rows, padded_tiles(tiles));
    p.to.codes = casts.out;
    p.to.sf = sf_rows->data<float>();
    p.to.sf_stride = padded_tiles(tiles);
  }
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    sf ? start<Codes<T, false>>(r, far, p, stream) : start<Codes<T, true>>(r, far, p, stream);
  });
  if (!sf) return;
  const Launch shape{.grid = dim3(r.channels), .block = dim3(kScaleThreads)};
  launch("comm_dispatch", order_scales_kernel<Far>, shape, stream, casts.sf, int64_t{casts.sf_stride}, p.to.sf, p.total,
         p.to.num_rows, tiles);
}

}  // namespace dsv3::dispatching
