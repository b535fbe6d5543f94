// What the ranks of a node tell each other before rows move: how many pairs each has for every expert.
//
//   offsets [G + 1]  the rows of this rank's experts: expert ascending, within one the source ranks in their order
//   shift [E]        from a pair's place in this rank's own order by expert to its row at the rank of expert e
//   arrivals [N, C]  tokens that come from every rank on every channel
//   heads [N, 8]     of every rank: trouble (1 its own, 2 an expert that does not exist), four numbers of the caller, tokens
//
// One block: a notice for every rank, a flag behind it, then the sums. Notices of even and odd exchanges have places of
// their own: a rank begins the next but one only when all have read this one.
#include "../ops.h"
#include "peers.cuh"

namespace dsv3 {
namespace {

constexpr int kThreads = 1024;

struct ExchangeParams {
  int* heads;               // [N, 8]
  int* offsets;             // [G + 1]
  int* shift;               // [E]
  int* arrivals;            // [N, C]
  const int64_t* topk_idx;  // [T, k]
  const int* own_offsets;   // [E + 1], of this rank's own order
  int head[kHeadInts];
  int tokens, topk, experts, local_experts;
  int ranks_per_node;
};

struct Counted {
  int arrivals[kMaxRanks * kMaxChannels];  // [rank][channel]
  int totals[kMaxCommExperts];
  int trouble;
};

// Sources are taken by their place in their node, then by their node.
__device__ __forceinline__ int source_at(int place, int ranks, int width) {
  const int nodes = ranks / width;
  return place % nodes * width + place / nodes;
}

__device__ __forceinline__ void count(const Rings& r, const ExchangeParams& p, Counted& counted) {
  for (int i = threadIdx.x; i < r.ranks * r.channels; i += kThreads) counted.arrivals[i] = 0;
  if (threadIdx.x == 0) counted.trouble = 0;
  __syncthreads();
  for (int token = threadIdx.x; token < p.tokens; token += kThreads) {
    unsigned ranks = 0;
    for (int j = 0; j < p.topk; ++j) {
      const int64_t expert = p.topk_idx[static_cast<int64_t>(token) * p.topk + j];
      const int64_t near = min(max(expert, int64_t{0}), int64_t{p.experts - 1});  // where the caller has put the pair
      if (expert != near) counted.trouble = 2;
      ranks |= 1u << static_cast<unsigned>(near) / static_cast<unsigned>(p.local_experts);
    }
    for (; ranks != 0; ranks &= ranks - 1) {
      atomicAdd(&counted.arrivals[(__ffs(ranks) - 1) * r.channels + token % r.channels], 1);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void tell(const Rings& r, const ExchangeParams& p, const Counted& counted, int parity) {
  for (int peer = 0; peer < r.ranks; ++peer) {
    Notice& notice = local_of(r, peer)->notices[parity][r.rank];
    for (int e = threadIdx.x; e < p.experts; e += kThreads) notice.counts[e] = p.own_offsets[e + 1] - p.own_offsets[e];
    for (int c = threadIdx.x; c < r.channels; c += kThreads) {
      notice.arrivals[c] = counted.arrivals[peer * r.channels + c];
    }
    if (threadIdx.x < kHeadInts) {
      notice.head[threadIdx.x] = threadIdx.x == 0 && p.head[0] == 0 ? counted.trouble : p.head[threadIdx.x];
    }
  }
}

__device__ __forceinline__ void add_up(const Rings& r, const ExchangeParams& p, Counted& counted, int parity) {
  const Notice* const notices = local_of(r, r.rank)->notices[parity];
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int total = 0, before = 0;
    for (int place = 0; place < r.ranks; ++place) {
      const int source = source_at(place, r.ranks, p.ranks_per_node);
      if (source == r.rank) before = total;
      total += __ldcg(&notices[source].counts[e]);
    }
    counted.totals[e] = total;
    p.shift[e] = before - p.own_offsets[e];
  }
  for (int i = threadIdx.x; i < r.ranks * r.channels; i += kThreads) {
    p.arrivals[i] = __ldcg(&notices[i / r.channels].arrivals[i % r.channels]);
  }
  for (int i = threadIdx.x; i < r.ranks * kHeadInts; i += kThreads) {
    p.heads[i] = __ldcg(&notices[i / kHeadInts].head[i % kHeadInts]);
  }
  __syncthreads();
  const int first = r.rank * p.local_experts;
  for (int e = threadIdx.x; e < p.experts; e += kThreads) {
    int start = 0;
    for (int other = e / p.local_experts * p.local_experts; other < e; ++other) start += counted.totals[other];
    p.shift[e] += start;
    const int mine = e - first;
    if (mine >= 0 && mine < p.local_experts) {
      p.offsets[mine] = start;
      if (mine == p.local_experts - 1) p.offsets[p.local_experts] = start + counted.totals[e];
    }
  }
}

// Where a rank did not answer: nobody sends anything, and the heads say 3.
__device__ __forceinline__ void leave_empty(const Rings& r, const ExchangeParams& p) {
  for (int i = threadIdx.x; i <= p.local_experts; i += kThreads) p.offsets[i] = 0;
  for (int i = threadIdx.x; i < p.experts; i += kThreads) p.shift[i] = 0;
  for (int i = threadIdx.x; i < r.ranks * r.channels; i += kThreads) p.arrivals[i] = 0;
  for (int i = threadIdx.x; i < r.ranks * kHeadInts; i += kThreads) p.heads[i] = i % kHeadInts == 0 ? 3 : 0;
}

__global__ void __launch_bounds__(kThreads)
    exchange_kernel(const __grid_constant__ Rings r, const __grid_constant__ ExchangeParams p) {
  __shared__ Counted counted;
  __shared__ bool answered;
  wait_for_inputs();
  Local* const local = local_of(r, r.rank);
  const uint32_t epoch = local->epoch;
  const int parity = epoch % 2;
  if (has_failed(r)) return leave_empty(r, p);
  count(r, p, counted);
  tell(r, p, counted, parity);
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    const int peer = threadIdx.x;
    const bool there = peer < r.ranks;
    if (there) store_release(&local_of(r, peer)->noticed[parity][r.rank], epoch + 1);
    const bool all = warp_wait(r, there, &local->noticed[parity][peer], epoch + 1, peer);
    if (threadIdx.x == 0) answered = all;
  }
  __syncthreads();
  if (!answered) return leave_empty(r, p);
  add_up(r, p, counted, parity);
  if (threadIdx.x == 0) local->epoch = epoch + 1;
}

}  // namespace

void comm_exchange(Tensor heads, Tensor offsets, Tensor shift, Tensor arrivals, Tensor topk_idx, Tensor own_offsets,
                   std::vector<int64_t> head, int64_t ranks_per_node, const Peers& peers, cudaStream_t stream) {
  const Rings& r = peers.rings();
  const int64_t experts = shift.size(0), local_experts = experts / r.ranks;
  DSV3_CHECK(topk_idx.dim() == 2 && topk_idx.size(1) >= 1 && topk_idx.size(1) <= kMaxTopk,
             "topk_idx must be (tokens, 1..", kMaxTopk, "), got ", topk_idx);
  DSV3_CHECK(experts <= kMaxCommExperts && experts % r.ranks == 0, "experts must be at most ", kMaxCommExperts,
             " and a multiple of the ", r.ranks, " ranks, got ", experts);
  DSV3_CHECK(head.size() == kHeadInts, "head must have ", kHeadInts, " numbers");
  check_operand("heads", heads, Dtype::kInt32, r.ranks, kHeadInts);
  check_operand("offsets", offsets, Dtype::kInt32, local_experts + 1);
  check_operand("shift", shift, Dtype::kInt32, experts);
  check_operand("arrivals", arrivals, Dtype::kInt32, r.ranks, r.channels);
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
  launch("comm_exchange", exchange_kernel, {.grid = dim3(1), .block = dim3(kThreads)}, stream, r, p);
}

}  // namespace dsv3
