// The queries of absorbed attention: out[t, h] = [q_nope[t, h] W_uk[h] | rope(q_rope[t, h])], for few tokens.
//
// q [T, Hq, Dn + Dr], W_uk [Hq, Dn, Dc] (views of kv_b's weight), out [T, Hq, Dc + Dr]; bf16. Roofline: W_uk once. A
// block takes 64 columns of a head's W_uk for some of the tokens, its four warps a quarter of Dn each; more blocks
// rotate. The matrix is stored with its columns, not with the reduced dimension, in neighbouring places: a lane's 16
// bytes are 8 columns of one row, and values of two rows are paired in registers before the tensor core sees them. See
// few_tokens.cuh.
#include <algorithm>

#include "../ops.h"
#include "few_tokens.cuh"

namespace dsv3 {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr int kColumns = 64;                    // of a block: 8 for each of the lanes that share rows
constexpr int kMatrices = kColumns / kRowTile;  // tensor core tiles of them
constexpr int kDepth = 16, kMaxSteps = 2;       // rows a step of a warp; steps: Dn up to 128

struct AbsorbParams {
  bf16* out;
  const bf16 *q, *weight;
  int64_t weight_head;  // elements between heads
  const float *cos, *sin;
  const int64_t* positions;
  int64_t max_positions;
  int tokens, heads, nope, rope, latent;
  bool static_weights;
};

// Rows 4t to 4t + 3 of a step and the lane's 8 columns, as the tensor core's operands.
struct Slab {
  uint4 rows[4];
  __device__ __forceinline__ void load(const bf16* p, int64_t stride) {
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = load_once(p + i * stride);
  }
  // For columns 2m and 2m + 1 of the lane's 8 (rows g and g + 8 of tile m): pairs of weight rows (0, 1) and (2, 3).
  template <int m>
  __device__ __forceinline__ void multiply(float (&sum)[4], uint32_t b0, uint32_t b1) const {
    const uint32_t first[4] = {word<m>(0), word<m>(1), word<m>(2), word<m>(3)};
    mma(sum, __byte_perm(first[0], first[1], 0x5410), __byte_perm(first[0], first[1], 0x7632),
        __byte_perm(first[2], first[3], 0x5410), __byte_perm(first[2], first[3], 0x7632), b0, b1);
  }

 private:
  template <int m>
  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = rows[i];
    return m == 0 ? v.x : m == 1 ? v.y : m == 2 ? v.z : v.w;
  }
};

// A pair a thread of the rotated part of a head's queries; a position that the tables do not have gives NaN. The angle is looked
// up before the queries are there, where nobody writes it.
__device__ __forceinline__ void rotate(const AbsorbParams& p, int head, int block) {
  const int pairs = p.rope / 2, i = block * kThreads + threadIdx.x, token = i / pairs, column = 2 * (i % pairs);
  const bool there = token < p.tokens;
  float c = NAN, s = NAN;
  const auto look_up = [&] {
    const int64_t position = there ? p.positions[token] : -1, at = position * pairs + i % pairs;
    if (position >= 0 && position < p.max_positions) c = p.cos[at], s = p.sin[at];
  };
  if (p.static_weights) look_up();
  wait_for_inputs();
  release_dependents();
  if (!p.static_weights) look_up();
  if (!there) return;
  const int64_t row = static_cast<int64_t>(token) * p.heads + head;
  const float2 x =
      __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p.q + row * (p.nope + p.rope) + p.nope + column));
  *reinterpret_cast<__nv_bfloat162*>(p.out + row * (p.latent + p.rope) + p.latent + column) =
      __floats2bfloat162_rn(x.x * c - x.y * s, x.y * c + x.x * s);
}

// Adds up the warps' sums for the block's columns of so many tokens. Column 2m + h of the 8 of lane row g is row g + 8h of tile m.
template <int kTiles>
__device__ __forceinline__ void store_columns(const AbsorbParams& p, const float* sums, int first, int head) {
  for (int i = threadIdx.x; i < kTiles * kTokenTile * kColumns / 2; i += kThreads) {
    const int token = i / (kColumns / 2), pair = i % (kColumns / 2), at = first + token;
    if (at >= p.tokens) return;
    const float* const place =
        sums + (token / kTokenTile * kMatrices + pair % 4) * kSumTile + token % kTokenTile * kSumStride + pair / 4;
    constexpr int kStride = kTiles * kMatrices * kSumTile;
    const int64_t row = static_cast<int64_t>(at) * p.heads + head;
    bf16* const out = p.out + row * (p.latent + p.rope) + blockIdx.x * kColumns + 2 * pair;
    *reinterpret_cast<__nv_bfloat162*>(out) =
        __floats2bfloat162_rn(add_sums(place, kWarps, kStride), add_sums(place + 8, kWarps, kStride));
  }
}

