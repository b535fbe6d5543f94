// The gradients of mla_attention: dq [Tq, Hq, 192], dkv [Tk, Hq, 128 + 128] (of k_nope and v side by side, as kv_b's
// output has them) and dk_rope [Tk, 64], the sum over the heads. 2.6 times the operations of the forward pass: five
// products where it has two, three of which have 192 columns.
#include <algorithm>

#include "../common/launch.cuh"
#include "../hopper/tensor_map.h"
#include "../ops.h"
#include "backward_block.cuh"
#include "backward_stats.cuh"

namespace dsv3 {
namespace {

void check_rows(const char* name, const Tensor& t, int64_t rows, int64_t heads, int64_t columns) {
  DSV3_CHECK(t.is_cuda() && t.dtype() == Dtype::kBFloat16, name, " must be bfloat16 on a CUDA device, got ", t);
  check_shape(name, t, rows, heads, columns);
  const bool strided = t.stride(2) == 1 && t.stride(0) % 8 == 0 && t.stride(1) >= columns && t.aligned(16) &&
                       t.stride(0) >= (heads - 1) * t.stride(1) + columns;
  DSV3_CHECK(strided || t.numel() == 0, name,
             " must be 16-byte aligned with rows a multiple of 8 elements apart, got (", t.stride(0), ", ", t.stride(1),
             ", ", t.stride(2), ")");
}

// All heads of a row side by side, in boxes of 64 columns.
CUtensorMap row_map(const Tensor& t, int box_rows) {
  const int64_t columns = (t.size(1) - 1) * t.stride(1) + t.size(2);
  return tensor_map({t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, t.size(0), columns, t.stride(0) * 2}, box_rows,
                    kSubColumns, true);
}

void start_stats(const BackwardParams& p, Tensor dout, Tensor out, Tensor lse, int64_t max_seqlen_q,
                 cudaStream_t stream) {
  const StatsParams stats{.stats = p.work.stats,
                          .bad = p.work.bad,
                          .out = out.data<__nv_bfloat16>(),
                          .dout = dout.data<__nv_bfloat16>(),
                          .lse = lse.data<float>(),
                          .cu_seqlens_q = p.cu_seqlens_q,
                          .cu_seqlens_k = p.cu_seqlens_k,
                          .error = device_error(),
                          .rows_q = p.rows_q,
                          .rows_k = p.rows_k,
                          .heads = p.heads,
                          .sequences = p.sequences,
                          .query_tiles = p.query_tiles,
                          .max_queries = static_cast<int>(max_seqlen_q),
                          .scale = p.scale};
  const auto groups = static_cast<unsigned>(ceil_div(p.heads, kStatsHeads));
  launch("mla_attention_backward", backward_stats_kernel, {dim3(p.query_tiles, groups), dim3(kStatsThreads)}, stream,
         stats);
}

template <bool kDeterministic>
void start_blocks(const BackwardParams& p, int64_t blocks, cudaStream_t stream) {
  using C = BackwardConfig<kDeterministic>;
  static_assert(sizeof(BackwardShared<C>) <= 227 * 1024, "a block's tiles do not fit");
  const Launch shape{dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads), sizeof(BackwardShared<C>)};
  launch("mla_attention_backward", backward_kernel<C>, shape, stream, p);
}

// Where the counters' parts lie: heads that added to a tile of keys, then three numbers a place of the ring.
BackwardWorkspace workspace(Tensor stats, Tensor dq_sums, Tensor rope_sums, Tensor counters) {
  const int64_t key_tiles = rope_sums.size(0), ring = dq_sums.size(0);
  int* const counts = counters.data<int>();
  return {.stats = stats.data<float>(),
          .dq = dq_sums.data<float>(),
          .dk_rope = rope_sums.data<float>(),
          .rope_added = counts,
          .arrived = counts + key_tiles,
          .finished = counts + key_tiles + ring,
          .turns = counts + key_tiles + 2 * ring,
          .bad = counts + key_tiles + (2 + kBackwardWarps) * ring};
}

void map_tensors(BackwardParams& p, Tensor dout, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v) {
  if (p.rows_q > 0) {
    p.q = row_map(q, kQueryTile);
    p.dout = row_map(dout, kQueryTile);
  }
  if (p.rows_k > 0) {
    p.k_nope = row_map(k_nope, kKeyTile);
    p.v = row_map(v, kKeyTile);
    p.k_rope =
        tensor_map({k_rope.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, p.rows_k, kRopeColumns, kRopeColumns * 2},
                   kKeyTile, kSubColumns, true);
  }
}

}  // namespace

