// Tokens to the rows of their experts on the ranks of a node.
//
// A third of a block's warps send: one reads a piece of a token once, casts it where the wire is FP8, and writes it to a slot
// of the ring of every rank that needs it, together with its rows there. The others receive: one takes a slot and writes
// the piece to all these rows. A receiver serves one source alone and takes whatever comes, so rings always drain. Each
// warp has a slot of shared memory: its loads are all on their way at once, and a ring's slot is free once it lies there.
//
// Bytes that count: x read once, every row written once; beside them each (token, rank) passes a slot, of which all that
// are in use fit the L2 cache. Memory-bound.
#include "../ops.h"
#include "rows.cuh"

namespace dsv3 {
namespace {

constexpr int kSenders = 8, kReceivers = 16;  // warps; receivers write twice as much as senders read and write
constexpr int kThreads = (kSenders + kReceivers) * kWarpSize;
static_assert(kReceivers >= kMaxRanks);

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
    const int expert = static_cast<int>(p.own.topk_idx[at]);
    pair.rank = expert / p.own.local_experts;
    pair.row = static_cast<int>(p.pairs[at]) + p.shift[expert];
    if (p.weights != nullptr) pair.weight = p.weights[at];
  }
  return placed(pair, p.own.topk);
}

template <class Way>
__device__ __forceinline__ uint32_t send(const Rings& r, const DispatchParams& p, int warp, uint32_t next,
                                         Slot* stage) {
  using X = typename Way::X;
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  return for_own_tokens(r, p.own, p.pieces, next, warp, kSenders, [&](int token, unsigned mask, uint32_t item) {
    const X* const x = static_cast<const X*>(p.x) + static_cast<int64_t>(token) * p.hidden;
    const bool used = mask >> lane & 1;
    Pair pair;
    for (int piece = 0; piece < p.pieces; ++piece, ++item) {
      const int begin = piece * p.piece, vectors = min(p.piece, p.hidden - begin) / Way::kColumns;
      const uint4* const row = reinterpret_cast<const uint4*>(x + begin);
      ask(stage, row, 0, vectors);
      if (piece == 0) pair = pair_of(p, token);
      const uint32_t* const done = done_flag(r, r.rank, lane, channel, item);
      if (!warp_wait(r, used, done, item + 1 - r.slots, lane)) return false;
      Slot* const slot = used ? ring_slot(r, lane, r.rank, channel, item) : nullptr;
      send_piece<Way>(p.rule, row, vectors, mask, slot, stage);
      send_meta(pair, token, mask, slot, stage);
      if (used) store_release(ready_flag(r, lane, r.rank, channel, item), item + 1);
    }
    return true;
  });
}

template <class Way>
__device__ __forceinline__ void receive(const Rings& r, const DispatchParams& p, int warp, Slot* stage) {
  const int lane = threadIdx.x % kWarpSize, channel = blockIdx.x;
  const int sharing = kReceivers / r.ranks, source = warp / sharing;  // warps that serve a source
  if (source >= r.ranks) return;
  const int items = p.arrivals[source * r.channels + channel] * p.pieces;
  const uint32_t begin = local_of(r, r.rank)->received[source][channel];
  const int num_rows = p.to.num_rows;
  const bool spoiled = *p.total > num_rows;
  for (int i = warp % sharing; i < items; i += sharing) {
    const uint32_t item = begin + i;
    const int piece = i % p.pieces, first = piece * p.piece, columns = min(p.piece, p.hidden - first);
    if (!warp_wait(r, true, ready_flag(r, r.rank, source, channel, item), item + 1, source)) return;
    take(stage, ring_slot(r, r.rank, source, channel, item), Way::kCast ? ceil_div(columns, 16) : columns);
    if (lane == 0) store_relaxed(done_flag(r, source, r.rank, channel, item), item + 1);
    const Meta& meta = stage->meta;
    const int row = lane < meta.count ? meta.rows[lane] : 0;
    if (piece == 0 && lane < meta.count && p.position != nullptr) {
      const int64_t token = static_cast<int64_t>(source) * p.max_tokens + meta.token;
      p.position[token * p.own.topk + lane] = row < num_rows ? row : row + 1;
      if (row < num_rows) p.row_weights[row] = meta.weights[lane];
    }
    write_rows<Way>(p.to, stage, first, columns, row, spoiled);
    __syncwarp();
  }
}

// A rank was waited for in vain.
template <class Way>
__device__ __forceinline__ void spoil(const DispatchParams& p) {
  const int64_t values = static_cast<int64_t>(p.to.num_rows) * p.hidden;
  if constexpr (Way::kCast && !Way::kDecode) {
    fill_nan(p.to.codes, values);
    fill_nan(p.to.sf, p.to.num_rows * ceil_div(p.hidden, kTile) * sizeof(float));
  } else {
    fill_nan(p.to.rows, values * sizeof(typename Way::X));
  }
  if (p.row_weights != nullptr) fill_nan(p.row_weights, p.to.num_rows * sizeof(float));
}

