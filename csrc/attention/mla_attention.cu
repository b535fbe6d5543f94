// Attention of packed sequences, for prefill and training (FlashAttention-3's schedule; DeepSeek-V2, section 2.1):
//   q [Tq, Hq, 192], k_nope [Tk, Hq, 128], k_rope [Tk, 64] for all heads, v [Tk, Hq, 128] -> out [Tq, Hq, 128], lse [Hq, Tq]
//   out = softmax(softmax_scale q [k_nope, k_rope]^T) v of a sequence's queries over its keys, or those that a causal row sees
// Roofline: the matrix products, 640 flops a query, key and head. README.md.
#include <cutlass/arch/reg_reconfig.h>

#include <algorithm>
#include <cmath>

#include "../hopper/tensor_map.h"
#include "../ops.h"
#include "prefill_attend.cuh"

namespace dsv3 {

constexpr int kAttentionThreads = (kConsumers + 1) * kWarpgroup;

__global__ void __launch_bounds__(kAttentionThreads, 1)
    mla_attention_kernel(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<AttentionShared*>(raw);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&p.queries, &p.keys, &p.rope, &p.values}) {
      cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(map));
    }
    init_attention_barriers(s);
  }
  __syncthreads();
  wait_for_inputs();
  release_dependents();
  const int warpgroup = static_cast<int>(uniform_warp()) / kWarpgroupWarps;
  if (warpgroup == kConsumers) {
    cutlass::arch::warpgroup_reg_dealloc<24>();
    if (uniform_warp() % kWarpgroupWarps == 0) Loader(p, s).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<240>();
    Attender(p, s, warpgroup).run();
  }
}

namespace {

// Bytes of keys and values of the heads that are attended to at once: they and what passes by fit in the L2 cache.
constexpr int64_t kCachedBytes = int64_t{32} << 20;

// A strided view [T, H, D] as a matrix, head h beginning at column h * stride(1); TMA takes boxes of 64 columns from it.
MatrixView heads_as_columns(const Tensor& t) {
  const int64_t columns = t.size(1) > 1 ? (t.size(1) - 1) * t.stride(1) + t.size(2) : t.size(2);
  return {t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, t.size(0), columns, t.stride(0) * 2};
}

void check_heads(const char* name, const Tensor& t, int64_t rows, int64_t heads, int64_t columns) {
  DSV3_CHECK(t.is_cuda() && t.dtype() == Dtype::kBFloat16, name, " must be bfloat16 on a CUDA device, got ", t);
  check_shape(name, t, rows, heads, columns);
  if (t.numel() == 0) return;
  DSV3_CHECK(t.stride(2) == 1 && t.aligned(16) && t.stride(0) % 8 == 0 && t.stride(1) % 8 == 0, name,
             " must have contiguous columns and rows at multiples of 16 bytes, got strides (", t.stride(0), ", ",
             t.stride(1), ", ", t.stride(2), ")");
  const MatrixView m = heads_as_columns(t);
  DSV3_CHECK(t.size(1) == 1 || (t.stride(1) >= columns && (rows == 1 || t.stride(0) >= m.columns)), name,
             " must have the heads of a token beside each other, got strides (", t.stride(0), ", ", t.stride(1), ", ",
             t.stride(2), ")");
  DSV3_CHECK(m.columns < int64_t{1} << 31, name, " has too many columns: ", m.columns);
}

}  // namespace

void mla_attention(Tensor out, Tensor lse, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor cu_seqlens_q,
                   Tensor cu_seqlens_k, int64_t max_seqlen_k, bool causal, double softmax_scale, cudaStream_t stream) {
  check_operand("q", q, Dtype::kBFloat16);
  DSV3_CHECK(q.dim() == 3 && q.size(2) == kNope + kRope, "q must be (Tq, Hq, 192), got ", q);
  const int64_t rows = q.size(0), heads = q.size(1), keys = k_rope.size(0), sequences = cu_seqlens_q.numel() - 1;
  check_heads("k_nope", k_nope, keys, heads, kNope);
  check_heads("v", v, keys, heads, kValue);
  check_operand("k_rope", k_rope, Dtype::kBFloat16, keys, kRope);
  check_operand("cu_seqlens_q", cu_seqlens_q, Dtype::kInt32, sequences + 1);
  check_operand("cu_seqlens_k", cu_seqlens_k, Dtype::kInt32, sequences + 1);
  DSV3_CHECK(sequences >= 0, "cu_seqlens must have at least one entry");
  check_operand("out", out, Dtype::kBFloat16, rows, heads, kValue);
  check_operand("lse", lse, Dtype::kFloat32, heads, rows);
  DSV3_CHECK(softmax_scale > 0, "softmax_scale must be positive, got ", softmax_scale);
  const int64_t tiles = ceil_div(rows, kConsumers * kRows) + sequences;
  DSV3_CHECK(rows < int64_t{1} << 31 && keys < int64_t{1} << 31 && tiles * heads < int64_t{1} << 31,
             "too many rows: ", q, " and ", k_rope);
  if (q.numel() == 0 || sequences == 0) return;
  const DeviceGuard guard(q);

  AttentionParams p{};
  const MatrixView query_rows{q.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, heads * q.size(2),
                              heads * q.size(2) * 2};
  p.queries = tensor_map(query_rows, kRows, kSubColumns, true);
  if (keys > 0) {
    const MatrixView rope{k_rope.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, keys, kRope, kRope * 2};
    p.keys = tensor_map(heads_as_columns(k_nope), kKeys, kSubColumns, true);
    p.rope = tensor_map(rope, kKeys, kSubColumns, true);
    p.values = tensor_map(heads_as_columns(v), kKeys, kSubColumns, true);
  }
  p.cu_seqlens_q = cu_seqlens_q.data<int>();
  p.cu_seqlens_k = cu_seqlens_k.data<int>();
  p.out = out.data<__nv_bfloat16>();
  p.lse = lse.data<float>();
  p.error = device_error();
  p.query_rows = rows;
  p.key_rows = keys;
  p.sequences = static_cast<int>(sequences);
  p.heads = static_cast<int>(heads);
  const int64_t head_bytes = std::max<int64_t>(max_seqlen_k, 1) * (kNope + kValue) * 2;
  p.heads_at_once = static_cast<int>(std::clamp<int64_t>(kCachedBytes / head_bytes, 1, heads));
  p.key_head_stride = static_cast<int>(k_nope.stride(1));
  p.value_head_stride = static_cast<int>(v.stride(1));
  p.scale_log2 = static_cast<float>(softmax_scale / M_LN2);
  p.causal = causal;
  static_assert(sizeof(AttentionShared) <= 227 * 1024, "queries, keys and values do not fit");
  const int blocks = static_cast<int>(std::min<int64_t>(sm_count(), tiles * heads));
  const Launch shape{dim3(blocks), dim3(kAttentionThreads), sizeof(AttentionShared)};
  launch("mla_attention", mla_attention_kernel, shape, stream, p);
}

}  // namespace dsv3
