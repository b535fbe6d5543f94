// The backward of SwiGLU (swiglu.cuh) with all casts that the products behind it need, from one read of gate_up and dout:
// the gradient in tiles of 1 x 128, for dgrad, and transposed in tiles of 128 x 1, for the first weight gradient; and the
// forward output, made again, transposed for the second.
//
// Memory-bound: 6 bytes read and 5 written an output. A block takes a tile of 128 tokens by 128 columns of the gate, of the
// up half and of dout (../quant/both_casts.cuh). Each thread copies its own piece of the three to shared memory, 96 KiB in
// all, and writes what it makes of them over it, rounded as they would have been stored; it comes back for the maxima and,
// when their scales are known, for the codes. So registers hold one pack of each at a time, and while one block waits for
// its tile, the other of the multiprocessor converts. dw is left in parts of 64 columns, the 8 packs of a warp.
#include "../ops.h"
#include "../quant/both_casts.cuh"
#include "swiglu.cuh"

namespace dsv3 {
namespace {

using T = __nv_bfloat16;
constexpr int kSize = Pack<T>::kSize;
constexpr int kThreads = Shape<T>::kThreads;
constexpr ScaleRule kOutRule = {1e-4f, false};  // of the forward output: cast_transpose's own default

struct BothCastsParams {
  const T* dout;         // [T, I]
  const T* gate_up;      // [T, 2I]
  const float* weights;  // [T] or null
  float* dweights;       // [I / 64, T] or null
  int inner;             // I
  Groups groups;
  RowCasts rows;        // of dgate_up
  ColumnCasts columns;  // of dgate_up
  ColumnCasts out;      // of the forward output
  uint32_t column_tiles;
};

// The three of a tile: what is read, then what is made of it, then the codes of their columns.
enum Part { kGate, kUp, kOut, kParts };  // kOut: dout, then the forward output

struct Shared {
  uint4 packs[kParts][kTile][Shape<T>::kPacks];
  ColumnScales<T> columns[kParts];
  RowScales<T> rows[2];
};
static_assert(2 * (sizeof(Shared) + 1024) <= 228 * 1024, "two blocks share a multiprocessor");
using Bytes = ByteTile<T, Shape<T>::kPacks>;

// Where the codes of a part lie: those of the gate and of the output in the gate's packs, those of up in its own. Whoever
// writes them waits until the packs have been read.
__device__ __forceinline__ Bytes& bytes(Shared& shared, Part part) {
  static_assert(2 * sizeof(Bytes) <= sizeof(shared.packs[kGate]));
  return reinterpret_cast<Bytes*>(shared.packs[part == kUp ? kUp : kGate])[part == kOut];
}

// The thread's pack of row r of its quad.
__device__ __forceinline__ uint4& own_pack(Shared& shared, Part part, int r) {
  return shared.packs[part][4 * thread_quad() + r][thread_column<T>() / kSize];
}
__device__ __forceinline__ Piece<T> own_piece(Shared& shared, Part part) {
  Piece<T> piece;
#pragma unroll
  for (int r = 0; r < 4; ++r) piece.packs[r] = load_shared<T>(own_pack(shared, part, r));
  return piece;
}

// Puts the gradients and the output of one row in place of what they are made of; returns the thread's share of dw.
__device__ __forceinline__ float differentiate(Shared& shared, int r, float weight) {
  const Pack<T> g = load_shared<T>(own_pack(shared, kGate, r)), u = load_shared<T>(own_pack(shared, kUp, r));
  const Pack<T> dout = load_shared<T>(own_pack(shared, kOut, r));
  float sum = 0.f;
  Vec<T> made[kParts];
  float values[kParts][kSize];
#pragma unroll
  for (int c = 0; c < kSize; c += 4) {
    float gs[4], us[4], ds[4];
    unpack(g, c / 4, gs);
    unpack(u, c / 4, us);
    unpack(dout, c / 4, ds);
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      const SwigluGradient gradient = swiglu_gradient(ds[v], gs[v], us[v], weight, sum);
      values[kGate][c + v] = gradient.dg;
      values[kUp][c + v] = gradient.du;
      values[kOut][c + v] = swiglu_value(gs[v], us[v], weight);
    }
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    pack(values[part], made[part]);
    own_pack(shared, static_cast<Part>(part), r) = reinterpret_cast<const uint4&>(made[part]);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, 2) swiglu_both_casts_kernel(BothCastsParams p) {
  extern __shared__ __align__(128) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  wait_for_inputs();
  release_dependents();
  const uint32_t column_tile = blockIdx.x % p.column_tiles, tile = blockIdx.x / p.column_tiles;
  const Rows rows = p.groups.of_tile(tile);
  const int quad = thread_quad(), live = rows.count - 4 * quad;  // of the thread's rows
  const int first = column_tile * kTile, column = first + thread_column<T>();
  const int row = rows.first + 4 * quad;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const T* const gate = p.gate_up + static_cast<int64_t>(row + r) * 2 * p.inner + column;
    copy_async(shared_pointer(&own_pack(shared, kGate, r)), gate, r < live);
    copy_async(shared_pointer(&own_pack(shared, kUp, r)), gate + p.inner, r < live);
    copy_async(shared_pointer(&own_pack(shared, kOut, r)), p.dout + static_cast<int64_t>(row + r) * p.inner + column,
               r < live);
  }
  float weights[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) weights[r] = p.weights && r < live ? p.weights[row + r] : 1.f;
  wait_for_copies();  // of the thread itself: no other has written what it reads

#pragma unroll
  for (int r = 0; r < 4; ++r) {
    float sum = differentiate(shared, r, weights[r]);
    if (p.dweights == nullptr) continue;
#pragma unroll
    for (int offset = kLanePacks / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const int part = column_tile * Shape<T>::kParts + thread_part();
    const int64_t tokens = p.groups.tokens;
    if (threadIdx.x % kLanePacks == 0 && r < live) p.dweights[part * tokens + row + r] = sum;
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const Piece<T> piece = own_piece(shared, static_cast<Part>(part));
    shared.columns[part].collect(piece);
    if (part != kOut) shared.rows[part].collect(piece);
  }
  __syncthreads();

  // A scale a thread; five directions in four parts of the block.
  const int t = threadIdx.x % kTile, job = threadIdx.x / kTile;
  const bool padding = rows.count == 0;
  if (job == 0) shared.columns[kGate].scale(p.columns, t, first + t, 2 * p.inner, tile, padding);
  if (job == 1) shared.columns[kUp].scale(p.columns, t, p.inner + first + t, 2 * p.inner, tile, padding);
  if (job == 2) shared.columns[kOut].scale(p.out, t, first + t, p.inner, tile, padding);
  if (job == 3) shared.rows[kGate].scale(p.rows, t, column_tile, rows);
  if (job == 3) shared.rows[kUp].scale(p.rows, t, p.column_tiles + column_tile, rows);
  __syncthreads();

  uint32_t words[2][kSize];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const Piece<T> piece = own_piece(shared, static_cast<Part>(part));
    shared.rows[part].store(p.rows, piece, part * p.inner + column, 2 * p.inner, rows);
    shared.columns[part].codes(piece, words[part]);
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    if (part == kOut) shared.columns[kOut].codes(own_piece(shared, kOut), words[0]);
#pragma unroll
    for (int c = 0; c < kSize; ++c) {
      bytes(shared, static_cast<Part>(part)).put(thread_column<T>() + c, quad, words[part == kUp][c]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    const ColumnCasts& to = part == kOut ? p.out : p.columns;
    uint8_t* const out = to.out + ((part == kUp ? p.inner : 0) + first) * to.slots + tile * kTile;
    bytes(shared, static_cast<Part>(part)).store<kThreads>(out, to.slots, kTile, kTile);
  }
}

}  // namespace

void swiglu_backward_both_casts(Tensor dgate_up_fp8, Tensor dgate_up_sf, Tensor dgate_up_t, Tensor dgate_up_t_sf,
                                Tensor out_t, Tensor out_t_sf, std::optional<Tensor> dweights, Tensor dout,
                                Tensor gate_up, std::optional<Tensor> weights, std::optional<Tensor> offsets,
                                bool pow2_scale, double amax_floor, cudaStream_t stream) {
  const int64_t inner = check_swiglu(gate_up, weights), tokens = gate_up.size(0);
  DSV3_CHECK(gate_up.dtype() == Dtype::kBFloat16, "gate_up must be bfloat16, got ", gate_up);
  DSV3_CHECK(inner % kTile == 0, "inner must be a multiple of ", kTile, ", got ", inner);
  check_operand("dout", dout, gate_up.dtype(), tokens, inner);
  const int64_t parts = inner / kTile * Shape<T>::kParts;
  if (dweights) check_operand("dweights", *dweights, Dtype::kFloat32, parts, tokens);
  const ScaleRule rule = scale_rule(amax_floor, pow2_scale);
  const int64_t slots = transposed_slots(tokens, offsets);
  const BothCastsParams params = {
      .dout = dout.data<T>(),
      .gate_up = gate_up.data<T>(),
      .weights = weights ? weights->data<float>() : nullptr,
      .dweights = dweights ? dweights->data<float>() : nullptr,
      .inner = static_cast<int>(inner),
      .groups = check_groups(offsets, tokens),
      .rows = row_casts("dgate_up_fp8", dgate_up_fp8, "dgate_up_sf", dgate_up_sf, tokens, 2 * inner, rule),
      .columns = column_casts("dgate_up_t", dgate_up_t, "dgate_up_t_sf", dgate_up_t_sf, 2 * inner, slots, rule),
      .out = column_casts("out_t", out_t, "out_t_sf", out_t_sf, inner, slots, kOutRule),
      .column_tiles = static_cast<uint32_t>(inner / kTile),
  };
  const DeviceGuard guard(dout);
  const int64_t blocks = inner / kTile * (slots / kTile);
  launch("swiglu_backward_both_casts", swiglu_both_casts_kernel,
         {.grid = dim3(blocks), .block = dim3(kThreads), .smem = sizeof(Shared)}, stream, params);
}

}  // namespace dsv3
