// Tokens to the rows of their experts on the ranks of a node.
//
// Warps of a block, all by themselves: some read a piece of a token once, cast it where the wire is FP8, and put it into a slot
// in shared memory, with the token's rows at all ranks. One takes these slots in their order and has bulk copies bring each to
// the rings of the ranks that need it: lane r serves rank r. The rest receive: a bulk copy brings a slot of a ring to shared
// memory, others bring it from there to all its rows. A receiver serves one source alone and takes whatever comes, so rings
// always drain; a ring's slot is free once it lies in shared memory. Tokens for the own rank go to their rows without a ring.
//
// Bytes that count: x read once, every row written once; beside them each (token, rank) passes a slot. Memory-bound.
#include "../ops.h"
#include "rows.cuh"

namespace dsv3 {
namespace {

constexpr int kCasters = 10, kReceivers = 16;  // warps; the first of the block is the sender
constexpr int kThreads = (1 + kCasters + kReceivers) * kWarpSize;
static_assert(kReceivers >= kMaxRanks);
constexpr int kStages = 10;          // slots between casters and sender
constexpr int kFlight = 5;           // of them on their way at once
constexpr int kAhead = 8;            // slots of a ring that are looked at together for room
static_assert(kCasters == kStages);  // each has its stage, so that it is never more than a phase of the barriers ahead

struct DispatchParams {
  OwnTokens own;
  const void* x;         // [T, H]
  const int64_t* pairs;  // [T, k]: each pair's place in the own order by expert
  const int* shift;      // [E]
  const float* weights;  // [T, k], or null
  RowTarget to;          // [R, H], scales [R, tiles]
  float* row_weights;    // [R], or null
  int64_t* position;     // [N * max_tokens, k], or null
  const int* arrivals;   // [N, C]
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
  const Here here = pairs_here(meta, r.rank);
  const int row = lane < here.count ? meta.rows[here.first + lane] : 0;
  if (piece == 0 && lane < here.count && p.position != nullptr) {
    const int64_t token = static_cast<int64_t>(source) * p.max_tokens + meta.token;
    p.position[token * p.own.topk + lane] = row < num_rows ? row : row + 1;
    if (row < num_rows) p.row_weights[row] = meta.weights[here.first + lane];
  }
  write_rows<Way>(p.to, slot, begin, min(p.piece, p.hidden - begin), here.count, row, spoiled);
}

struct Memory {
  Slot stages[kStages], boxes[kReceivers];
  uint64_t full[kStages], empty[kStages], there[kReceivers];
  volatile bool stopped;  // the sender has given up

