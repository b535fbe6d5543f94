// Host side of the wide kernel.
#pragma once

#include <algorithm>
#include <type_traits>

#include "operands.h"
#include "wide.cuh"

namespace dsv3 {

// A product without its tile: out [rows, columns] (kDepth: [groups, rows, columns]), the sizes of the whole tensors.
struct WideProblem {
  Tensor out, a, a_sf, b, b_sf;
  const int* offsets;
  int64_t a_rows, b_rows, k;  // of a and b as matrices
  int rows, columns, groups, limit;
  bool accumulate;
  int fewest_rows = 0;   // of a group that is taken
  int* turns = nullptr;  // of a weight gradient, see WideParams
};

template <class C>
Launch wide_shape() {
  static_assert(sizeof(WideShared<C>) <= 227 * 1024, "the stages do not fit");
  return {dim3(), dim3(C::kThreads), sizeof(WideShared<C>), C::kCluster};
}

// The tiles of a product, how many clusters can work on them at once, and for a weight gradient into how many parts K
// is cut and the time that it should take.
struct WidePlan {
  int64_t tiles, resident;
  int splits = 1;
  int64_t time = 0;  // in tenths of what a K block of a tile of 128 x 128 takes
};

// Rows that groups leave unused at their ends can add a span each.
template <class C>
int64_t wide_tiles(const WideProblem& x) {
  const int64_t spans = ceil_div(x.rows, C::kTileRows * C::kCluster) + (C::kByRows ? x.groups : 0);
  return spans * ceil_div(x.columns, C::kTileColumns) * (C::kLayout == Layout::kDepth ? x.groups : 1);
}

// K is cut where there are few tiles: so that the last wave of tiles is nearly full, without writing them too often,
// which takes as long as some K blocks, more where parts wait for each other. Fitted to times on an H200 (README.md).
template <class C>
WidePlan plan_wide(const char* name, const WideProblem& x) {
  WidePlan plan{.tiles = wide_tiles<C>(x), .resident = some_clusters(name, wide_kernel<C>, wide_shape<C>())};
  if constexpr (!C::kRowScaleB) return plan;
  constexpr int kMost = 8, kTileEnd = 5, kPartEnd = 8, kBlock = C::kHalves == 1 ? 10 : 18;
  const int64_t groups = C::kLayout == Layout::kDepth ? x.groups : 1;
  const int64_t depth = ceil_div(ceil_div(x.k, kBlockK), groups);  // of a group, if they are alike
  const int most = C::kSplits && x.turns != nullptr ? static_cast<int>(std::min<int64_t>(kMost, depth)) : 1;
  for (int splits = 1; splits <= most; ++splits) {
    const int64_t waves = ceil_div(plan.tiles * splits, plan.resident);
    const int64_t time = waves * (ceil_div(depth, splits) + (splits == 1 ? kTileEnd : kPartEnd)) * kBlock;
    if (splits > 1 && time >= plan.time) continue;
    plan.splits = splits;
    plan.time = time;
  }
  return plan;
}

template <class C>
WideParams wide_params(const WideProblem& x) {
  WideParams p{};
  p.a = tensor_map(fp8_view(x.a, x.a_rows, x.k), C::kCopyRows, kBlockK, true);
  p.a_sf = row_scales(x.a_sf, x.a_rows);
  p.b = tensor_map(fp8_view(x.b, x.b_rows, x.k), C::kTileColumns / C::kCluster, kBlockK, true);
  p.b_row_sf = C::kRowScaleB ? row_scales(x.b_sf, x.b_rows) : RowScales{};
  if constexpr (std::is_same_v<typename C::Out, float>) {
    const int64_t out_rows = C::kLayout == Layout::kDepth ? static_cast<int64_t>(x.groups) * x.rows : x.rows;
    p.out_map = tensor_map(fp32_view(x.out, out_rows, x.columns), 16, kStoreBytes / 16 / sizeof(float), true);
  }
  p.out = x.out.data<void>();
  p.b_sf = C::kRowScaleB ? nullptr : x.b_sf.data<float>();
  p.offsets = x.offsets;
  // Whoever takes the other groups reports what is wrong with the offsets or counts.
  p.error = C::kLayout == Layout::kDense || x.fewest_rows > 0 ? nullptr : device_error();
  p.rows = x.rows;
  p.columns = x.columns;
  p.depth_blocks = static_cast<int>(ceil_div(x.k, kBlockK));
  p.groups = x.groups;
  p.limit = x.limit;
  p.fewest_rows = x.fewest_rows;
  p.accumulate = x.accumulate;
  p.splits = 1;
  return p;
}

template <class C>
void launch_wide(const char* name, const WideProblem& x, const WidePlan& plan, cudaStream_t stream) {
  WideParams p = wide_params<C>(x);
  Launch shape = wide_shape<C>();
  int64_t clusters = std::min<int64_t>(plan.tiles, plan.resident);
  // Where tiles are short and many; elsewhere the delay costs more than it saves (README.md).
  p.late_clocks = p.depth_blocks <= 8 && plan.tiles >= 8 * clusters ? 1200 : 0;
  p.splits = plan.splits;
  p.turns = x.turns;
  if (p.splits > 1) {
    check_cuda(cudaMemsetAsync(p.turns, 0, plan.tiles * C::kConsumerWarps * sizeof(int), stream), "cudaMemsetAsync");
    clusters = plan.tiles * p.splits;  // a part each: see wait_turn
  }
  shape.grid = dim3(static_cast<unsigned>(clusters * C::kCluster));
  launch(name, wide_kernel<C>, shape, stream, p);
}

template <class C>
void launch_wide(const char* name, const WideProblem& x, cudaStream_t stream) {
  launch_wide<C>(name, x, plan_wide<C>(name, x), stream);
}

// A product whose operands both have a scale for every 1x128, added to or written to fp32. NOTE: without multicast,
// which ties two blocks to each other's pace (README.md).
template <Layout kLayout>
using Wgrad = WideConfig<kLayout, float, true, 128, 1, 1, 4, 4>;
// The same in tiles of 256 rows, for large outputs: a warpgroup reads its columns and their scales once for two
// products.
template <Layout kLayout>
using TallWgrad = WideConfig<kLayout, float, true, 128, 1, 2, 3, 4, 2>;

// Launches the one whose predicted time is the shorter, batch_invariant always the first.
template <Layout kLayout>
void launch_wgrad(const char* name, const WideProblem& x, bool batch_invariant, cudaStream_t stream) {
  const WidePlan plan = plan_wide<Wgrad<kLayout>>(name, x);
  if (!batch_invariant) {
    const WidePlan tall = plan_wide<TallWgrad<kLayout>>(name, x);
    if (tall.time < plan.time) return launch_wide<TallWgrad<kLayout>>(name, x, tall, stream);
  }
  launch_wide<Wgrad<kLayout>>(name, x, plan, stream);
}

}  // namespace dsv3
