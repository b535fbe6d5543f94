// What a token leaves in the paged latent cache, from the kv_a projection's output in one pass:
//
//   row = [latent * rsqrt(mean(latent^2) + eps) * weight | rope rotated in interleaved pairs by the token's position]
//
// kv_a [T, 512 + 64], rows of which may lie further apart; the cache is [pages, page, 1, 576] bf16, or uint8 [.., 656]:
// 512 e4m3, 4 fp32 scales (powers of two, of 128 values each), 64 bf16. The latent is rounded to bf16 before it is cast,
// so that both caches hold the same up to the cast: what rmsnorm gives (the same order of sums) and per_token_cast of it.
//
// Blocks behind those of the tokens normalise q_a, if it is there, a row each: of the down-projections' two outputs neither
// then waits for a kernel of the other.
//
// A warp has a token: two 16-byte vectors of the latent a lane, so that a tile lies in 16 neighbouring lanes, and one of
// the rotated part in eight of them. Latency-bound when decoding (128 tokens move 0.3 MB): every load but those of the
// angles, which wait for the position, is on its way before the first result is needed.
#include "../common/device_error.cuh"
#include "../common/e4m3.cuh"
#include "../common/launch.cuh"
#include "../common/rmsnorm.cuh"
#include "../common/vector.cuh"
#include "../ops.h"

namespace dsv3 {
namespace {

using Bf16 = __nv_bfloat16;
constexpr int kTokens = 4;  // a block
constexpr int kSize = Vec<Bf16>::kSize;
constexpr int kLatent = 512, kRope = 64, kColumns = kLatent + kRope;
constexpr int kScales = kLatent / kTile;
constexpr int kFp8Scales = kLatent, kFp8Rope = kFp8Scales + 4 * kScales, kFp8Row = kFp8Rope + 2 * kRope;  // bytes
constexpr int kVecs = kLatent / kSize / kWarpSize;                                                        // a lane
constexpr int kRopeLanes = kRope / kSize;
constexpr float kFloor = 1e-4f;  // of a tile's amax: per_token_cast's default
constexpr int kThreads = kTokens * kWarpSize;
constexpr int kQueryVecs = 2, kMaxQuery = kQueryVecs * kThreads * kSize;  // of a row of q_a, a thread

struct AppendParams {
  uint8_t* cache;
  const Bf16* kv_a;         // [T, 576], row_stride apart
  const void* norm_weight;  // [512]
  const float* cos;         // [max_positions, 32]
  const float* sin;
  const int64_t* positions;  // [T]
  const int64_t* slots;      // [T]
  Bf16* q_a;                 // [T, q_columns], or null
  const void* q_norm_weight;
  DeviceError* error;
  int64_t row_stride, max_positions, cache_rows;
  int tokens, q_columns;
  float eps;
};

// Eight weights.
template <class W>
struct Weights {
  Vec<W> parts[kSize / Vec<W>::kSize];

  __device__ __forceinline__ explicit Weights(const W* p) {
#pragma unroll
    for (int i = 0; i < kSize / Vec<W>::kSize; ++i) parts[i] = load(p + i * Vec<W>::kSize);
  }
  __device__ __forceinline__ void get(float (&w)[kSize]) const {
    if constexpr (sizeof(W) == sizeof(Bf16)) {
      unpack(parts[0], w);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i) w[i] = parts[i / Vec<W>::kSize].values[i % Vec<W>::kSize];
    }
  }
};

// Whether the token is to be stored; says what is wrong with it where it can not be.
__device__ __forceinline__ bool stores(const AppendParams& p, int token, int64_t slot, int64_t position) {
  if (slot == -1) return false;
  const bool has_slot = slot >= 0 && slot < p.cache_rows, has_angles = position >= 0 && position < p.max_positions;
  if (has_slot && has_angles) return true;
  if (threadIdx.x % kWarpSize == 0 && !has_slot) {
    report(p.error, DeviceErrorCode::kCacheSlots, token, slot, 0, p.cache_rows);
  } else if (threadIdx.x % kWarpSize == 0) {
    report(p.error, DeviceErrorCode::kPositions, token, position, 0, p.max_positions);
  }
  return false;
}

// rmsnorm of a token's latent, in place: as rmsnorm.cu has it, bit for bit where the weights are bf16.
template <class W>
__device__ __forceinline__ void normalise_latent(Vec<Bf16> (&x)[kVecs], const Weights<W> (&weights)[kVecs], float eps) {
  float sums[kVecs];
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float values[kSize];
    unpack(x[i], values);
    sums[i] = warp_reduce<Sum>(add_squares(values, 0.f));
  }
  const float rstd = rsqrtf((sums[0] + sums[1]) / kLatent + eps);
#pragma unroll
  for (int i = 0; i < kVecs; ++i) {
    float values[kSize], w[kSize];
    unpack(x[i], values);
    weights[i].get(w);
    normalise(values, rstd, w);
    pack(values, x[i]);
  }
}