void mla_attention_backward(Tensor dq, Tensor dkv, Tensor dk_rope, Tensor stats, Tensor dq_sums, Tensor rope_sums,
                            Tensor counters, Tensor dout, Tensor q, Tensor k_nope, Tensor k_rope, Tensor v, Tensor out,
                            Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int64_t max_seqlen_q, bool causal,
                            double softmax_scale, bool deterministic, cudaStream_t stream) {
  DSV3_CHECK(q.dim() == 3 && k_nope.dim() == 3, "q and k_nope must be (T, H, D), got ", q, " and ", k_nope);
  const int64_t rows_q = q.size(0), rows_k = k_nope.size(0), heads = q.size(1);
  check_rows("q", q, rows_q, heads, kQueryColumns);
  check_rows("k_nope", k_nope, rows_k, heads, kNopeColumns);
  check_rows("v", v, rows_k, heads, kValueColumns);
  check_operand("k_rope", k_rope, Dtype::kBFloat16, rows_k, kRopeColumns);
  check_operand("out", out, Dtype::kBFloat16, rows_q, heads, kValueColumns);
  check_operand("dout", dout, Dtype::kBFloat16, rows_q, heads, kValueColumns);
  check_operand("lse", lse, Dtype::kFloat32, heads, rows_q);
  check_operand("dq", dq, Dtype::kBFloat16, rows_q, heads, kQueryColumns);
  check_operand("dkv", dkv, Dtype::kBFloat16, rows_k, heads, kNopeColumns + kValueColumns);
  check_operand("dk_rope", dk_rope, Dtype::kBFloat16, rows_k, kRopeColumns);
  const int64_t sequences = cu_seqlens_q.numel() - 1;
  DSV3_CHECK(sequences >= 0, "cu_seqlens_q must be (n + 1,), got ", cu_seqlens_q);
  check_operand("cu_seqlens_q", cu_seqlens_q, Dtype::kInt32, sequences + 1);
  check_operand("cu_seqlens_k", cu_seqlens_k, Dtype::kInt32, sequences + 1);
  const int64_t query_tiles = rows_q / kQueryTile + sequences, key_tiles = rows_k / kKeyTile + sequences;
  const int64_t ring = dq_sums.numel() / kDqTile;
  check_operand("stats", stats, Dtype::kFloat32, heads, query_tiles, kStatsTile);
  check_operand("rope_sums", rope_sums, Dtype::kFloat32, key_tiles, kRopeTile);
  check_operand("dq_sums", dq_sums, Dtype::kFloat32, ring, kDqTile);
  check_operand("counters", counters, Dtype::kInt32, key_tiles + ring * (2 + kBackwardWarps) + 1);
  DSV3_CHECK(ring > ceil_div(max_seqlen_q, kQueryTile), "dq_sums has no room for a sequence: ", dq_sums);
  DSV3_CHECK(softmax_scale > 0, "softmax_scale must be positive, got ", softmax_scale);
  constexpr int64_t kMost = int64_t{1} << 31;
  DSV3_CHECK(std::max({key_tiles * heads, query_tiles * heads, rows_q, rows_k}) < kMost, "too many rows: ", q, " and ",
             k_nope);
  if (sequences == 0 || heads == 0) return;
  const DeviceGuard guard(q);

  BackwardParams p{.cu_seqlens_q = cu_seqlens_q.data<int>(),
                   .cu_seqlens_k = cu_seqlens_k.data<int>(),
                   .dq = dq.data<__nv_bfloat16>(),
                   .dkv = dkv.data<__nv_bfloat16>(),
                   .dk_rope = dk_rope.data<__nv_bfloat16>(),
                   .work = workspace(stats, dq_sums, rope_sums, counters),
                   .rows_q = rows_q,
                   .rows_k = rows_k,
                   .heads = static_cast<int>(heads),
                   .sequences = static_cast<int>(sequences),
                   .query_tiles = static_cast<int>(query_tiles),
                   .ring = static_cast<int>(ring),
                   .multiprocessors = sm_count(),
                   .k_stride = static_cast<int>(k_nope.stride(1)),
                   .v_stride = static_cast<int>(v.stride(1)),
                   .scale = static_cast<float>(softmax_scale),
                   .scale_log2 = static_cast<float>(softmax_scale / M_LN2),
                   .causal = causal};
  map_tensors(p, dout, q, k_nope, k_rope, v);
  start_stats(p, dout, out, lse, max_seqlen_q, stream);
  if (deterministic) {
    start_blocks<true>(p, key_tiles * heads, stream);
  } else {
    start_blocks<false>(p, key_tiles * heads, stream);
  }
}

}  // namespace dsv3
