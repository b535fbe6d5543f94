// The way back: every rank sums a token's rows, the token's own rank sums what the ranks send.
//
//   out[t] = sum over nodes of (sum over their ranks of (sum over the token's rows there))
//
// each in fp32, ascending, with one rounding to the dtype of the sums. Most of a block's warps read a token's rows
// and write their sum to a slot of its rank's ring; the others wait for a token's slots of all its ranks and add them.
// All of them take the tokens of a channel in the same order, so the first token that is not finished always can be.
//
// Bytes that count: every row read once, out written once; between them each (token, rank) passes a slot in the L2 cache.
#include "../ops.h"
#include "sums.cuh"

namespace dsv3 {
namespace {

constexpr int kProducers = 20, kOwners = 8;  // warps
constexpr int kThreads = (kProducers + kOwners) * kWarpSize;

struct CombineParams {
  OwnTokens own;
  void* out;                 // [T, H]
  float* weights;            // [T, k], or null: what row_weights hold of the own pairs
  const void* rows;          // [R, H]
  const float* row_weights;  // [R]
  const int64_t*
      position;  // [N * max_tokens, k]: rows ascending; R first for a token that did not come, beyond R for none
  int num_rows, max_tokens;
  int hidden, piece, pieces;  // columns
  int ranks_per_node;
};

// A token's rows, which lanes hold, in pieces to the ring of its rank.
template <class Y, class S>
__device__ __forceinline__ bool send_sum(const Rings& r, const CombineParams& p, int source, int token, int piece,
                                         uint32_t item, uint4* memory) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  const int64_t at = (static_cast<int64_t>(source) * p.max_tokens + token) * p.own.topk + lane;
  const int64_t found = lane < p.own.topk ? p.position[at] : p.num_rows;
  if (!warp_wait<true>(r, true, done_flag(r, r.rank, source, channel, item), item + 1 - r.slots, source)) {
    return false;
  }
  const bool live = found < p.num_rows, dropped = __any_sync(kAllLanes, found > p.num_rows);
  const int count = __popc(__ballot_sync(kAllLanes, live));
  const int begin = piece * p.piece;
  const Y* const row = static_cast<const Y*>(p.rows) + (live ? found : 0) * p.hidden + begin;
  Slot* const slot = ring_slot(r, source, r.rank, channel, item);
  if (p.row_weights != nullptr && piece == 0 && lane < p.own.topk) {
    slot->meta.weights[lane] = live ? p.row_weights[found] : __uint_as_float(0x7fffffffu);
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
  if (lane == 0) store_release(ready_flag(r, source, r.rank, channel, item), item + 1);
  return true;
}

// Lane s counts the ring to rank s from `next` on; returns the count at the end.
template <class Y, class S>
__device__ __forceinline__ uint32_t produce(const Rings& r, const CombineParams& p, int warp, uint32_t next,
                                            uint4* memory) {
  const int lane = threadIdx.x % kWarpSize;
  int items = 0;  // of all rings, in turn one a warp
  for (int first = blockIdx.x; first < p.max_tokens; first += kWarpSize * r.channels) {
    const int token = first + lane * r.channels;
    unsigned from = 0;  // the ranks from which the lane's token came
    for (int source = 0; token < p.max_tokens && source < r.ranks; ++source) {
      const int64_t at = (static_cast<int64_t>(source) * p.max_tokens + token) * p.own.topk;
      from |= static_cast<unsigned>(p.position[at] != p.num_rows) << source;
    }
    unsigned came = 0;  // of the 32 tokens of rank `lane`
    for (int source = 0; source < r.ranks; ++source) {
      const unsigned of_source = __ballot_sync(kAllLanes, from >> source & 1);
      if (lane == source) came = of_source;
    }
    for (int i = 0; i < kWarpSize; ++i) {
      const unsigned sources = __ballot_sync(kAllLanes, came >> i & 1);
      const unsigned turned = sources >> r.rank | sources << (r.ranks - r.rank);  // not all ranks begin with the same
      const uint32_t item = next + __popc(came & ((1u << i) - 1)) * p.pieces;
      for (int piece = 0; piece < p.pieces; ++piece) {
        for (unsigned left = turned & ((1u << r.ranks) - 1); left != 0; left &= left - 1) {
          if (items++ % kProducers != warp) continue;
          const int source = (__ffs(left) - 1 + r.rank) % r.ranks;
          const uint32_t of_source = __shfl_sync(kAllLanes, item, source) + piece;
          if (!send_sum<Y, S>(r, p, source, first + i * r.channels, piece, of_source, memory)) return next;
        }
      }
    }
    next += __popc(came) * p.pieces;
  }
  return next;
}

// What row_weights hold of the token's pairs: each from its rank's slot, where they stand by expert.
__device__ __forceinline__ void take_weights(const CombineParams& p, int64_t token, const Slot* slot) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t at = token * p.own.topk + lane;
  const int expert = lane < p.own.topk ? p.own.expert(at) : -1;
  const int rank = expert >= 0 ? expert / p.own.local_experts : 0;
  int place = 0;
  for (int j = 0; j < p.own.topk; ++j) {
    const int other = __shfl_sync(kAllLanes, expert, j);
    if (other / p.own.local_experts == rank && (other < expert || (other == expert && j < lane))) ++place;
  }
  const Slot* const from =
      reinterpret_cast<const Slot*>(__shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(slot), rank));
  if (expert >= 0) p.weights[at] = __ldcg(&from->meta.weights[place]);
}