// A row of q_a, in place: also as rmsnorm.cu has it, bit for bit where the weights are bf16.
template <class W>
__device__ __forceinline__ void normalise_query(const AppendParams& p, int row) {
  __shared__ float scratch[kThreads / kWarpSize];
  Bf16* const x = p.q_a + static_cast<int64_t>(row) * p.q_columns;
  const W* const weight = static_cast<const W*>(p.q_norm_weight);
  Vec<Bf16> values[kQueryVecs];
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kQueryVecs; ++i) {
    const int column = (static_cast<int>(threadIdx.x) + i * kThreads) * kSize;
    if (column < p.q_columns) values[i] = load(x + column);
  }
  release_dependents();
#pragma unroll
  for (int i = 0; i < kQueryVecs; ++i) {
    if ((static_cast<int>(threadIdx.x) + i * kThreads) * kSize >= p.q_columns) continue;
    float wide[kSize];
    unpack(values[i], wide);
    sum = add_squares(wide, sum);
  }
  const float rstd = rsqrtf(block_reduce<Sum, kThreads>(sum, scratch) / p.q_columns + p.eps);
#pragma unroll
  for (int i = 0; i < kQueryVecs; ++i) {
    const int column = (static_cast<int>(threadIdx.x) + i * kThreads) * kSize;
    if (column >= p.q_columns) continue;
    float wide[kSize], w[kSize];
    unpack(values[i], wide);
    Weights<W>(weight + column).get(w);
    normalise(wide, rstd, w);
    pack(wide, values[i]);
    store(x + column, values[i]);
  }
}

// Of the pairs of eight values.
struct Angles {
  Vec<float> cos, sin;

  __device__ __forceinline__ Angles(const AppendParams& p, int64_t position, int rope_lane) {
    const int64_t first = position * (kRope / 2) + rope_lane * (kSize / 2);
    cos = load(p.cos + first);
    sin = load(p.sin + first);
  }
};

__device__ __forceinline__ void rotate(Vec<Bf16>& x, const Angles& angles) {
  float values[kSize];
  unpack(x, values);
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) {
    const float a = values[2 * i], b = values[2 * i + 1], cos = angles.cos.values[i], sin = angles.sin.values[i];
    values[2 * i] = __fmaf_rn(a, cos, -b * sin);  // explicit: the same in every instantiation
    values[2 * i + 1] = __fmaf_rn(a, sin, b * cos);
  }
  pack(values, x);
}

template <class W, bool kFp8>
__global__ void __launch_bounds__(kThreads) append_kernel(AppendParams p) {
  static_assert(kVecs == 2);
  wait_for_inputs();
  const int row = static_cast<int>(blockIdx.x) - ceil_div(p.tokens, kTokens);
  if (row >= 0) return normalise_query<W>(p, row);
  const int lane = threadIdx.x % kWarpSize, rope_lane = lane % kRopeLanes;
  const int token = blockIdx.x * kTokens + threadIdx.x / kWarpSize;
  if (token >= p.tokens) return;
  const int64_t slot = p.slots[token], position = p.positions[token];
  const Bf16* const source = p.kv_a + token * p.row_stride;
  const W* const weight = static_cast<const W*>(p.norm_weight);
  const int first = lane * kSize, second = (lane + kWarpSize) * kSize;
  Vec<Bf16> latent[kVecs] = {load(source + first), load(source + second)};
  Vec<Bf16> rope = load(source + kLatent + rope_lane * kSize);
  const Weights<W> weights[kVecs] = {Weights<W>(weight + first), Weights<W>(weight + second)};
  // NOTE: here, since no load moves across it. The compiler would put them behind the return, the sum or both, and
  // their latencies would add up.
  release_dependents();
  if (!stores(p, token, slot, position)) return;
  const Angles angles(p, position, rope_lane);
  normalise_latent(latent, weights, p.eps);
  rotate(rope, angles);
  if constexpr (kFp8) {
    uint8_t* const row = p.cache + slot * kFp8Row;
    const RowCasts casts{row, reinterpret_cast<float*>(row + kFp8Scales), 1, {kFloor, true}};
    const Pack<Bf16> packs[kVecs] = {as_pack(latent[0]), as_pack(latent[1])};
    cast_packs(casts, packs, 0, kLatent, lane, kWarpSize, kVecs * kWarpSize);
    if (lane < kRopeLanes) store(reinterpret_cast<Bf16*>(row + kFp8Rope) + rope_lane * kSize, rope);
  } else {
    Bf16* const row = reinterpret_cast<Bf16*>(p.cache) + slot * kColumns;
    store(row + first, latent[0]);
    store(row + second, latent[1]);
    if (lane < kRopeLanes) store(row + kLatent + rope_lane * kSize, rope);
  }
}

