// out[M, N] (+)= A[M, K] B[N, K]^T with a scale for every 1x128 of A and for every 128x128 (forward, dgrad) or 1x128
// (weight gradient, out in fp32) of B. 2 M N K operations; bytes M K + N K + out. Up to 128 rows take few_rows.cuh,
// which is bound by reading B; more take wide.cuh, bound by the tensor cores. A weight gradient of few tiles cuts K.
#include "../ops.h"
#include "few_rows.cuh"
#include "wide_launch.cuh"

namespace dsv3 {
namespace {

constexpr const char* kName = "fp8_gemm";
constexpr int kFewRows = 128;

template <class Out>
using Wide256 = WideConfig<Layout::kDense, Out, false, 128, 2, 2, 4, 2>;
template <class Out>
using Wide128 = WideConfig<Layout::kDense, Out, false, 128, 1, 1, 5, 2>;
using Wide192 = WideConfig<Layout::kDense, __nv_bfloat16, false, 192, 1, 2, 4, 3>;  // 2112 columns are 11 of them
using Wide144 = WideConfig<Layout::kDense, __nv_bfloat16, false, 144, 1, 1, 5, 2>;  // 576 are 4

// Clocks that a product should take: waves of tiles, each of them K blocks and the writing of the tile. Fitted to times
// on an H100 (README.md).
template <class C>
int64_t wide_cost(int64_t rows, int64_t columns, int64_t depth_blocks) {
  const int clusters = resident_clusters(kName, wide_kernel<C>, wide_shape<C>());
  if (clusters == 0) return INT64_MAX;
  const int64_t tiles = ceil_div(rows, C::kTileRows * C::kCluster) * ceil_div(columns, C::kTileColumns);
  return ceil_div(tiles, clusters) * (depth_blocks * (140 + C::kTileColumns * 4) + 6 * C::kTileColumns);
}

// Launches the tile whose predicted time is the shortest.
template <class... Configs>
void launch_cheapest(const WideProblem& x, cudaStream_t stream) {
  const int64_t blocks = ceil_div(x.k, kBlockK), rows = static_cast<int64_t>(x.rows);
  const int64_t costs[] = {wide_cost<Configs>(rows, x.columns, blocks)...};
  const int64_t cheapest = *std::min_element(std::begin(costs), std::end(costs));
  int i = 0;
  bool done = false;
  ((costs[i++] == cheapest && !done ? (launch_wide<Configs>(kName, x, stream), done = true) : false), ...);
}

template <class C>
Launch few_rows_shape(int splits) {
  static_assert(sizeof(FewRowsShared<C>) <= (C::kBlocks == 2 ? 113 : 227) * 1024, "the stages do not fit");
  return {dim3(), dim3(C::kThreads), sizeof(FewRowsShared<C>), splits};
}

// How few_rows.cuh cuts a product, and the time in us that it should take.
struct FewRowsPlan {
  bool deep = false, half = false;  // a whole multiprocessor a block; tiles of half of the tokens
  int splits = 0;
  double us = 1e30;
};
template <class Out, int kTokens, class F>
void with_config(const FewRowsPlan& plan, F&& f) {
  if constexpr (kTokens == 128) {
    if (!plan.half) return f(FewRowsConfig<Out, 128, true>{});
    plan.deep ? f(FewRowsConfig<Out, 64, true>{}) : f(FewRowsConfig<Out, 64, false>{});
  } else {
    plan.deep ? f(FewRowsConfig<Out, kTokens, true>{}) : f(FewRowsConfig<Out, kTokens, false>{});
  }
}

// The time of a cut: a block's way through its part of K or what all take from device memory, whichever is longer, the
// ends of tiles, and the exchange of sums. The numbers were fitted to times on an H200 (README.md). NOTE: of a cluster,
// several blocks share a multiprocessor even though others are idle.
template <class C>
double few_rows_us(int tokens, int64_t columns, int64_t depth_blocks, int splits) {
  const int64_t weights = ceil_div(columns, C::kRows), tiles = weights * ceil_div(tokens, C::kTokens);
  const int64_t resident = resident_clusters(kName, few_rows_kernel<C>, few_rows_shape<C>(splits));
  if (resident == 0 || (splits > 1 && tiles > resident)) return 1e30;
  const double waves = ceil_div(tiles, resident);
  const double load = static_cast<double>(std::min(tiles, resident) * splits) / sm_count();  // blocks a multiprocessor
  const double block = std::max(load, 0.62) * (0.226 + 0.0008 * C::kTokens);
  const double loads = waves * ceil_div(depth_blocks, splits) * block + (waves - 1) * (0.58 + 0.001 * C::kTokens);
  const double all = static_cast<double>(weights * C::kRows * depth_blocks * kBlockK) / 4e6;
  const double sent = std::max(load, 0.53) * C::kTokens / 64 * (splits - 1) / splits;
  const double sums = splits > 1 ? 0.53 + 0.14 * splits + sent : 0.0;
  return 1.5 + std::max(loads, all) + sums + 0.007 * C::kTokens + (C::kBlocks == 1 ? 0.02 : 0.0);
}

// Kept a device and size of the weights: weighing up the cuts takes as long as a launch.
template <class Out, int kTokens>
FewRowsPlan plan_few_rows(int64_t columns, int64_t depth_blocks, bool batch_invariant) {
  static std::map<std::tuple<int, int64_t, int64_t, bool>, FewRowsPlan> known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::tuple key{device, columns, depth_blocks, batch_invariant};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  FewRowsPlan best;
  const int most = batch_invariant ? 1 : static_cast<int>(std::min<int64_t>(8, depth_blocks));
  const auto consider = [&](FewRowsPlan plan) {
    for (plan.splits = 1; plan.splits <= most; ++plan.splits) {
      with_config<Out, kTokens>(plan, [&](auto config) {
        plan.us = few_rows_us<decltype(config)>(kTokens, columns, depth_blocks, plan.splits);
      });
      if (plan.us < best.us) best = plan;
    }
  };
  consider({.deep = true});
  if (kTokens == 128) {
    consider({.deep = true, .half = true});
    consider({.half = true});
  } else {
    consider({});
  }
  if (best.splits == 0) throw std::runtime_error("fp8_gemm: no cluster of this kernel fits on the device");
  return known[key] = best;
}

template <class C>
void launch_few_rows(const WideProblem& x, int splits, bool static_weights, cudaStream_t stream) {
  const int64_t blocks = ceil_div(x.k, kBlockK);
  const int token_tiles = ceil_div(x.rows, C::kTokens);  // one or two
  FewRowsParams p;
  p.tokens = ceil_div(ceil_div(x.rows, token_tiles), 8) * 8;
  p.tiles = ceil_div(x.columns, C::kRows) * token_tiles;
  p.token_shift = token_tiles - 1;
  p.a = tensor_map(fp8_view(x.a, x.a_rows, x.k), p.tokens, kBlockK, true);
  p.a_sf = row_scales(x.a_sf, x.a_rows);
  p.b = tensor_map(fp8_view(x.b, x.b_rows, x.k), C::kRows, kBlockK, true);
  p.out = x.out.data<void>();
  p.b_sf = x.b_sf.data<float>();
  p.rows = x.rows;
  p.columns = x.columns;
  p.depth_blocks = static_cast<int>(blocks);
  p.splits = splits;
  p.accumulate = x.accumulate;
  p.static_weights = static_weights;
  Launch shape = few_rows_shape<C>(splits);
  const int clusters = splits > 1 ? p.tiles : std::min(p.tiles, some_clusters(kName, few_rows_kernel<C>, shape));
  shape.grid = dim3(static_cast<unsigned>(clusters * splits));
  launch(kName, few_rows_kernel<C>, shape, stream, p);
}

template <class Out>
void launch_few_rows(const WideProblem& x, bool batch_invariant, bool static_weights, cudaStream_t stream) {
  const auto run = [&](auto tokens) {
    const auto plan = plan_few_rows<Out, tokens>(x.columns, ceil_div(x.k, kBlockK), batch_invariant);
    with_config<Out, tokens>(
        plan, [&](auto config) { launch_few_rows<decltype(config)>(x, plan.splits, static_weights, stream); });
  };
  if (x.rows <= 16) return run(std::integral_constant<int, 16>{});
  if (x.rows <= 32) return run(std::integral_constant<int, 32>{});
  if (x.rows <= 64) return run(std::integral_constant<int, 64>{});
  run(std::integral_constant<int, 128>{});
}

}  // namespace

int64_t fp8_gemm_turns(int64_t m, int64_t n) {
  using C = Wgrad<Layout::kDense>;
  return ceil_div(m, C::kTileRows) * ceil_div(n, C::kTileColumns) * C::kConsumerWarps;
}

void fp8_gemm(Tensor out, std::optional<Tensor> turns, Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, bool accumulate,
              bool batch_invariant, bool static_weights, cudaStream_t stream) {
  DSV3_CHECK(a.dim() == 2 && b.dim() == 2, "fp8_gemm: a must be (M, K) and b (N, K), got ", a, " and ", b);
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1), blocks = ceil_div(k, kBlockK);
  check_operand("a", a, Dtype::kE4M3, m, k);
  check_operand("b", b, Dtype::kE4M3, n, k);
  check_depth(kName, n, k);
  check_row_scales("a_sf", a_sf, m, blocks);
  check_bulk_scales("a_sf", a_sf);
  const bool row_scales = b_sf.dim() == 2 && b_sf.size(0) == n;
  if (row_scales) {
    check_row_scales("b_sf", b_sf, n, blocks);
    check_bulk_scales("b_sf", b_sf);
  } else {
    check_block_scales(b_sf, ceil_div(n, kBlockK), blocks);
  }
  const bool wide_out = out.dtype() == Dtype::kFloat32;
  check_operand("out", out, wide_out ? Dtype::kFloat32 : Dtype::kBFloat16, m, n);
  DSV3_CHECK(wide_out || !(accumulate || row_scales), "fp8_gemm: out must be float32 where it accumulates or b has a ",
             "scale for every 1x128, got ", out);
  check_same_device(kName, out, {&a, &a_sf, &b, &b_sf});
  if (m == 0 || n == 0) return;
  const DeviceGuard guard(out);
  const int rows = checked_int("M", m), columns = checked_int("N", n);
  WideProblem x{out, a, a_sf, b, b_sf, nullptr, m, n, k, rows, columns, 1, 0, accumulate};
  if (row_scales) {
    if (turns && !batch_invariant) {
      check_operand("turns", *turns, Dtype::kInt32, fp8_gemm_turns(m, n));
      check_same_device(kName, out, {&*turns});
      x.turns = turns->data<int>();
    }
    return launch_wgrad<Layout::kDense>(kName, x, batch_invariant, stream);
  }
  if (m <= kFewRows) {
    return wide_out ? launch_few_rows<float>(x, batch_invariant, static_weights, stream)
                    : launch_few_rows<__nv_bfloat16>(x, batch_invariant, static_weights, stream);
  }
  if (wide_out) return launch_cheapest<Wide256<float>, Wide128<float>>(x, stream);
  launch_cheapest<Wide256<__nv_bfloat16>, Wide192, Wide144, Wide128<__nv_bfloat16>>(x, stream);
}

}  // namespace dsv3
