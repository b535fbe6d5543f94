// What the ranks tell each other before rows move: how many pairs each has for every expert.
//
//   offsets [G + 1]  the rows of this rank's experts: expert ascending, within one the source ranks in their order
//   shift [E]        from a pair's place in this rank's own order by expert to its row at the rank of expert e
//   arrivals [N, C]  tokens that come from every rank on every channel; of several nodes [N + nodes, C]: at the end those to be
//                    passed on in this node, from the rank of every node that has this one's place
//   heads [N, 8]     of every rank: trouble (1 its own, 2 an expert that does not exist), four numbers of the caller, tokens
//
// One block: a notice for every rank, a flag behind it, then the sums. Notices of even and odd exchanges have places of
// their own: a rank begins the next but one only when all have read this one.
#pragma once

#include "../ops.h"
#include "peers.cuh"

namespace dsv3::exchanging {

constexpr int kThreads = 1024;

struct ExchangeParams {
  int* heads;               // [N, 8]
  int* offsets;             // [G + 1]
  int* shift;               // [E]
  int* arrivals;            // [N, C], or [N + nodes, C]
  const int64_t* topk_idx;  // [T, k]
  const int* own_offsets;   // [E + 1], of this rank's own order
  int head[kHeadInts];
  int tokens, topk, experts, local_experts;
  int ranks_per_node;
};

template <bool kNodes>
struct Counted {
  static constexpr int kRanks = kNodes ? kMaxGroup : kMaxRanks;
  int arrivals[kRanks * kMaxChannels];                 // [rank][channel]
  int relayed[kNodes ? kMaxNodes * kMaxChannels : 1];  // [node][channel]
  int totals[kMaxCommExperts];
  int trouble;
};

// Sources are taken by their place in their node, then by their node.
__device__ __forceinline__ int source_at(int place, int ranks, int width) {
  const int nodes = ranks / width;
  return place % nodes * width + place / nodes;
}

template <bool kNodes>
__device__ __forceinline__ void count(const Rings& r, const ExchangeParams& p, Counted<kNodes>& counted) {
  using Mask = std::conditional_t<kNodes, unsigned long long, unsigned>;
  for (int i = threadIdx.x; i < group_size(r) * r.channels; i += kThreads) counted.arrivals[i] = 0;
  for (int i = threadIdx.x; kNodes && i < r.nodes * r.channels; i += kThreads) counted.relayed[i] = 0;
  if (threadIdx.x == 0) counted.trouble = 0;
  __syncthreads();
  for (int token = threadIdx.x; token < p.tokens; token += kThreads) {
    Mask ranks = 0;
    unsigned nodes = 0;
    int64_t experts[kMaxTopk];  // all on their way at once
#pragma unroll
    for (int j = 0; j < kMaxTopk; ++j) {
      experts[j] = j < p.topk ? p.topk_idx[static_cast<int64_t>(token) * p.topk + j] : 0;
    }
#pragma unroll
    for (int j = 0; j < kMaxTopk; ++j) {
      if (j >= p.topk) break;
      const int64_t expert = experts[j];
      const int64_t near = min(max(expert, int64_t{0}), int64_t{p.experts - 1});  // where the caller has put the pair
      if (expert != near) counted.trouble = 2;
      const unsigned rank = static_cast<unsigned>(near) / static_cast<unsigned>(p.local_experts);
      ranks |= Mask{1} << rank;
      if constexpr (kNodes) nodes |= 1u << rank / static_cast<unsigned>(r.ranks);
    }
    for (; ranks != 0; ranks &= ranks - 1) {
      const int rank = kNodes ? __ffsll(ranks) - 1 : __ffs(static_cast<unsigned>(ranks)) - 1;
      atomicAdd(&counted.arrivals[rank * r.channels + token % r.channels], 1);
    }
    for (; nodes != 0; nodes &= nodes - 1) {
      atomicAdd(&counted.relayed[(__ffs(nodes) - 1) * r.channels + token % r.channels], 1);
    }
  }
  __syncthreads();
}

// Where a rank's notice is written, and where that of another is read.
template <class Far>
__device__ __forceinline__ Notice& notice_to(const Rings& r, const Far& far, int parity, int rank) {
  if constexpr (Far::kNodes) {
    if (rank / r.ranks != r.node) return far.outgoing(parity, rank);
  }
  return local_of(r, rank - of_node(r, r.node, 0))->notices[parity][r.rank];
}
template <class Far>
__device__ __forceinline__ const Notice& notice_from(const Rings& r, const Far& far, int parity, int rank) {
  if constexpr (Far::kNodes) {
    if (rank / r.ranks != r.node) return far.notice(parity, rank);
  }
  return local_of(r, r.rank)->notices[parity][rank - of_node(r, r.node, 0)];
}

template <class Far>
__device__ __forceinline__ void tell(const Rings& r, const Far& far, const ExchangeParams& p,
                                     const Counted<Far::kNodes>& counted, int parity) {
  static_assert(kMaxCommExperts <= kThreads);
  const int e = threadIdx.x, pairs = e < p.experts ? p.own_offsets[e + 1] - p.own_offsets[e] : 0;
  for (int peer = 0; peer < group_size(r); ++peer) {
    Notice& notice = notice_to(r, far, parity, peer);
    if (e < p.experts) notice.counts[e] = pairs;
    for (int c = threadIdx.x; c < r.channels; c += kThreads) {
      notice.arrivals[c] = counted.arrivals[peer * r.channels + c];
      if constexpr (Far::kNodes) notice.relayed[c] = counted.relayed[peer / r.ranks * r.channels + c];
    }
    if (threadIdx.x < kHeadInts) {
      notice.head[threadIdx.x] = threadIdx.x == 0 && p.head[0] == 0 ? counted.trouble : p.head[threadIdx.x];
    }
  }
}

// Flags behind the notices, by this warp, and the others' are waited for.
template <class Far>
__device__ __forceinline__ bool meet(const Rings& r, const Far& far, const ExchangeParams& p, int parity,
                                     uint32_t epoch) {
  const int lane = threadIdx.x;
  const uint32_t* flag = &local_of(r, r.rank)->noticed[parity][lane % kMaxRanks];
  if (lane < r.ranks) store_release(&local_of(r, lane)->noticed[parity][r.rank], epoch + 1);
  bool all = warp_wait(r, lane < r.ranks, flag, epoch + 1, of_node(r, r.node, lane));
  if constexpr (Far::kNodes) {
    const int bytes = static_cast<int>(offsetof(Notice, counts) + p.experts * sizeof(int));
    for (int i = 0; i < group_size(r); ++i) {
      const int rank = (own_rank(r) + i) % group_size(r);
      if (rank / r.ranks != r.node) far.tell_notice(r, parity, rank, bytes, epoch + 1);
    }
    for (int first = 0; first < group_size(r); first += kWarpSize) {
      const int rank = first + lane;
      const bool away = rank < group_size(r) && rank / r.ranks != r.node;
      all = all && warp_wait(r, away, far.noticed(parity, away ? rank : 0), epoch + 1, rank);
    }
  }
  return all;
}

template <class Far>
__device__ __forceinline__ void add_up(const Rings& r, const Far& far, const ExchangeParams& p,
                                       Counted<Far::kNodes>& counted, int parity) {
  const int group = group_size(r), self = own_rank(r), e = threadIdx.x;
  int total = 0, before = 0, own = 0;  // of the thread's expert
  if (e < p.experts) {
    own = p.own_offsets[e];
#pragma unroll 8
    for (int place = 0; place < group; ++place) {
      const int source = source_at(place, group, p.ranks_per_node);
      if (source == self) before = total;
      total += __ldcg(&notice_from(r, far, parity, source).counts[e]);
    }
    counted.totals[e] = total;
  }
  for (int i = threadIdx.x; i < group * r.channels; i += kThreads) {
    p.arrivals[i] = __ldcg(&notice_from(r, far, parity, i / r.channels).arrivals[i % r.channels]);
  }
  for (int i = threadIdx.x; Far::kNodes && i < r.nodes * r.channels; i += kThreads) {
    const int source = of_node(r, i / r.channels, r.rank);
    p.arrivals[group * r.channels + i] = __ldcg(&notice_from(r, far, parity, source).relayed[i % r.channels]);
  }
  for (int i = threadIdx.x; i < group * kHeadInts; i += kThreads) {
    p.heads[i] = __ldcg(&notice_from(r, far, parity, i / kHeadInts).head[i % kHeadInts]);
  }
  __syncthreads();
  if (e >= p.experts) return;
  int start = 0;
#pragma unroll 8
  for (int other = e / p.local_experts * p.local_experts; other < e; ++other) start += counted.totals[other];
  p.shift[e] = before - own + start;
  const int mine = e - self * p.local_experts;
  if (mine < 0 || mine >= p.local_experts) return;
  p.offsets[mine] = start;
  if (mine == p.local_experts - 1) p.offsets[p.local_experts] = start + total;
}

// Where a rank did not answer: nobody sends anything, and the heads say 3.
template <bool kNodes>
__device__ __forceinline__ void leave_empty(const Rings& r, const ExchangeParams& p) {
  const int group = group_size(r), rows = group + (kNodes ? r.nodes : 0);
  for (int i = threadIdx.x; i <= p.local_experts; i += kThreads) p.offsets[i] = 0;
  for (int i = threadIdx.x; i < p.experts; i += kThreads) p.shift[i] = 0;
  for (int i = threadIdx.x; i < rows * r.channels; i += kThreads) p.arrivals[i] = 0;
  for (int i = threadIdx.x; i < group * kHeadInts; i += kThreads) p.heads[i] = i % kHeadInts == 0 ? 3 : 0;
}

template <class Far>
__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ Rings r, const __grid_constant__ Far far,
                    const __grid_constant__ ExchangeParams p) {
  __shared__ Counted<Far::kNodes> counted;
  __shared__ bool answered;
  wait_for_inputs();
  Local* const local = local_of(r, r.rank);
  const uint32_t epoch = local->epoch;
  const int parity = epoch % 2;
  if (has_failed(r)) return leave_empty<Far::kNodes>(r, p);
  count(r, p, counted);
  tell(r, far, p, counted, parity);
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const bool all = meet(r, far, p, parity, epoch);
    if (threadIdx.x == 0) answered = all;
  }
  __syncthreads();
  if (!answered) return leave_empty<Far::kNodes>(r, p);
  add_up(r, far, p, counted, parity);
  if (threadIdx.x == 0) local->epoch = epoch + 1;
}

