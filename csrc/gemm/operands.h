// Checks and views of the operands that the FP8 products share.
#pragma once

#include "../common/tensor.h"
#include "../hopper/tensor_map.h"
#include "schedule.cuh"

namespace dsv3 {

inline void check_same_device(const char* op, const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* const t : others) {
    DSV3_CHECK(t->is_cuda() && t->device() == first.device(), op, ": tensors on different devices, shapes ", first,
               " and ", *t);
  }
}

inline int checked_int(const char* what, int64_t value) {
  DSV3_CHECK(value >= 0 && value < INT32_MAX - 512, what, " must be less than 2^31 - 512, got ", value);
  return static_cast<int>(value);
}

// Row scales are read by bulk copies, from multiples of 16 bytes on; a view of some rows may begin elsewhere.
inline void check_bulk_scales(const char* name, const Tensor& sf) {
  DSV3_CHECK(sf.aligned(16) || sf.numel() == 0, name, " must be 16-byte aligned, of shape ", sf);
}

// Block scales are read one at a time, so any expert's scales may be taken out of a stack of them.
template <class... Sizes>
void check_block_scales(const Tensor& sf, Sizes... sizes) {
  DSV3_CHECK(sf.is_cuda() && sf.dtype() == Dtype::kFloat32, "b_sf must be float32 on a CUDA device, got ", sf);
  DSV3_CHECK(sf.is_contiguous(), "b_sf must be contiguous, got strides that are not, of shape ", sf);
  check_shape("b_sf", sf, sizes...);
}

inline void check_depth(const char* op, int64_t n, int64_t k) {
  checked_int("K", k);
  DSV3_CHECK(n % 8 == 0 && k > 0 && k % 16 == 0, op, ": N must be a multiple of 8 and K a positive one of 16, got N ",
             n, " and K ", k);
}

inline MatrixView fp8_view(const Tensor& t, int64_t rows, int64_t columns) {
  return {t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, columns, columns};
}
inline RowScales row_scales(const Tensor& t, int64_t rows) {
  return {t.data<float>(), static_cast<int>(ceil_div(rows, 4) * 4)};
}
inline MatrixView fp32_view(const Tensor& t, int64_t rows, int64_t columns) {
  return {t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_FLOAT32, rows, columns,
          columns * static_cast<int64_t>(sizeof(float))};
}

}  // namespace dsv3