template <int kTiles>
__global__ void __launch_bounds__(kThreads) mla_absorb_kernel(AbsorbParams p) {
  extern __shared__ float sums[];  // [kWarps, kTiles, kMatrices, kSumTile]
  const int head = blockIdx.y, warp = threadIdx.x / kWarpSize, t = threadIdx.x % 4;
  if (blockIdx.x * kColumns >= p.latent) {
    if (blockIdx.z == 0) rotate(p, head, blockIdx.x - p.latent / kColumns);
    return;
  }
  const int column = blockIdx.x * kColumns + lane_row() * 8;
  Slab slabs[kMaxSteps];
  const bf16* const weight = p.weight + head * p.weight_head + static_cast<int64_t>(4 * t) * p.latent + column;
  const auto load_weights = [&] {
#pragma unroll
    for (int s = 0; s < kMaxSteps; ++s) {
      const int row = (s * kWarps + warp) * kDepth;
      if (row < p.nope) slabs[s].load(weight + static_cast<int64_t>(row) * p.latent, p.latent);
    }
  };
  if (p.static_weights) load_weights();
  wait_for_inputs();
  release_dependents();
  if (!p.static_weights) load_weights();
  const int first = blockIdx.z * kTiles * kTokenTile;
  float sum[kTiles][kMatrices][4] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int token = first + i * kTokenTile + lane_row();
    const bf16* const q = p.q + (static_cast<int64_t>(token) * p.heads + head) * (p.nope + p.rope) + 4 * t;
#pragma unroll
    for (int s = 0; s < kMaxSteps; ++s) {
      const int row = (s * kWarps + warp) * kDepth;
      if (row >= p.nope) break;
      const uint2 b = token < p.tokens ? *reinterpret_cast<const uint2*>(q + row) : uint2{};
      slabs[s].multiply<0>(sum[i][0], b.x, b.y);
      slabs[s].multiply<1>(sum[i][1], b.x, b.y);
      slabs[s].multiply<2>(sum[i][2], b.x, b.y);
      slabs[s].multiply<3>(sum[i][3], b.x, b.y);
    }
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) leave_sums(sums + ((warp * kTiles + i) * kMatrices + m) * kSumTile, sum[i][m]);
  }
  __syncthreads();
  store_columns<kTiles>(p, sums, first, head);
}

}  // namespace

void mla_absorb(Tensor out, Tensor q, Tensor weight, Tensor cos, Tensor sin, Tensor positions, bool static_weights,
                cudaStream_t stream) {
  check_operand("q", q, Dtype::kBFloat16);
  DSV3_CHECK(q.dim() == 3 && weight.dim() == 3 && cos.dim() == 2,
             "q must be (tokens, heads, nope + rope), weight (heads, nope, latent), cos (positions, rope / 2), got ", q,
             ", ", weight, " and ", cos);
  const int64_t tokens = q.size(0), heads = q.size(1), nope = weight.size(1), latent = weight.size(2),
                rope = 2 * cos.size(1);
  DSV3_CHECK(tokens <= kFewTokens, "q must have at most ", kFewTokens, " tokens, got ", q);
  check_shape("q", q, tokens, heads, nope + rope);
  check_operand("out", out, Dtype::kBFloat16, tokens, heads, latent + rope);
  DSV3_CHECK(weight.is_cuda() && weight.dtype() == Dtype::kBFloat16 && weight.size(0) == heads &&
                 weight.stride(1) == latent && weight.stride(2) == 1 && weight.stride(0) % 8 == 0 && weight.aligned(16),
             "weight must be bfloat16 on a CUDA device, its matrices contiguous and 16-byte aligned, got ", weight);
  DSV3_CHECK(nope % kDepth == 0 && nope <= kWarps * kDepth * kMaxSteps && latent % kColumns == 0 && rope % 8 == 0,
             "nope must be a multiple of ", kDepth, " up to ", kWarps * kDepth * kMaxSteps, ", latent one of ",
             kColumns, ", rope one of 8, got ", nope, ", ", latent, " and ", rope);
  check_operand("cos", cos, Dtype::kFloat32);
  check_operand("sin", sin, Dtype::kFloat32, cos.size(0), cos.size(1));
  check_operand("positions", positions, Dtype::kInt64, tokens);
  if (tokens == 0) return;
  const DeviceGuard guard(q);
  const AbsorbParams p{.out = out.data<bf16>(),
                       .q = q.data<bf16>(),
                       .weight = weight.data<bf16>(),
                       .weight_head = weight.stride(0),
                       .cos = cos.data<float>(),
                       .sin = sin.data<float>(),
                       .positions = positions.data<int64_t>(),
                       .max_positions = cos.size(0),
                       .tokens = static_cast<int>(tokens),
                       .heads = static_cast<int>(heads),
                       .nope = static_cast<int>(nope),
                       .rope = static_cast<int>(rope),
                       .latent = static_cast<int>(latent),
                       .static_weights = static_weights};
  const int64_t blocks = latent / kColumns + ceil_div(tokens * rope / 2, kThreads);
  // Tokens are divided among blocks, which read the same weights from the L2 cache: 32 a block, 16 where that leaves
  // multiprocessors idle.
  const int64_t at_a_time = latent / kColumns * heads <= sm_count() ? 16 : 32;
  visit_tiles(std::min(tokens, at_a_time), [&](auto count) {
    constexpr int kTiles = decltype(count)::value;
    const dim3 grid(blocks, heads, ceil_div(tokens, kTiles * kTokenTile));
    const size_t smem = sizeof(float) * kWarps * kTiles * kMatrices * kSumTile;
    const Launch shape{.grid = grid, .block = dim3(kThreads), .smem = smem};
    launch("mla_absorb", mla_absorb_kernel<kTiles>, shape, stream, p);
  });
}

}  // namespace dsv3
