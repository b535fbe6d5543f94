// The way of dispatch for the few tokens of a decoding step, by two kernels: one sends and is over, a later one receives, and no
// multiprocessor waits in between. Every token of every rank has its slot, so nobody must be asked before or waits for room:
//
//   comm_send          tokens, cast where the wire is FP8, to slots at each rank that needs them; then a flag for every rank
//   comm_receive       waits for the flags; rows of a slot to x[g, i] of its local experts g, i counting their tokens by rank,
//                      then by token; counts[g]
//
// and back in low_latency_sums.cuh. Bytes that count are those of comm_dispatch; between them slots pass through the L2 cache.
// What remains is latency: two warps cast a token, whose loads are all on their way at once; otherwise a warp has one token or
// slot.
#pragma once

#include <optional>

#include "rows.cuh"
#include "windows.cuh"

namespace dsv3::windows {

constexpr int kParts = 2;  // warps that cast a token

struct SendParams {
  OwnTokens own;
  const void* x;         // [T, H]
  const float* weights;  // [T, k]
  int hidden, piece, pieces;
  ScaleRule rule;
};

struct ReceiveParams {
  RowTarget to;  // [G * R, H]
  float* sf;     // [tiles][sf_stride], or null
  int64_t sf_stride;
  float* row_weights;  // [G, R]
  int* counts;         // [G]
  int* arrived;        // [N]: tokens that came from every rank
  int* tokens;         // [N, M]: which
  int* rows;           // [N, M, k]: their rows, ascending; -1 for none
  int topk, local_experts, room;
  int hidden, piece, pieces;
};

// A number for every rank, that of rank r in lane r % 32.
template <class Net>
struct OfRanks {
  int lanes[ceil_div(Net::kMost, kWarpSize)] = {};
  // By a whole warp.
  __device__ __forceinline__ int of(int rank) const {
    int found = 0;
#pragma unroll
    for (int i = 0; i < ceil_div(Net::kMost, kWarpSize); ++i) {
      if (i == rank / kWarpSize) found = lanes[i];
    }
    return __shfl_sync(kAllLanes, found, rank % kWarpSize);
  }
  // By the lane that has it: calls f(rank, number) for each rank of the mask.
  template <class F>
  __device__ __forceinline__ void visit(typename Net::Mask mask, F&& f) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < ceil_div(Net::kMost, kWarpSize); ++i) {
      if (mask >> (i * kWarpSize) >> lane & 1) f(i * kWarpSize + lane, lanes[i]);
    }
  }
};

// How many of the first `end` tokens a rank needs.
template <class Net>
__device__ __forceinline__ OfRanks<Net> tokens_before(const typename Net::Mask* needs, int end, int ranks) {
  const int lane = threadIdx.x % kWarpSize;
  OfRanks<Net> found;
  for (int first = 0; first < end; first += kWarpSize) {
    const typename Net::Mask mask = first + lane < end ? needs[first + lane] : 0;
    for (int rank = 0; rank < ranks; ++rank) {
      const int count = __popc(__ballot_sync(kAllLanes, mask >> rank & 1));
#pragma unroll
      for (int i = 0; i < ceil_div(Net::kMost, kWarpSize); ++i) {
        if (i * kWarpSize + lane == rank) found.lanes[i] += count;
      }
    }
  }
  return found;
}

// The warps that share a token.
__device__ __forceinline__ void sync_parts(int pair) {
  asm volatile("bar.sync %0, %1;" ::"r"(pair + 1), "n"(kParts * kWarpSize) : "memory");
}

