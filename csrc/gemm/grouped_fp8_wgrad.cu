// out[g, N, K] += A_t[N, tokens of g] B_t[K, tokens of g]^T in fp32, from the outputs of cast_transpose: each group's
// tokens are padded to a multiple of 128 with zeros, offsets are the unpadded ones. One writer an element; groups
// without tokens are left alone. 2 T N K operations; bytes T (N + K) and out read and written. wide.cuh.
#include "../ops.h"
#include "wide_launch.cuh"

namespace dsv3 {

void grouped_fp8_wgrad(Tensor out, Tensor a_t, Tensor a_sf, Tensor b_t, Tensor b_sf, Tensor offsets,
                       cudaStream_t stream) {
  constexpr const char* kName = "grouped_fp8_wgrad";
  DSV3_CHECK(a_t.dim() == 2 && b_t.dim() == 2 && a_t.size(1) == b_t.size(1),
             "grouped_fp8_wgrad: a_t must be (N, Tp) and b_t (K, Tp), got ", a_t, " and ", b_t);
  const int64_t n = a_t.size(0), k = b_t.size(0), slots = a_t.size(1), groups = offsets.numel() - 1;
  DSV3_CHECK(slots % kBlockK == 0 && k % 8 == 0, "grouped_fp8_wgrad: Tp must be a multiple of 128 and K of 8, got ",
             a_t, " and ", b_t);
  check_operand("a_t", a_t, Dtype::kE4M3, n, slots);
  check_operand("b_t", b_t, Dtype::kE4M3, k, slots);
  check_row_scales("a_sf", a_sf, n, slots / kBlockK);
  check_row_scales("b_sf", b_sf, k, slots / kBlockK);
  check_bulk_scales("a_sf", a_sf);
  check_bulk_scales("b_sf", b_sf);
  checked_int("Tp", slots);
  check_operand("offsets", offsets, Dtype::kInt32, groups + 1);
  check_operand("out", out, Dtype::kFloat32, groups, n, k);
  check_same_device(kName, out, {&a_t, &a_sf, &b_t, &b_sf, &offsets});
  if (n == 0 || k == 0 || slots == 0 || groups <= 0) return;
  const DeviceGuard guard(out);
  checked_int("G * N", groups * n);
  const WideProblem x{out,
                      a_t,
                      a_sf,
                      b_t,
                      b_sf,
                      offsets.data<int>(),
                      n,
                      k,
                      slots,
                      checked_int("N", n),
                      checked_int("K", k),
                      checked_int("G", groups),
                      checked_int("Tp", slots),
                      true};
  launch_wgrad<Layout::kDepth>(kName, x, false, stream);
}

}  // namespace dsv3
