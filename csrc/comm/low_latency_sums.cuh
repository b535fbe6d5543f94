// The way of combine for the few tokens of a decoding step, by two kernels (see low_latency.cuh):
//
//   comm_send_sums     the sum of each token's rows to a slot at its rank; then the flags
//   comm_receive_sums  waits; the sums of the ranks added up, as comm_combine adds them
#pragma once

#include "sums.cuh"
#include "windows.cuh"

namespace dsv3::windows {

struct SendSumsParams {
  const void* y;  // [G * R, H]
  const int *arrived, *tokens, *rows;
  int topk, hidden, piece, pieces;
};

struct ReceiveSumsParams {
  OwnTokens own;
  void* out;  // [T, H]
  int hidden, piece, pieces;
  int ranks_per_node;
};

template <class Y, class S, class Net>
__global__ void __launch_bounds__(kThreads, 1)
    send_sums_kernel(const __grid_constant__ Rings r, const __grid_constant__ Net net,
                     const __grid_constant__ SendSumsParams p) {
  __shared__ Entries<Net> entries;
  extern __shared__ uint4 rows_ahead[];  // [warp][kWarpBytes / 16]
  wait_for_inputs();
  if (has_failed(r)) return;
  const Half call(r, kBack, 0);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, ranks = Net::ranks(r);
  if (warp == 0) entries.add_up(ranks, [&](int rank) { return p.arrived[rank]; });
  const auto taken = [&](int rank) { return net.taken(r, call, rank); };
  if (!block_wait<Net>(r, taken, call.epoch - 1)) return;
  const int items = entries.starts[ranks] * p.pieces;
  for (int item = blockIdx.x + gridDim.x * warp; item < items; item += gridDim.x * kWarps) {
    const int i = item / p.pieces, piece = item % p.pieces, begin = piece * p.piece;
    const int source = entries.source_of(i, ranks), columns = min(p.piece, p.hidden - begin);
    const int64_t entry = static_cast<int64_t>(source) * r.window_tokens + i - entries.starts[source];
    const int found = lane < p.topk ? p.rows[entry * p.topk + lane] : -1;
    const int count = __popc(__ballot_sync(kAllLanes, found >= 0));
    const Y* const row = static_cast<const Y*>(p.y) + static_cast<int64_t>(max(found, 0)) * p.hidden + begin;
    const int token = p.tokens[entry];
    Slot* const slot = net.outbox(r, call, source, token, piece);
    sum_rows<false, Y, S>(reinterpret_cast<S*>(slot->data), columns, row, count, 0,
                          rows_ahead + warp * (kWarpBytes / 16));
    net.put(
        r, call, static_cast<typename Net::Mask>(typename Net::Mask{1} << source), [&](int) { return token; }, piece,
        offsetof(Slot, data) + columns * static_cast<int>(sizeof(S)));
  }
  finish(r, net, call, [&](int rank) { net.tell_arrived(r, call, rank, 0); });
}

template <class Y>
__device__ __forceinline__ void spoil(const ReceiveSumsParams& p) {
  fill_nan(p.out, static_cast<int64_t>(p.own.tokens) * p.hidden * sizeof(Y));
}

template <bool kNodes, class Y, class S, class Net>
__global__ void __launch_bounds__(kThreads, 1)
    receive_sums_kernel(const __grid_constant__ Rings r, const __grid_constant__ Net net,
                        const __grid_constant__ ReceiveSumsParams p) {
  extern __shared__ uint4 rows_ahead[];  // [warp][kWarpBytes / 16]
  wait_for_inputs();
  if (has_failed(r)) return spoil<Y>(p);
  const Half call(r, kBack, 1);
  const auto arrived = [&](int rank) { return net.arrived(r, call, rank); };
  if (!block_wait<Net>(r, arrived, call.epoch + 1)) return spoil<Y>(p);
  const int warp = threadIdx.x / kWarpSize;
  const int items = p.own.tokens * p.pieces;
  for (int item = blockIdx.x + gridDim.x * warp; item < items; item += gridDim.x * kWarps) {
    const int token = item / p.pieces, piece = item % p.pieces, begin = piece * p.piece;
    const uint64_t mask = p.own.template ranks<typename Net::Mask>(token);
    const auto slot_of = [&](int rank) { return net.inbox(r, call, rank, token, piece); };
    const Parts parts = parts_of(p.ranks_per_node, mask, slot_of);
    sum_rows<kNodes, S, S>(static_cast<Y*>(p.out) + static_cast<int64_t>(token) * p.hidden + begin,
                           min(p.piece, p.hidden - begin), reinterpret_cast<const S*>(parts.slot->data), __popcll(mask),
                           parts.ends, rows_ahead + warp * (kWarpBytes / 16));
  }
  finish(r, net, call, [&](int rank) { net.tell_taken(r, call, rank); });
}

// comm_send_sums (ops.h), on the windows of a node or of several.
template <class Net>
void send_sums(const Tensor& y, const Tensor& arrived, const Tensor& tokens, const Tensor& entry_rows, bool fp32_sums,
               const Rings& r, const Net& net, cudaStream_t stream) {
  const int ranks = group_size(r);
  DSV3_CHECK(y.dim() == 3 && entry_rows.dim() == 3, "y must be (experts, room, hidden), got ", y);
  check_operand("y", y, y.dtype());
  check_operand("arrived", arrived, Dtype::kInt32, ranks);
  check_operand("tokens", tokens, Dtype::kInt32, ranks, r.window_tokens);
  check_operand("entry_rows", entry_rows, Dtype::kInt32, ranks, r.window_tokens, entry_rows.size(2));
  const DeviceGuard guard(y);
  SendSumsParams p{.y = y.data<void>(),
                   .arrived = arrived.data<int>(),
                   .tokens = tokens.data<int>(),
                   .rows = entry_rows.data<int>(),
                   .topk = static_cast<int>(entry_rows.size(2)),
                   .hidden = static_cast<int>(y.size(2))};
  visit_float("y", y.dtype(), [&](auto zero) {
    using Y = decltype(zero);
    DSV3_CHECK(p.hidden % Vec<Y>::kSize == 0, "hidden must be a multiple of ", Vec<Y>::kSize, ", got ", p.hidden);
    const bool narrow = sizeof(Y) == 2 && !fp32_sums;
    divide(r, p, narrow ? 2 : 4, kSumStep);
    const Launch shape = of_windows(r, kWarps * kWarpBytes);
    narrow ? launch("comm_send_sums", send_sums_kernel<Y, __nv_bfloat16, Net>, shape, stream, r, net, p)
           : launch("comm_send_sums", send_sums_kernel<Y, float, Net>, shape, stream, r, net, p);
  });
}

template <class Net>
void receive_sums(const Tensor& out, const Tensor& topk_idx, int64_t num_experts, int64_t ranks_per_node,
                  bool fp32_sums, const Rings& r, const Net& net, cudaStream_t stream) {
  ReceiveSumsParams p{.own = own_tokens(r, topk_idx, num_experts),
                      .out = out.data<void>(),
                      .hidden = static_cast<int>(out.size(1)),
                      .ranks_per_node = static_cast<int>(ranks_per_node)};
  check_operand("out", out, out.dtype(), p.own.tokens, p.hidden);
  const DeviceGuard guard(out);
  visit_float("out", out.dtype(), [&](auto zero) {
    using Y = decltype(zero);
    DSV3_CHECK(p.hidden % Vec<Y>::kSize == 0, "hidden must be a multiple of ", Vec<Y>::kSize, ", got ", p.hidden);
    const bool narrow = sizeof(Y) == 2 && !fp32_sums;
    divide(r, p, narrow ? 2 : 4, kSumStep);
    const Launch shape = of_windows(r, kWarps * kWarpBytes);
    visit_sums<Y>(narrow, ranks_per_node < group_size(r), [&](auto zero, auto nodes) {
      launch("comm_receive_sums", receive_sums_kernel<nodes(), Y, decltype(zero), Net>, shape, stream, r, net, p);
    });
  });
}

}  // namespace dsv3::windows