template <class Way, class Net>
__global__ void __launch_bounds__(kThreads, 1)
    send_kernel(const __grid_constant__ Rings r, const __grid_constant__ Net net,
                const __grid_constant__ SendParams p) {
  extern __shared__ __align__(128) char memory[];  // a slot for every kParts warps
  __shared__ typename Net::Mask needs[kMaxWindowTokens];
  using X = typename Way::X;
  wait_for_inputs();
  if (has_failed(r)) return;
  const Half call(r, kThere, 0);
  for (int t = threadIdx.x; t < p.own.tokens; t += kThreads) {
    needs[t] = p.own.template ranks<typename Net::Mask>(t);
  }
  const auto taken = [&](int rank) { return net.taken(r, call, rank); };
  if (!block_wait<Net>(r, taken, call.epoch - 1)) return;  // of the last call but one
  const int team = threadIdx.x / kWarpSize / kParts, part = threadIdx.x / kWarpSize % kParts;
  const int lane = threadIdx.x % kWarpSize;
  Slot* const stage = reinterpret_cast<Slot*>(memory) + team;
  for (int token = blockIdx.x + gridDim.x * team; token < p.own.tokens; token += gridDim.x * (kWarps / kParts)) {
    const X* const x = static_cast<const X*>(p.x) + static_cast<int64_t>(token) * p.hidden;
    const typename Net::Mask mask = needs[token];
    Pair pair{.rank = -1, .place = 0, .row = 0, .weight = 0.f};
    if (lane < p.own.topk) {
      const int64_t at = static_cast<int64_t>(token) * p.own.topk + lane;
      const int expert = p.own.expert(at);
      pair.rank = expert / p.own.local_experts;
      pair.row = expert % p.own.local_experts;
      pair.weight = p.weights[at];
    }
    pair = placed(pair, p.own.topk);
    const OfRanks<Net> places = tokens_before<Net>(needs, token, Net::ranks(r));
    for (int piece = 0; piece < p.pieces; ++piece) {
      const int begin = piece * p.piece, columns = min(p.piece, p.hidden - begin);
      fill_slot<Way, 16, kParts>(stage, p.rule, x + begin, columns, pair, token, p.own.topk, part);
      sync_parts(team);
      if (part == 0) {
        const int bytes = slot_bytes<Way>(columns);
        places.visit(mask,
                     [&](int rank, int place) { bulk_store(net.outbox(r, call, rank, place, piece), stage, bytes); });
        net.put(r, call, mask, [&](int rank) { return places.of(rank); }, piece, bytes);
      }
      wait_bulk_stores_read<0>();
      sync_parts(team);
    }
  }
  wait_bulk_stores();
  const OfRanks<Net> totals = tokens_before<Net>(needs, p.own.tokens, Net::ranks(r));
  finish(r, net, call, [&](int rank) {
    net.tell_arrived(r, call, rank, totals.lanes[Net::kMost > kWarpSize ? rank / kWarpSize : 0]);
  });
}

// A bit for every local expert of an entry: word w of entry i at bits[w * entries + i].
template <class Net>
__device__ __forceinline__ void fill_bits(const Rings& r, const Net& net, const Half& call, const Entries<Net>& entries,
                                          int total, int words, unsigned* bits) {
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int source = entries.source_of(i, Net::ranks(r));
    const Meta& meta = net.inbox(r, call, source, i - entries.starts[source], 0)->meta;
    for (int w = 0; w < words; ++w) bits[w * total + i] = 0;
#pragma unroll
    for (int j = 0; j < kMaxTopk; ++j) {  // loads of all are on their way at once
      const int expert = __ldcg(&meta.rows[j]);
      if (__ldcg(&meta.ranks[j]) == Net::self(r)) bits[expert / 32 * total + i] |= 1u << expert % 32;
    }
  }
}

// How many of the first `end` entries have the expert; by a warp.
__device__ __forceinline__ int entries_before(const unsigned* bits, int total, int expert, int end) {
  const unsigned* const word = bits + expert / 32 * total;
  int found = 0;
  for (int first = 0; first < end; first += kWarpSize) {
    const int i = first + static_cast<int>(threadIdx.x % kWarpSize);
    found += __popc(__ballot_sync(kAllLanes, i < end && (word[i] >> expert % 32 & 1)));
  }
  return found;
}

// Scales where they belong: a warp takes 32 rows of an expert, a lane each, so that all lines are written whole.
template <class Net>
__device__ __forceinline__ void write_scales(const Rings& r, const Net& net, const ReceiveParams& p, const Half& call,
                                             const Entries<Net>& entries, const unsigned* bits, int total) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int items = p.local_experts * ceil_div(total, kWarpSize);
  for (int item = blockIdx.x + gridDim.x * warp; item < items; item += gridDim.x * kWarps) {
    const int expert = item % p.local_experts, index = item / p.local_experts * kWarpSize + lane;
    int entry = -1;  // of this row
    for (int first = 0, found = 0; first < total && found <= index - lane + kWarpSize - 1; first += kWarpSize) {
      const int i = first + lane;
      const unsigned has = __ballot_sync(kAllLanes, i < total && (bits[expert / 32 * total + i] >> expert % 32 & 1));
      if (index >= found && index < found + __popc(has)) entry = first + __fns(has, 0, index - found + 1);
      found += __popc(has);
    }
    if (entry < 0) continue;
    const int source = entries.source_of(entry, Net::ranks(r)), place = entry - entries.starts[source];
    for (int begin = 0, piece = 0; begin < p.hidden; begin += p.piece, ++piece) {
      const Slot* const slot = net.inbox(r, call, source, place, piece);
      const int tiles = ceil_div(min(p.piece, p.hidden - begin), kTile);
      float* const out = p.sf + begin / kTile * p.sf_stride + expert * p.room + index;
      float4 sf[kPieceTiles / 4];
#pragma unroll
      for (int i = 0; i < kPieceTiles / 4; ++i) {  // all on their way at once
        if (i * 4 < tiles) sf[i] = __ldcg(reinterpret_cast<const float4*>(slot->sf) + i);
      }
#pragma unroll
      for (int tile = 0; tile < kPieceTiles; ++tile) {
        const float4& four = sf[tile / 4];
        const float values[4] = {four.x, four.y, four.z, four.w};
        if (tile < tiles) out[tile * p.sf_stride] = values[tile % 4];
      }
    }
  }
}

