// Two attentions of the same queries over disjoint keys become one:
//   o1, o2 [T, H, 128], lse1, lse2 [H, T] -> lse = log(exp(lse1) + exp(lse2)), o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2
// Bound by memory: 768 bytes a row and head, and 12 of lse.
#include "../common/launch.cuh"
#include "../ops.h"
#include "prefill.cuh"

namespace dsv3 {
namespace {

// A block takes 8 tokens, a sector of lse, and 8 heads.
constexpr int kTokens = 8, kHeads = 8, kPairs = kTokens * kHeads;
constexpr int kThreads = 256;
constexpr int kVectors = kValue / Vec<__nv_bfloat16>::kSize;  // of a row
constexpr int kLoads = kPairs * kVectors / kThreads;          // of a thread

struct MergeParams {
  __nv_bfloat16* out;
  float* lse;
  const __nv_bfloat16 *first, *second;
  const float *first_lse, *second_lse;
  int64_t tokens;
  int heads;
};

__global__ void __launch_bounds__(kThreads) mla_merge_kernel(const __grid_constant__ MergeParams p) {
  __shared__ float2 weights[kPairs];  // [token, head]
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int head = static_cast<int>(blockIdx.y) * kHeads;
  wait_for_inputs();
  release_dependents();
  Vec<__nv_bfloat16> first[kLoads], second[kLoads];
  int64_t at[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const int vector = i * kThreads + static_cast<int>(threadIdx.x), pair = vector / kVectors;
    const int64_t t = token + pair / kHeads;
    const int h = head + pair % kHeads;
    at[i] = t < p.tokens && h < p.heads ? (t * p.heads + h) * kValue + vector % kVectors * 8 : -1;
    if (at[i] < 0) continue;
    first[i] = load(p.first + at[i]);
    second[i] = load(p.second + at[i]);
  }
  if (threadIdx.x < kPairs) {
    const int64_t t = token + threadIdx.x % kTokens;
    const int h = head + static_cast<int>(threadIdx.x) / kTokens;
    if (t < p.tokens && h < p.heads) {
      const float a = p.first_lse[h * p.tokens + t], b = p.second_lse[h * p.tokens + t];
      const float base = finite(fmaxf(a, b)), wa = expf(a - base), wb = expf(b - base), sum = wa + wb;
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      weights[threadIdx.x % kTokens * kHeads + threadIdx.x / kTokens] = make_float2(wa * inverse, wb * inverse);
      p.lse[h * p.tokens + t] = base + logf(sum);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if (at[i] < 0) continue;
    const float2 weight = weights[(i * kThreads + threadIdx.x) / kVectors];
    float x[8], y[8];
    unpack(first[i], x);
    unpack(second[i], y);
#pragma unroll
    for (int j = 0; j < 8; ++j) x[j] = weight.x * x[j] + weight.y * y[j];
    pack(x, first[i]);
    store(p.out + at[i], first[i]);
  }
}

}  // namespace

void mla_merge(Tensor o, Tensor lse, Tensor o1, Tensor lse1, Tensor o2, Tensor lse2, cudaStream_t stream) {
  check_operand("o1", o1, Dtype::kBFloat16);
  DSV3_CHECK(o1.dim() == 3 && o1.size(2) == kValue, "o1 must be (T, H, 128), got ", o1);
  const int64_t tokens = o1.size(0), heads = o1.size(1);
  check_operand("o2", o2, Dtype::kBFloat16, tokens, heads, kValue);
  check_operand("o", o, Dtype::kBFloat16, tokens, heads, kValue);
  check_operand("lse1", lse1, Dtype::kFloat32, heads, tokens);
  check_operand("lse2", lse2, Dtype::kFloat32, heads, tokens);
  check_operand("lse", lse, Dtype::kFloat32, heads, tokens);
  DSV3_CHECK(ceil_div(heads, kHeads) < 65536, "too many heads: ", o1);
  if (o1.numel() == 0) return;
  const DeviceGuard guard(o1);
  const MergeParams p{o.data<__nv_bfloat16>(),
                      lse.data<float>(),
                      o1.data<__nv_bfloat16>(),
                      o2.data<__nv_bfloat16>(),
                      lse1.data<float>(),
                      lse2.data<float>(),
                      tokens,
                      static_cast<int>(heads)};
  const dim3 blocks(static_cast<unsigned>(ceil_div(tokens, kTokens)), static_cast<unsigned>(ceil_div(heads, kHeads)));
  launch("mla_merge", mla_merge_kernel, {blocks, dim3(kThreads)}, stream, p);
}

}  // namespace dsv3
