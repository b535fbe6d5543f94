// out[r] = A[r, K] B[g, N, K]^T for the rows r of each group, offsets[g] <= r < offsets[g + 1], and the same with a
// number of rows a group instead of offsets (the masked layout of decoding). Groups of any size, no padding; the
// offsets are read on the device alone. 2 R N K operations; bytes R K + G N K + out. Groups of many rows take wide.cuh,
// bound by the tensor cores; where there may be groups of few, groups.cuh takes those first, in narrow.cuh, which reads
// their weights once.
#include "../ops.h"
#include "groups.cuh"
#include "wide_launch.cuh"

namespace dsv3 {
namespace {

constexpr int kFewRows = 128;  // a group on average; the host knows no more

template <Layout kLayout, class Out>
using Wide = WideConfig<kLayout, Out, false, 128, 2, 2, 4, 2>;

template <class C>
NarrowParams narrow_params(const WideProblem& x) {
  NarrowParams p;
  p.a = tensor_map(fp8_view(x.a, x.a_rows, x.k), C::kBox, kBlockK, true);
  p.a_sf = row_scales(x.a_sf, x.a_rows);
  p.b = tensor_map(fp8_view(x.b, x.b_rows, x.k), kTileRows, kBlockK, true);
  p.out = x.out.data<void>();
  p.b_sf = x.b_sf.data<float>();
  p.numbers = x.offsets;
  p.error = device_error();
  p.rows = x.limit;
  p.columns = x.columns;
  p.depth_blocks = static_cast<int>(ceil_div(x.k, kBlockK));
  p.groups = x.groups;
  return p;
}

template <Layout kLayout, class Out>
void launch_groups(const char* name, WideProblem x, cudaStream_t stream) {
  using Few = NarrowConfig<kLayout, Out>;
  using Many = Wide<kLayout, Out>;
  using C = GroupsConfig<Few, Many>;
  static_assert(C::kSharedBytes <= 227 * 1024, "the stages do not fit");
  x.fewest_rows = Few::kTokens + 1;
  Launch shape{dim3(), dim3(C::kThreads), C::kSharedBytes, C::kCluster};
  const int64_t few = ceil_div(x.columns, kTileRows * C::kCluster) * x.groups;
  const int64_t many = x.limit < x.fewest_rows ? 0 : wide_tiles<Many>(x);
  const int64_t clusters = std::min<int64_t>(std::max(few, many), some_clusters(name, groups_kernel<Few, Many>, shape));
  shape.grid = dim3(static_cast<unsigned>(clusters * C::kCluster));
  launch(name, groups_kernel<Few, Many>, shape, stream, narrow_params<Few>(x), wide_params<Many>(x));
}

// Checks b and its scales against a's K and returns (G, N).
std::pair<int64_t, int64_t> check_weights(const char* name, const Tensor& a, const Tensor& b, const Tensor& b_sf,
                                          int64_t k) {
  DSV3_CHECK(b.dim() == 3 && b.size(2) == k, name, ": b must be (G, N, K) with a's K, got ", b, " and ", a);
  const int64_t groups = b.size(0), n = b.size(1);
  check_operand("b", b, Dtype::kE4M3, groups, n, k);
  check_block_scales(b_sf, groups, ceil_div(n, kBlockK), ceil_div(k, kBlockK));
  check_depth(name, n, k);
  return {groups, n};
}

bool check_out(const Tensor& out) {
  DSV3_CHECK(out.dtype() == Dtype::kFloat32 || out.dtype() == Dtype::kBFloat16, "out must be bfloat16 or float32, got ",
             out);
  check_operand("out", out, out.dtype());
  return out.dtype() == Dtype::kFloat32;
}

}  // namespace

void grouped_fp8_gemm(Tensor out, Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor offsets, bool batch_invariant,
                      cudaStream_t stream) {
  constexpr const char* kName = "grouped_fp8_gemm";
  DSV3_CHECK(a.dim() == 2, "grouped_fp8_gemm: a must be (R, K), got ", a);
  const int64_t r = a.size(0), k = a.size(1);
  check_operand("a", a, Dtype::kE4M3, r, k);
  const auto [groups, n] = check_weights(kName, a, b, b_sf, k);
  check_row_scales("a_sf", a_sf, r, ceil_div(k, kBlockK));
  check_bulk_scales("a_sf", a_sf);
  check_operand("offsets", offsets, Dtype::kInt32, groups + 1);
  const bool wide_out = check_out(out);
  check_shape("out", out, r, n);
  check_same_device(kName, out, {&a, &a_sf, &b, &b_sf, &offsets});
  if (r == 0 || n == 0 || groups == 0) return;
  const DeviceGuard guard(out);
  const int rows = checked_int("R", r);
  checked_int("G * N", groups * n);
  const WideProblem x{out,
                      a,
                      a_sf,
                      b,
                      b_sf,
                      offsets.data<int>(),
                      r,
                      groups * n,
                      k,
                      rows,
                      static_cast<int>(n),
                      static_cast<int>(groups),
                      rows,
                      false};
  // Every sum runs over K in order, whatever the kernel: batch_invariant changes nothing here.
  (void)batch_invariant;
  if (r <= kFewRows * groups) {
    return wide_out ? launch_groups<Layout::kRows, float>(kName, x, stream)
                    : launch_groups<Layout::kRows, __nv_bfloat16>(kName, x, stream);
  }
  return wide_out ? launch_wide<Wide<Layout::kRows, float>>(kName, x, stream)
                  : launch_wide<Wide<Layout::kRows, __nv_bfloat16>>(kName, x, stream);
}

void masked_grouped_fp8_gemm(Tensor out, Tensor a, Tensor a_sf, Tensor b, Tensor b_sf, Tensor counts,
                             bool batch_invariant, cudaStream_t stream) {
  constexpr const char* kName = "masked_grouped_fp8_gemm";
  DSV3_CHECK(a.dim() == 3, "masked_grouped_fp8_gemm: a must be (G, R, K), got ", a);
  const int64_t r = a.size(1), k = a.size(2), blocks = ceil_div(k, kBlockK);
  const auto [groups, n] = check_weights(kName, a, b, b_sf, k);
  check_operand("a", a, Dtype::kE4M3, groups, r, k);
  const int64_t stride = ceil_div(groups * r, 4) * 4;
  check_shape("a_sf", a_sf, groups, r, blocks);
  DSV3_CHECK(a_sf.is_cuda() && a_sf.dtype() == Dtype::kFloat32, "a_sf must be float32 on a CUDA device, got ", a_sf);
  const bool strided = (groups <= 1 || a_sf.stride(0) == r) && (r <= 1 || a_sf.stride(1) == 1) &&
                       (blocks <= 1 || a_sf.stride(2) == stride);
  DSV3_CHECK(strided || a_sf.numel() == 0, "a_sf must have strides (", r, ", 1, ", stride, "), got (", a_sf.stride(0),
             ", ", a_sf.stride(1), ", ", a_sf.stride(2), ")");
  check_bulk_scales("a_sf", a_sf);
  check_operand("counts", counts, Dtype::kInt32, groups);
  const bool wide_out = check_out(out);
  check_shape("out", out, groups, r, n);
  check_same_device(kName, out, {&a, &a_sf, &b, &b_sf, &counts});
  if (groups * r == 0 || n == 0) return;
  const DeviceGuard guard(out);
  checked_int("G * R", groups * r);
  checked_int("G * N", groups * n);
  const WideProblem x{out,
                      a,
                      a_sf,
                      b,
                      b_sf,
                      counts.data<int>(),
                      groups * r,
                      groups * n,
                      k,
                      static_cast<int>(groups * r),
                      static_cast<int>(n),
                      static_cast<int>(groups),
                      static_cast<int>(r),
                      false};
  (void)batch_invariant;
  wide_out ? launch_groups<Layout::kMasked, float>(kName, x, stream)
           : launch_groups<Layout::kMasked, __nv_bfloat16>(kName, x, stream);
}

}  // namespace dsv3