// A rank was waited for in vain: no rows.
template <class Net>
__device__ __forceinline__ void leave_empty(const Rings& r, const ReceiveParams& p) {
  for (int expert = threadIdx.x; expert < p.local_experts; expert += kThreads) p.counts[expert] = 0;
  if (threadIdx.x < Net::ranks(r)) p.arrived[threadIdx.x] = 0;
}

template <class Way, class Net>
__global__ void __launch_bounds__(kThreads, 1)
    receive_kernel(const __grid_constant__ Rings r, const __grid_constant__ Net net,
                   const __grid_constant__ ReceiveParams p) {
  extern __shared__ __align__(128) char memory[];  // a slot for every warp, then the bits
  __shared__ uint64_t there[kWarps];
  __shared__ Entries<Net> entries;
  if (threadIdx.x == 0) init_boxes(there);
  wait_for_inputs();
  if (has_failed(r)) return leave_empty<Net>(r, p);
  const Half call(r, kThere, 1);
  const auto arrived = [&](int rank) { return net.arrived(r, call, rank); };
  if (!block_wait<Net>(r, arrived, call.epoch + 1)) return leave_empty<Net>(r, p);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, ranks = Net::ranks(r);
  if (warp == 0) entries.add_up(ranks, [&](int rank) { return net.count(r, call, rank); });
  __syncthreads();
  const int total = entries.starts[ranks], words = ceil_div(p.local_experts, 32);
  Box box(reinterpret_cast<Slot*>(memory) + warp, &there[warp]);
  unsigned* const bits = reinterpret_cast<unsigned*>(reinterpret_cast<Slot*>(memory) + kWarps);
  fill_bits(r, net, call, entries, total, words, bits);
  __syncthreads();
  for (int expert = blockIdx.x + gridDim.x * warp; expert < p.local_experts; expert += gridDim.x * kWarps) {
    const int count = entries_before(bits, total, expert, total);
    if (lane == 0) p.counts[expert] = count;
  }
  if (blockIdx.x == 0 && threadIdx.x < ranks) {
    p.arrived[threadIdx.x] = entries.starts[threadIdx.x + 1] - entries.starts[threadIdx.x];
  }
  for (int i = blockIdx.x + gridDim.x * warp; i < total; i += gridDim.x * kWarps) {
    const int source = entries.source_of(i, ranks), place = i - entries.starts[source];
    Here here;
    int row = -1;
    for (int piece = 0; piece < p.pieces; ++piece) {
      const int first = piece * p.piece, columns = min(p.piece, p.hidden - first);
      box.take(net.inbox(r, call, source, place, piece), slot_bytes<Way>(columns));
      if (piece == 0) {
        const Meta& meta = box.slot->meta;
        here = pairs_here(meta, Net::self(r));
        for (int j = 0; j < here.count; ++j) {
          const int expert = meta.rows[here.first + j], index = entries_before(bits, total, expert, i);
          if (lane == j) row = expert * p.room + index;
        }
        const int64_t entry = static_cast<int64_t>(source) * r.window_tokens + place;
        if (lane == 0) p.tokens[entry] = meta.token;
        if (lane < p.topk) p.rows[entry * p.topk + lane] = row;
        if (lane < here.count) p.row_weights[row] = meta.weights[here.first + lane];
      }
      write_rows<Way>(p.to, box.slot, first, columns, here.count, row, false);
    }
  }
  if constexpr (Way::kCast) write_scales(r, net, p, call, entries, bits, total);
  wait_bulk_stores();
  finish(r, net, call, [&](int rank) { net.tell_taken(r, call, rank); });
}

// Shared memory of a block that receives.
inline size_t receive_bytes(const Rings& r, int64_t local_experts) {
  const size_t bits = size_t(group_size(r)) * r.window_tokens * ceil_div(local_experts, 32) * sizeof(unsigned);
  const size_t smem = kWarps * sizeof(Slot) + bits;
  DSV3_CHECK(smem <= 226 * 1024 - (kMaxGroup + 1) * sizeof(int), group_size(r), " ranks of ", r.window_tokens,
             " tokens and ", local_experts, " local experts are more than a block has memory for");
  return smem;
}

