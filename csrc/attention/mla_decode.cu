// Absorbed attention over the paged latent cache (DeepSeek-V2, section 2.1; FlashAttention's running softmax):
//   q [B, S, Hq, 576], cache [pages, page, 1, 576] -> out [B, S, Hq, 512], lse [B, Hq, S]
//   out = softmax(softmax_scale q k^T) k[:, :512] over the keys of a sequence, or those that a causal step sees
// Two kernels: decode.cuh (bf16) or decode_fp8.cuh over the pieces of mla_schedule, combine.cuh over what is split. Roofline: at 128 heads the
// matrix products (242 FLOP a byte of cache), at few heads or few sequences reading the cache once. README.md.
#include <algorithm>
#include <cmath>

#include "../hopper/tensor_map.h"
#include "../ops.h"
#include "attend.cuh"
#include "attend_fp8.cuh"
#include "combine.cuh"
#include "load.cuh"

namespace dsv3 {

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) mla_decode_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<DecodeShared*>(raw);
  const uint32_t rank = rank_in_cluster<C::kCluster>();
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.queries));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.keys));
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&p.key_subs));
    init_decode_barriers<C>(s);
  }
  sync_cluster<C::kCluster>();
  wait_for_inputs();
  release_dependents();
  const uint32_t warpgroup = uniform_warp() / kWarpgroupWarps;
  if (warpgroup == 2) {
    cutlass::arch::warpgroup_reg_dealloc<C::kLoaderRegisters>();
    const int warp = uniform_warp() % kWarpgroupWarps;
    if (warp < 2) produce_keys<C>(p, s, rank, warp);
    if (warp == 2) produce_queries<C>(p, s, rank);
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    if (warpgroup == 0) {
      Consumer<C, 0>(p, s, rank).run();
    } else {
      Consumer<C, 1>(p, s, rank).run();
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1) mla_decode_fp8_kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& s = *reinterpret_cast<Fp8Shared<C>*>(raw);
  const uint32_t rank = rank_in_cluster<C::kCluster>();
  if (threadIdx.x == 0) init_fp8_barriers<C>(s);
  sync_cluster<C::kCluster>();
  wait_for_inputs();
  release_dependents();
  if (uniform_warp() / kWarpgroupWarps == C::kWarpgroups) {
    cutlass::arch::warpgroup_reg_dealloc<C::kLoaderRegisters>();
    if (uniform_warp() % kWarpgroupWarps == 0) produce_codes<C>(p, s, rank);
  } else {
    cutlass::arch::warpgroup_reg_alloc<C::kConsumerRegisters>();
    Fp8Consumer<C>(p, s, rank).run();
  }
  if constexpr (C::kCluster > 1) sync_cluster<C::kCluster>();  // until nothing arrives here any more
}

namespace {

MatrixView bf16_rows(const Tensor& t, int64_t rows) {
  return {t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, kKeyColumns, kKeyColumns * 2};
}

template <class C, class Shared>
void run(void (*kernel)(DecodeParams), const DecodeParams& p, cudaStream_t stream) {
  static_assert(sizeof(Shared) <= 227 * 1024, "queries and keys do not fit");
  const Launch shape{dim3(p.schedule.workers * C::kCluster), dim3(C::kThreads), sizeof(Shared), C::kCluster};
  launch("mla_decode", kernel, shape, stream, p);
  const Launch rows{dim3(sm_count() * 8), dim3(kCombineThreads)};
  launch("mla_decode", mla_combine_kernel<C::kCluster * kBlockRows>, rows, stream, p);
}
template <int kCluster>
void run_bf16(const DecodeParams& p, cudaStream_t stream) {
  using Config = DecodeConfig<kCluster>;
  run<Config, DecodeShared>(mla_decode_kernel<Config>, p, stream);
}
template <int kRows, int kCluster>
void run_fp8(const DecodeParams& p, cudaStream_t stream) {
  using Config = Fp8Config<kRows, kCluster>;
  run<Config, Fp8Shared<Config>>(mla_decode_fp8_kernel<Config>, p, stream);
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
  if (!fp8) {
    const int page_rows = static_cast<int>(std::min<int64_t>(page, kTileKeys));
    p.queries = tensor_map(bf16_rows(q, batch * steps * heads), kBlockRows, kSubColumns, true);
    p.keys = tensor_map(bf16_rows(cache, pages * page), page_rows, kSubColumns, true);
    p.key_subs = sub_blocks_map(cache.data<void>(), pages * page, kKeyColumns, kTileKeys, kValueSubs / 2 / cluster);
  }
  p.q = q.data<__nv_bfloat16>();
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
  if (!fp8) {
    cluster == 1 ? run_bf16<1>(p, stream) : run_bf16<2>(p, stream);
  } else if (cluster == 2) {
    run_fp8<64, 2>(p, stream);
  } else if (p.rows > 32) {
    run_fp8<64, 1>(p, stream);
  } else {
    p.rows > 16 ? run_fp8<32, 1>(p, stream) : run_fp8<16, 1>(p, stream);
  }
}

}  // namespace dsv3