// As of comm_exchange (ops.h).
struct ExchangeTensors {
  Tensor heads, offsets, shift, arrivals, topk_idx, own_offsets;
};

// comm_exchange, on the memory of a node and what leads to others.
template <class Far>
void exchange(const ExchangeTensors& t, const std::vector<int64_t>& head, int64_t ranks_per_node, const Rings& r,
              const Far& far, cudaStream_t stream) {
  const auto& [heads, offsets, shift, arrivals, topk_idx, own_offsets] = t;
  const int group = group_size(r);
  const int64_t experts = shift.size(0), local_experts = experts / group;
  DSV3_CHECK(topk_idx.dim() == 2 && topk_idx.size(1) >= 1 && topk_idx.size(1) <= kMaxTopk,
             "topk_idx must be (tokens, 1..", kMaxTopk, "), got ", topk_idx);
  DSV3_CHECK(experts <= kMaxCommExperts && experts % group == 0, "experts must be at most ", kMaxCommExperts,
             " and a multiple of the ", group, " ranks, got ", experts);
  DSV3_CHECK(head.size() == kHeadInts, "head must have ", kHeadInts, " numbers");
  DSV3_CHECK(!Far::kNodes || ranks_per_node == r.ranks, "ranks_per_node must be the nodes', got ", ranks_per_node);
  check_operand("heads", heads, Dtype::kInt32, group, kHeadInts);
  check_operand("offsets", offsets, Dtype::kInt32, local_experts + 1);
  check_operand("shift", shift, Dtype::kInt32, experts);
  check_operand("arrivals", arrivals, Dtype::kInt32, group + (Far::kNodes ? r.nodes : 0), r.channels);
  check_operand("topk_idx", topk_idx, Dtype::kInt64);
  check_operand("own_offsets", own_offsets, Dtype::kInt32, experts + 1);
  const DeviceGuard guard(heads);
  ExchangeParams p{.heads = heads.data<int>(),
                   .offsets = offsets.data<int>(),
                   .shift = shift.data<int>(),
                   .arrivals = arrivals.data<int>(),
                   .topk_idx = topk_idx.data<int64_t>(),
                   .own_offsets = own_offsets.data<int>(),
                   .tokens = static_cast<int>(topk_idx.size(0)),
                   .topk = static_cast<int>(topk_idx.size(1)),
                   .experts = static_cast<int>(experts),
                   .local_experts = static_cast<int>(local_experts),
                   .ranks_per_node = static_cast<int>(ranks_per_node)};
  for (int i = 0; i < kHeadInts; ++i) p.head[i] = static_cast<int>(head[i]);
  launch("comm_exchange", exchange_kernel<Far>, {.grid = dim3(1), .block = dim3(kThreads)}, stream, r, far, p);
}

}  // namespace dsv3::exchanging