// comm_send (ops.h), on the windows of a node or of several.
template <class Net>
void send(const Tensor& x, const Tensor& weights, const Tensor& topk_idx, int64_t num_experts, bool cast,
          double amax_floor, const Rings& r, const Net& net, cudaStream_t stream) {
  SendParams p{.own = own_tokens(r, topk_idx, num_experts), .rule = scale_rule(amax_floor, true)};
  DSV3_CHECK(x.dim() == 2, "x must be (tokens, hidden), got ", x);
  receive_bytes(r, p.own.local_experts);  // before anything is sent
  check_operand("x", x, x.dtype(), p.own.tokens, x.size(1));
  check_operand("weights", weights, Dtype::kFloat32, p.own.tokens, p.own.topk);
  const int size = x.dtype() == Dtype::kFloat32 ? 4 : 2;
  DSV3_CHECK(x.size(1) * size % 16 == 0 && (!cast || x.size(1) % 16 == 0),
             "hidden does not fill vectors of 16 bytes: ", x.size(1));
  const DeviceGuard guard(x);
  p.x = x.data<void>();
  p.weights = weights.data<float>();
  p.hidden = static_cast<int>(cast ? x.size(1) : x.size(1) * size / 16);
  cast ? divide(r, p, 1, kPieceStep) : divide(r, p, 16, 1);
  const Launch shape = of_windows(r, kWarps / kParts * sizeof(Slot));
  if (!cast) return launch("comm_send", send_kernel<Words, Net>, shape, stream, r, net, p);
  visit_float("x", x.dtype(), [&](auto zero) {
    launch("comm_send", send_kernel<Codes<decltype(zero), false>, Net>, shape, stream, r, net, p);
  });
}

// As of comm_receive (ops.h).
struct ReceiveTensors {
  Tensor rows;
  std::optional<Tensor> sf;
  Tensor row_weights, counts, arrived, tokens, entry_rows;
};

template <class Net>
void receive(const ReceiveTensors& t, const Rings& r, const Net& net, cudaStream_t stream) {
  const auto& [rows, sf, row_weights, counts, arrived, tokens, entry_rows] = t;
  const int ranks = group_size(r);
  DSV3_CHECK(rows.dim() == 3 && entry_rows.dim() == 3, "rows must be (experts, room, hidden), got ", rows);
  const int64_t experts = rows.size(0), room = rows.size(1), hidden = rows.size(2), topk = entry_rows.size(2);
  DSV3_CHECK(room >= int64_t{ranks} * r.window_tokens && experts * room < (int64_t{1} << 31),
             "rows must have room for the tokens of all ranks, got ", rows);
  check_operand("rows", rows, rows.dtype());
  check_operand("row_weights", row_weights, Dtype::kFloat32, experts, room);
  check_operand("counts", counts, Dtype::kInt32, experts);
  check_operand("arrived", arrived, Dtype::kInt32, ranks);
  check_operand("tokens", tokens, Dtype::kInt32, ranks, r.window_tokens);
  check_operand("entry_rows", entry_rows, Dtype::kInt32, ranks, r.window_tokens, topk);
  DSV3_CHECK(topk >= 1 && topk <= kMaxTopk, "topk must be in 1..", kMaxTopk, ", got ", topk);
  const bool cast = sf.has_value();
  const int size = cast ? 1 : rows.dtype() == Dtype::kFloat32 ? 4 : 2;
  const DeviceGuard guard(rows);
  ReceiveParams p{.to = {.rows = rows.data<void>(), .num_rows = static_cast<int>(experts * room)},
                  .row_weights = row_weights.data<float>(),
                  .counts = counts.data<int>(),
                  .arrived = arrived.data<int>(),
                  .tokens = tokens.data<int>(),
                  .rows = entry_rows.data<int>(),
                  .topk = static_cast<int>(topk),
                  .local_experts = static_cast<int>(experts),
                  .room = static_cast<int>(room),
                  .hidden = static_cast<int>(cast ? hidden : hidden * size / 16)};
  p.to.hidden = p.hidden;
  cast ? divide(r, p, 1, kPieceStep) : divide(r, p, 16, 1);
  if (cast) {
    DSV3_CHECK(rows.dtype() == Dtype::kE4M3 && sf->dim() == 3 && sf->dtype() == Dtype::kFloat32 &&
                   sf->size(0) == experts && sf->size(1) == room && sf->size(2) == ceil_div(hidden, kTile) &&
                   sf->stride(0) == room && (room == 1 || sf->stride(1) == 1),
               "sf must be (experts, room, tiles) with strides (room, 1, ...) beside rows in e4m3, got ", *sf);
    p.to.codes = rows.data<uint8_t>();
    p.sf = sf->data<float>();
    p.sf_stride = sf->stride(2);
  }
  const Launch shape = of_windows(r, receive_bytes(r, experts));
  if (!cast) return launch("comm_receive", receive_kernel<Words, Net>, shape, stream, r, net, p);
  launch("comm_receive", receive_kernel<Codes<__nv_bfloat16, false>, Net>, shape, stream, r, net, p);
}

}  // namespace dsv3::windows