template <bool kNodes, class Y, class S>
__device__ __forceinline__ uint32_t own(const Rings& r, const CombineParams& p, int warp, uint32_t next,
                                        uint4* memory) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  return for_own_tokens(
      r, p.own, p.pieces, next, warp, kOwners, kAllLanes, [&](int token, unsigned mask, uint32_t item) {
        const bool used = mask >> lane & 1;
        for (int piece = 0; piece < p.pieces; ++piece, ++item) {
          if (!warp_wait(r, used, ready_flag(r, r.rank, lane, channel, item), item + 1, lane)) return false;
          const Slot* const slot = used ? ring_slot(r, r.rank, lane, channel, item) : nullptr;
          const int begin = piece * p.piece;
          Y* const out = static_cast<Y*>(p.out) + static_cast<int64_t>(token) * p.hidden + begin;
          const Parts parts = parts_of(p.ranks_per_node, mask, slot);
          const S* const part = reinterpret_cast<const S*>(parts.slot->data);
          sum_rows<kNodes, S, S>(out, min(p.piece, p.hidden - begin), part, __popc(mask), parts.ends, memory);
          if (p.weights != nullptr && piece == 0) take_weights(p, token, slot);
          __syncwarp();
          if (used) store_relaxed(done_flag(r, lane, r.rank, channel, item), item + 1);
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

template <bool kNodes, class Y, class S>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ Rings r, const __grid_constant__ CombineParams p) {
  extern __shared__ uint4 memory[];  // [warp][kWarpBytes / 16]
  wait_for_inputs();
  Local* const local = local_of(r, r.rank);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (has_failed(r)) return spoil<Y>(p);
  const bool produces = warp < kProducers;
  uint32_t* const counters =
      produces ? &local->sent[lane % kMaxRanks][blockIdx.x] : &local->received[lane % kMaxRanks][blockIdx.x];
  uint32_t next = lane < r.ranks ? *counters : 0;
  uint4* const mine = memory + warp * (kWarpBytes / 16);
  next = produces ? produce<Y, S>(r, p, warp, next, mine) : own<kNodes, Y, S>(r, p, warp - kProducers, next, mine);
  if (has_failed(r)) return spoil<Y>(p);
  if (lane < r.ranks && (warp == 0 || warp == kProducers)) *counters = next;
}

}  // namespace

void comm_combine(Tensor out, std::optional<Tensor> weights, Tensor rows, std::optional<Tensor> row_weights,
                  Tensor topk_idx, Tensor position, int64_t num_experts, int64_t ranks_per_node, bool fp32_sums,
                  const Peers& peers, cudaStream_t stream) {
  const Rings& r = peers.rings();
  DSV3_CHECK(out.dim() == 2 && rows.dim() == 2 && topk_idx.dim() == 2 && position.dim() == 2,
             "out and rows must be (tokens, hidden), got ", out, " and ", rows);
  const int64_t tokens = out.size(0), hidden = out.size(1), topk = topk_idx.size(1), num_rows = rows.size(0);
  DSV3_CHECK(topk >= 1 && topk <= kMaxTopk, "topk must be in 1..", kMaxTopk, ", got ", topk);
  DSV3_CHECK(position.size(0) % r.ranks == 0, "position must have as many rows for every rank, got ", position);
  check_operand("out", out, out.dtype());
  check_operand("rows", rows, out.dtype(), num_rows, hidden);
  check_operand("topk_idx", topk_idx, Dtype::kInt64, tokens, topk);
  check_operand("position", position, Dtype::kInt64, position.size(0), topk);
  DSV3_CHECK(weights.has_value() == row_weights.has_value(), "weights and row_weights go together");
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, tokens, topk);
  if (row_weights) check_operand("row_weights", *row_weights, Dtype::kFloat32, num_rows);
  const DeviceGuard guard(out);
  CombineParams p{.own = {.topk_idx = topk_idx.data<int64_t>(),
                          .tokens = static_cast<int>(tokens),
                          .topk = static_cast<int>(topk),
                          .local_experts = static_cast<int>(num_experts / r.ranks),
                          .experts = static_cast<int>(num_experts)},
                  .out = out.data<void>(),
                  .weights = weights ? weights->data<float>() : nullptr,
                  .rows = rows.data<void>(),
                  .row_weights = row_weights ? row_weights->data<float>() : nullptr,
                  .position = position.data<int64_t>(),
                  .num_rows = static_cast<int>(num_rows),
                  .max_tokens = static_cast<int>(position.size(0) / r.ranks),
                  .hidden = static_cast<int>(hidden),
                  .ranks_per_node = static_cast<int>(ranks_per_node)};
  visit_float("out", out.dtype(), [&](auto zero) {
    using Y = decltype(zero);
    DSV3_CHECK(hidden % Vec<Y>::kSize == 0, "hidden must be a multiple of ", Vec<Y>::kSize, ", got ", hidden);
    const bool narrow = sizeof(Y) == 2 && !fp32_sums;
    p.piece = piece_columns(hidden, narrow ? 2 : 4, kRun);
    p.pieces = static_cast<int>(ceil_div(hidden, p.piece));
    const Launch shape{.grid = dim3(r.channels), .block = dim3(kThreads), .smem = kThreads / kWarpSize * kWarpBytes};
    visit_sums<Y>(narrow, ranks_per_node < r.ranks, [&](auto zero, auto nodes) {
      launch("comm_combine", combine_kernel<nodes(), Y, decltype(zero)>, shape, stream, r, p);
    });
  });
}

}  // namespace dsv3