  __device__ __forceinline__ void init() {
    for (int i = 0; i < kStages; ++i) {
      cutlass::arch::ClusterBarrier::init(&full[i], 1);
      cutlass::arch::ClusterBarrier::init(&empty[i], 1);
    }
    init_boxes(there);
    stopped = false;
  }
};

// Whether the stage of slot n has passed; the same for all lanes.
__device__ __forceinline__ bool has_passed(const uint64_t* barriers, int n, int flip) {
  const uint32_t parity = n / kStages % 2 ^ flip;
  return __all_sync(kAllLanes, cutlass::arch::ClusterBarrier::try_wait(&barriers[n % kStages], parity));
}

// Slot n of the channel's, in the order of its tokens, goes through stage n % kStages.
// direct: the own rank's rows are written from there.
template <class Way>
__device__ __forceinline__ void cast(const Rings& r, const DispatchParams& p, int warp, bool direct, Memory& memory) {
  using cutlass::arch::ClusterBarrier;
  for (int n = warp;; n += kCasters) {
    const int token = blockIdx.x + n / p.pieces * r.channels, begin = n % p.pieces * p.piece;
    if (token >= p.own.tokens) break;
    const typename Way::X* const x = static_cast<const typename Way::X*>(p.x) + static_cast<int64_t>(token) * p.hidden;
    const Pair pair = pair_of(p, token);
    while (!has_passed(memory.empty, n, 1)) {
      if (__any_sync(kAllLanes, memory.stopped)) return wait_bulk_stores();
    }
    wait_bulk_stores_read<0>();
    __syncwarp();
    Slot* const stage = &memory.stages[warp];
    fill_slot<Way>(stage, p.rule, x + begin, min(p.piece, p.hidden - begin), pair, token, p.own.topk);
    if (threadIdx.x % kWarpSize == 0) ClusterBarrier::arrive(&memory.full[warp]);
    if (direct) deliver<Way>(r, p, r.rank, stage, n % p.pieces, false);
  }
  wait_bulk_stores();
}

// Lane s counts the ring to rank s from `next` on; returns the count at the end. direct: there is none to the own rank.
template <class Way>
__device__ __forceinline__ uint32_t send(const Rings& r, const DispatchParams& p, uint32_t next, bool direct,
                                         Memory& memory) {
  using cutlass::arch::ClusterBarrier;
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  int landed = 0, flying = 0;  // slots of the channel
  uint32_t first = next;       // of this lane's ring on their way
  int mine = 0;
  uint32_t checked = next;  // those before it have room
  const auto look = [&](uint32_t item) {
    uint32_t seen[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) seen[i] = load_relaxed(done_flag(r, r.rank, lane, channel, item + i));
    bool more = true;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      more = more && static_cast<int32_t>(seen[i] - (item + i + 1 - r.slots)) >= 0;
      if (more) checked = item + i + 1;
    }
  };
  const auto land = [&] {
    wait_bulk_stores();
    if (mine > 0) __threadfence_system();
    for (; mine > 0; --mine, ++first) store_relaxed(ready_flag(r, lane, r.rank, channel, first), first + 1);
    __syncwarp();
    if (lane < flying) ClusterBarrier::arrive(&memory.empty[(landed + lane) % kStages]);
    landed += flying;
    flying = 0;
  };
  const unsigned served = direct ? ~(1u << r.rank) : kAllLanes;
  next = for_own_tokens(r, p.own, p.pieces, next, 0, 1, served, [&](int, unsigned mask, uint32_t item) {
    const bool used = mask >> lane & 1;
    for (int piece = 0; piece < p.pieces; ++piece, ++item) {
      const int n = landed + flying, stage = n % kStages, columns = min(p.piece, p.hidden - piece * p.piece);
      while (!has_passed(memory.full, n, 0)) {
        if (flying > 0) land();
      }
      if (used && item == checked) look(item);
      const bool full = used && item == checked;
      if (__any_sync(kAllLanes, full)) {
        land();
        const uint32_t* const done = done_flag(r, r.rank, lane, channel, item);
        if (!warp_wait<true>(r, full, done, item + 1 - r.slots, lane)) return false;
        if (full) ++checked;
      }
      if (used) {
        bulk_store(ring_slot(r, lane, r.rank, channel, item), &memory.stages[stage], slot_bytes<Way>(columns));
        if (mine++ == 0) first = item;
      }
      if (++flying == kFlight) land();
    }
    return true;
  });
  land();
  return next;
}

template <class Way>
__device__ __forceinline__ void receive(const Rings& r, const DispatchParams& p, int warp, bool direct, bool spoiled,
                                        Box box) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  const int sharing = kReceivers / r.ranks, source = warp / sharing;  // warps that serve a source
  if (source >= r.ranks || (direct && source == r.rank)) return;
  const int items = p.arrivals[source * r.channels + channel] * p.pieces;
  const uint32_t begin = local_of(r, r.rank)->received[source][channel];
  for (int i = warp % sharing; i < items; i += sharing) {
    const uint32_t item = begin + i;
    const int piece = i % p.pieces, columns = min(p.piece, p.hidden - piece * p.piece);
    if (!warp_wait(r, true, ready_flag(r, r.rank, source, channel, item), item + 1, source)) break;
    box.take(ring_slot(r, r.rank, source, channel, item), slot_bytes<Way>(columns));
    if (lane == 0) store_relaxed(done_flag(r, source, r.rank, channel, item), item + 1);
    deliver<Way>(r, p, source, box.slot, piece, spoiled);
  }
  wait_bulk_stores();
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

template <class Way>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ Rings r, const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) char shared[];
  Memory& memory = *reinterpret_cast<Memory*>(shared);
  if (threadIdx.x == 0) memory.init();
  __syncthreads();
  wait_for_inputs();
  Local* const local = local_of(r, r.rank);
  const int warp = threadIdx.x / kWarpSize, rank = threadIdx.x;  // of a thread that counts
  if (has_failed(r)) return spoil<Way>(p);
  const bool spoiled = *p.total > p.to.num_rows, direct = !Way::kDecode && !spoiled;
  uint32_t next = rank < r.ranks ? local->sent[rank][blockIdx.x] : 0;
  if (warp == 0) {
    next = send<Way>(r, p, next, direct, memory);
    memory.stopped = true;
  } else if (warp <= kCasters) {
    cast<Way>(r, p, warp - 1, direct, memory);
  } else {
    const int receiver = warp - 1 - kCasters;
    receive<Way>(r, p, receiver, direct, spoiled, Box(&memory.boxes[receiver], &memory.there[receiver]));
  }
  if (has_failed(r)) return spoil<Way>(p);
  if (rank < r.ranks) {
    local->sent[rank][blockIdx.x] = next;
    if (!direct || rank != r.rank) {
      local->received[rank][blockIdx.x] += p.arrivals[rank * r.channels + blockIdx.x] * p.pieces;
    }
  }
}