template <class Way>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ Rings r, const __grid_constant__ DispatchParams p) {
  extern __shared__ __align__(128) char memory[];  // a slot for every warp
  wait_for_inputs();
  Local* const local = local_of(r, r.rank);
  const int warp = threadIdx.x / kWarpSize, rank = threadIdx.x;  // of a thread that counts
  Slot* const stage = reinterpret_cast<Slot*>(memory) + warp;
  if (local->failed) return spoil<Way>(p);
  uint32_t next = threadIdx.x % kWarpSize < r.ranks ? local->sent[threadIdx.x % kWarpSize][blockIdx.x] : 0;
  if (warp < kSenders) {
    next = send<Way>(r, p, warp, next, stage);
  } else {
    receive<Way>(r, p, warp - kSenders, stage);
  }
  __syncthreads();
  if (*static_cast<volatile uint32_t*>(&local->failed)) return spoil<Way>(p);
  if (rank < r.ranks) {
    local->sent[rank][blockIdx.x] = next;
    local->received[rank][blockIdx.x] += p.arrivals[rank * r.channels + blockIdx.x] * p.pieces;
  }
}

// x_sf[row, tile] = sf[row, tile] with strides (1, sf_stride): written row by row each scale would fill a sector of its own.
constexpr int kScaleRows = 64;
__global__ void __launch_bounds__(256)
    order_scales_kernel(float* x_sf, int64_t sf_stride, const float* sf, const int* total, int num_rows, int tiles) {
  extern __shared__ float block[];  // [tiles][kScaleRows + 1]
  wait_for_inputs();
  const int rows = min(*total, num_rows);
  for (int first = blockIdx.x * kScaleRows; first < rows; first += gridDim.x * kScaleRows) {
    const int count = min(kScaleRows, rows - first);
    for (int i = threadIdx.x; i < count * tiles; i += blockDim.x) {
      block[i % tiles * (kScaleRows + 1) + i / tiles] = sf[static_cast<int64_t>(first) * tiles + i];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kScaleRows * tiles; i += blockDim.x) {
      const int row = i % kScaleRows, tile = i / kScaleRows;
      if (row < count) x_sf[tile * sf_stride + first + row] = block[tile * (kScaleRows + 1) + row];
    }
    __syncthreads();
  }
}

template <class Way>
void start(const Rings& r, DispatchParams& p, int64_t bytes_of_column, cudaStream_t stream) {
  p.piece = piece_columns(p.hidden, static_cast<int>(bytes_of_column));
  p.pieces = static_cast<int>(ceil_div(p.hidden, p.piece));
  p.to.hidden = p.hidden;
  const Launch shape{.grid = dim3(r.channels), .block = dim3(kThreads), .smem = kThreads / kWarpSize * sizeof(Slot)};
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
  DSV3_CHECK(hidden * size % 16 == 0 && (!cast || hidden % 16 == 0),
             "hidden does not fill vectors of 16 bytes: ", hidden);
  DSV3_CHECK(topk >= 1 && topk <= kMaxTopk, "topk must be in 1..", kMaxTopk, ", got ", topk);
  check_operand("x", x, x.dtype());
  check_operand("rows", rows, sf ? Dtype::kE4M3 : x.dtype(), num_rows, hidden);
  check_operand("topk_idx", topk_idx, Dtype::kInt64, tokens, topk);
  check_operand("pairs", pairs, Dtype::kInt64, tokens, topk);
  check_operand("shift", shift, Dtype::kInt32);
  check_operand("arrivals", arrivals, Dtype::kInt32, r.ranks, r.channels);
  check_operand("total", total, Dtype::kInt32);
  if (row_weights) check_operand("row_weights", *row_weights, Dtype::kFloat32, num_rows);
  if (position) check_operand("position", *position, Dtype::kInt64, r.ranks * max_tokens, topk);
  if (weights) check_operand("weights", *weights, Dtype::kFloat32, tokens, topk);
  const DeviceGuard guard(x);
  DispatchParams p{.own = {.topk_idx = topk_idx.data<int64_t>(),
                           .tokens = static_cast<int>(tokens),
                           .topk = static_cast<int>(topk),
                           .local_experts = static_cast<int>(shift.numel() / r.ranks)},
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
    return start<Words>(r, p, 16, stream);
  }
  const int tiles = static_cast<int>(ceil_div(hidden, kTile));
  DSV3_CHECK(sf.has_value() == sf_rows.has_value(), "sf and sf_rows go together");
  RowCasts casts{};
  if (sf) {
    casts = row_casts("rows", rows, "sf", *sf, num_rows, hidden, p.rule);
    check_operand("sf_rows", *sf_rows, Dtype::kFloat32, num_rows, tiles);
    p.to.codes = casts.out;
    p.to.sf = sf_rows->data<float>();
    p.to.sf_row_stride = tiles;
    p.to.sf_tile_stride = 1;
  }
  visit_float("x", x.dtype(), [&](auto zero) {
    using T = decltype(zero);
    sf ? start<Codes<T, false>>(r, p, 1, stream) : start<Codes<T, true>>(r, p, 1, stream);
  });
  if (!sf) return;
  const Launch shape{.grid = dim3(r.channels), .block = dim3(256), .smem = tiles * (kScaleRows + 1) * sizeof(float)};
  launch("comm_dispatch", order_scales_kernel, shape, stream, casts.sf, int64_t{casts.sf_stride}, p.to.sf, p.total,
         p.to.num_rows, tiles);
}

}  // namespace dsv3
