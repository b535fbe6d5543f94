// Absorbed attention over the paged latent cache (DeepSeek-V2, section 2.1; FlashAttention's running softmax):
//   q [B, S, Hq, 576], cache [pages, page, 1, 576] -> out [B, S, Hq, 512], lse [B, Hq, S]
// The cache is bf16 (load.cuh) or FP8, rows of 656 bytes (load_fp8.cuh); the products are of bf16 either way.
//   out = softmax(softmax_scale q k^T) k[:, :512] over the keys of a sequence, or those that a causal step sees
// Two kernels: decode.cuh over the pieces of mla_schedule, combine.cuh over what is split. Roofline: at 128 heads the
// matrix products (242 FLOP a byte of cache), at few heads or few sequences reading the cache once. README.md.
#include <algorithm>
#include <cmath>

#include "../hopper/tensor_map.h"
#include "../ops.h"
#include "attend.cuh"
#include "combine.cuh"
#include "load.cuh"
#include "load_fp8.cuh"

namespace dsv3 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) mla_decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<DecodeShared*>(raw);
  const uint32_t rank = rank_in_cluster<C::kCluster>();
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.queries));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.keys));
    init_decode_barriers<C>(s);
  }
  sync_cluster<C::kCluster>();
  wait_for_inputs();
  release_dependents();
  const uint32_t warpgroup = uniform_warp() / kWarpgroupWarps;
  if (warpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<C::kLoaderRegisters>();
    if constexpr (C::kFp8) {
      Fp8Loader<C>(p, s, rank).run();
    } else {
      const int warp = uniform_warp() % kWarpgroupWarps;
      if (warp < 2) produce_keys<C>(p, s, rank, warp);
      if (warp == 2) produce_queries<C>(p, s, rank);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    if (warpgroup == 0) {
      Consumer<C, 0>(p, s, rank).run();
    } else {
      Consumer<C, 1>(p, s, rank).run();
    }
  }
}

namespace {

MatrixView bf16_rows(const Tensor& t, int64_t rows) {
  return {t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, kKeyColumns, kKeyColumns * 2};
}

template <class C>
void run(const DecodeParams& p, cudaStream_t stream) {
  static_assert(sizeof(DecodeShared) <= 227 * 1024, "queries and keys do not fit");
  const Launch shape{dim3(p.schedule.workers * C::kCluster), dim3(C::kThreads), sizeof(DecodeShared), C::kCluster};
  launch("mla_decode", mla_decode_kernel<C>, shape, stream, p);
  const Launch rows{dim3(sm_count() * 8), dim3(kCombineThreads)};
  launch("mla_decode", mla_combine_kernel<C::kCluster * kBlockRows>, rows, stream, p);
}

}  // namespace

void mla_decode(Tensor out, Tensor lse, Tensor partial, Tensor partial_lse, Tensor q, Tensor cache, Tensor block_table,
                Tensor seq_lens, Tensor schedule, double softmax_scale, bool causal, cudaStream_t stream) {
  check_operand("q", q, Dtype::kBFloat16);
  const bool fp8 = cache.dtype() == Dtype::kUInt8;
  check_operand("cache", cache, fp8 ? Dtype::kUInt8 : Dtype::kBFloat16);
  DSV3_CHECK(q.dim() == 4 && q.size(3) == kKeyColumns, "q must be (B, S, Hq, 576), got ", q);
  DSV3_CHECK(cache.dim() == 4 && cache.size(2) == 1 && cache.size(3) == (fp8 ? kFp8Row : kKeyColumns),
             "cache must be (pages, page, 1, 576), or uint8 (pages, page, 1, 656), beside q of 576 columns, got ",
             cache, " and ", q);
  const int64_t batch = q.size(0), steps = q.size(1), heads = q.size(2), pages = cache.size(0), page = cache.size(1);
  DSV3_CHECK(page == 16 || page == 32 || page == 64 || page == 128, "pages must be of 16, 32, 64 or 128 rows, got ",
             cache);
  DSV3_CHECK(pages > 0, "the cache must have at least one page, got ", cache);
  DSV3_CHECK(pages * page < int64_t{1} << 31, "the cache has too many rows: ", cache);
  DSV3_CHECK(batch * steps * heads < int64_t{1} << 31, "q has too many rows: ", q);
  DSV3_CHECK(softmax_scale > 0, "softmax_scale must be positive, got ", softmax_scale);
  check_operand("out", out, Dtype::kBFloat16, batch, steps, heads, kLatent);
  check_operand("lse", lse, Dtype::kFloat32, batch, heads, steps);
  check_operand("seq_lens", seq_lens, Dtype::kInt32, batch);
  DSV3_CHECK(block_table.is_cuda() && block_table.dtype() == Dtype::kInt32 && block_table.dim() == 2 &&
                 block_table.size(0) == batch && (block_table.stride(1) == 1 || block_table.size(1) <= 1),
             "block_table must be int32 (", batch, ", W) with contiguous rows on the device, got ", block_table);
  if (q.numel() == 0) return;
  const DeviceGuard guard(q);

  const int cluster = cluster_blocks(steps * heads);
  const int groups = static_cast<int>(ceil_div(steps * heads, kBlockRows * cluster)), workers = sm_count() / cluster;
  const int64_t partials = partial_lse.size(0);
  check_operand("schedule", schedule, Dtype::kInt32, DecodeSchedule::size(workers, batch * groups));
  check_operand("partial", partial, Dtype::kFloat32, partials, cluster * kBlockRows, kLatent);
  check_operand("partial_lse", partial_lse, Dtype::kFloat32, partials, cluster * kBlockRows);
  DecodeParams p{};
  p.queries = tensor_map(bf16_rows(q, batch * steps * heads), kBlockRows, kSubColumns, true);
  const auto* const rotated = cache.data<uint8_t>() + kFp8Rotated;
  const MatrixView keys =
      fp8 ? MatrixView{rotated, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, pages * page, kSubColumns, kFp8Row}
          : bf16_rows(cache, pages * page);
  p.keys = tensor_map(keys, static_cast<int>(std::min<int64_t>(page, kTileKeys)), kSubColumns, true);
  p.cache = cache.data<uint8_t>();
  p.block_table = block_table.data<int>();
  p.seq_lens = seq_lens.data<int>();
  p.schedule = {schedule.data<int>(), workers, static_cast<int>(batch), groups};
  p.out = out.data<__nv_bfloat16>();
  p.lse = lse.data<float>();
  p.partial = partial.data<float>();
  p.partial_lse = partial_lse.data<float>();
  p.error = device_error();
  p.partials = static_cast<int>(partials);
  p.table_stride = block_table.stride(0);
  p.table_width = static_cast<int>(block_table.size(1));
  p.pages = static_cast<int>(pages);
  p.page = static_cast<int>(page);
  p.rows = static_cast<int>(steps * heads);
  p.heads = static_cast<int>(heads);
  p.steps = static_cast<int>(steps);
  p.scale_log2 = static_cast<float>(softmax_scale / M_LN2);
  p.causal = causal;
  if (fp8) {
    cluster == 1 ? run<DecodeConfig<1, true>>(p, stream) : run<DecodeConfig<2, true>>(p, stream);
  } else {
    cluster == 1 ? run<DecodeConfig<1, false>>(p, stream) : run<DecodeConfig<2, false>>(p, stream);
  }
}

}  // namespace dsv3