void check_rows(const Tensor& kv_a) {
  DSV3_CHECK(kv_a.is_cuda(), "kv_a must be on a CUDA device, got a CPU tensor of shape ", kv_a);
  DSV3_CHECK(kv_a.dim() == 2 && kv_a.size(1) == kColumns && kv_a.dtype() == Dtype::kBFloat16,
             "kv_a must be bfloat16 (T, 576), got ", kv_a);
  const bool strided = kv_a.stride(1) == 1 && (kv_a.size(0) <= 1 || kv_a.stride(0) % kSize == 0) && kv_a.aligned(16);
  DSV3_CHECK(strided || kv_a.numel() == 0, "kv_a must be 16-byte aligned with strides (a multiple of 8, 1), got (",
             kv_a.stride(0), ", ", kv_a.stride(1), ")");
  DSV3_CHECK(kv_a.size(0) < int64_t{1} << 31, "kv_a has too many rows: ", kv_a);
}

}  // namespace

void mla_append_kv(Tensor cache, Tensor kv_a, Tensor norm_weight, Tensor cos, Tensor sin, Tensor positions,
                   Tensor slot_mapping, std::optional<Tensor> q_a, std::optional<Tensor> q_a_norm_weight, double eps,
                   cudaStream_t stream) {
  check_rows(kv_a);
  const bool fp8 = cache.dtype() == Dtype::kUInt8;
  DSV3_CHECK(cache.dim() == 4 && cache.size(2) == 1 && cache.size(3) == (fp8 ? kFp8Row : kColumns),
             "cache must be (pages, page, 1, 576), or uint8 (pages, page, 1, 656), beside kv_a ", kv_a, ", got ",
             cache);
  check_operand("cache", cache, fp8 ? Dtype::kUInt8 : Dtype::kBFloat16);
  check_operand("norm_weight", norm_weight, norm_weight.dtype(), kLatent);
  DSV3_CHECK(cos.dim() == 2, "cos must be (max_positions, 32), got ", cos);
  check_operand("cos", cos, Dtype::kFloat32, cos.size(0), kRope / 2);
  check_operand("sin", sin, Dtype::kFloat32, cos.size(0), kRope / 2);
  const int64_t tokens = kv_a.size(0);
  check_operand("positions", positions, Dtype::kInt64, tokens);
  check_operand("slot_mapping", slot_mapping, Dtype::kInt64, tokens);
  DSV3_CHECK(q_a.has_value() == q_a_norm_weight.has_value(), "expected q_a and q_a_norm_weight, or neither");
  if (q_a) {
    check_operand("q_a", *q_a, Dtype::kBFloat16, tokens, q_a->size(-1));
    DSV3_CHECK(q_a->size(1) % kSize == 0 && q_a->size(1) <= kMaxQuery, "q_a must have a multiple of ", kSize,
               " columns up to ", kMaxQuery, ", got ", *q_a);
    check_operand("q_a_norm_weight", *q_a_norm_weight, norm_weight.dtype(), q_a->size(1));
  }
  const DeviceGuard guard(cache);
  const AppendParams params{.cache = cache.data<uint8_t>(),
                            .kv_a = kv_a.data<Bf16>(),
                            .norm_weight = norm_weight.data<void>(),
                            .cos = cos.data<float>(),
                            .sin = sin.data<float>(),
                            .positions = positions.data<int64_t>(),
                            .slots = slot_mapping.data<int64_t>(),
                            .q_a = q_a ? q_a->data<Bf16>() : nullptr,
                            .q_norm_weight = q_a ? q_a_norm_weight->data<void>() : nullptr,
                            .error = device_error(),
                            .row_stride = kv_a.stride(0),
                            .max_positions = cos.size(0),
                            .cache_rows = cache.size(0) * cache.size(1),
                            .tokens = static_cast<int>(tokens),
                            .q_columns = q_a ? static_cast<int>(q_a->size(1)) : 0,
                            .eps = static_cast<float>(eps)};
  visit_float("norm_weight", norm_weight.dtype(), [&](auto zero) {
    using W = decltype(zero);
    const auto kernel = fp8 ? append_kernel<W, true> : append_kernel<W, false>;
    const int64_t blocks = ceil_div(tokens, kTokens) + (q_a ? tokens : 0);
    launch("mla_append_kv", kernel, {.grid = dim3(blocks), .block = dim3(kThreads)}, stream, params);
  });
}

}  // namespace dsv3