// x_sf[row, tile] = sf[row, tile] with strides (1, sf_stride) and (padded_tiles, 1): written row by row each scale would fill a
// sector of its own.
constexpr int kScaleRows = 128, kScaleThreads = 1024;
__global__ void __launch_bounds__(kScaleThreads)
    order_scales_kernel(float* x_sf, int64_t sf_stride, const float* sf, const int* total, int num_rows, int tiles) {
  extern __shared__ float block[];  // [padded tiles][kScaleRows + 1]
  wait_for_inputs();
  const int rows = min(*total, num_rows);
  for (int first = blockIdx.x * kScaleRows; first < rows; first += gridDim.x * kScaleRows) {
    const int count = min(kScaleRows, rows - first);
    const int vectors = padded_tiles(tiles) / 4;
    for (int i = threadIdx.x; i < count * vectors; i += kScaleThreads) {
      const int row = i / vectors, tile = i % vectors * 4;
      const float4 four = reinterpret_cast<const float4*>(sf)[static_cast<int64_t>(first) * vectors + i];
      const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) block[(tile + j) * (kScaleRows + 1) + row] = values[j];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kScaleRows * tiles; i += kScaleThreads) {
      const int row = i % kScaleRows, tile = i / kScaleRows;
      if (row < count) x_sf[tile * sf_stride + first + row] = block[tile * (kScaleRows + 1) + row];
    }
    __syncthreads();
  }
}

template <class Way>
void start(const Rings& r, DispatchParams& p, cudaStream_t stream) {
  p.piece = piece_columns(p.hidden, Way::kBytes, Way::kCast ? kPieceStep : 1);
  p.pieces = static_cast<int>(ceil_div(p.hidden, p.piece));
  p.to.hidden = p.hidden;
  const Launch shape{.grid = dim3(r.channels), .block = dim3(kThreads), .smem = sizeof(Memory)};
  launch("comm_dispatch", dispatch_kernel<Way>, shape, stream, r, p);
}

}  // namespace

void comm_dispatch(Tensor rows, std::optional<Tensor> sf, std::optional<Tensor> sf_rows,
                   std::optional<Tensor> row_weights, std::optional<Tensor> position, Tensor x,
                   std::optional<Tensor> weights, Tensor topk_idx, Tensor pairs, Tensor shift, Tensor arrivals,
                   Tensor total, int64_t max_tokens, bool cast, double amax_floor, const Peers& peers,
                   cudaStream_t stream) {
  const Rings& r = peers.rings();
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
  check_operand("arrivals", arrivals, Dtype::kInt32, r.ranks, r.channels);
  check_operand("total", total, Dtype::kInt32);
  DSV3_CHECK(row_weights.has_value() == position.has_value(), "row_weights and position go together");
  if (row_weights) check_operand("row_weights", *row_weights, Dtype::kFloat32, num_rows);
  if (position) check_operand("position", *position, Dtype::kInt64, r.ranks * max_tokens, topk);
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, tokens, topk);
  const DeviceGuard guard(x);
  DispatchParams p{.own = {.topk_idx = topk_idx.data<int64_t>(),
                           .tokens = static_cast<int>(tokens),
                           .topk = static_cast<int>(topk),
                           .local_experts = static_cast<int>(shift.numel() / r.ranks),
                           .experts = static_cast<int>(shift.numel())},
                   .x = x.data<void>(),
                   .pairs = pairs.data<int64_t>(),
                   .shift = shift.data<int>(),
                   .weights = weights ? weights->data<float>() : nullptr,
                   .to = {.rows = rows.data<void>(), .num_rows = static_cast<int>(num_rows)},
                   .row_weights = row_weights ? row_weights->data<float>() : nullptr,
                   .position = position ? position->data<int64_t>() : nullptr,
                   .arrivals = arrivals.data<int>(),
                   .total = total.data<int>() + total.numel() - 1,
                   .max_tokens = static_cast<int>(max_tokens),
                   .hidden = static_cast<int>(hidden),
                   .rule = scale_rule(amax_floor, true)};
  if (!cast) {
    p.hidden = static_cast<int>(hidden * size / 16);
    return start<Words>(r, p, stream);
  }
  const int tiles = static_cast<int>(ceil_div(hidden, kTile));
  const size_t smem = padded_tiles(tiles) * (kScaleRows + 1) * sizeof(float);  // of the kernel that orders scales
  DSV3_CHECK(!sf || smem <= 227 * 1024, "scales of ", hidden, " columns are more than a block has memory for");
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
    sf ? start<Codes<T, false>>(r, p, stream) : start<Codes<T, true>>(r, p, stream);
  });
  if (!sf) return;
  const Launch shape{.grid = dim3(r.channels), .block = dim3(kScaleThreads), .smem = smem};
  launch("comm_dispatch", order_scales_kernel, shape, stream, casts.sf, int64_t{casts.sf_stride}, p.to.sf, p.total,
         p.to.num_rows, tiles);
}

}  // namespace dsv3
