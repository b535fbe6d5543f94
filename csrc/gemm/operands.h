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

inline void check_depth(const char* op, int64_t n, int64_t k) {
  DSV3_CHECK(n % 8 == 0 && k > 0 && k % 16 == 0, op, ": N must be a multiple of 8 and K a positive one of 16, got N ",
             n, " and K ", k);
}

inline MatrixView fp8_view(const Tensor& t, int64_t rows, int64_t columns) {
  return {t.data<void>(), CU_TENSOR_MAP_DATA_TYPE_UINT8, rows, columns, columns};
}
inline RowScales row_scales(const Tensor& t, int64_t rows) {
  return {t.data<float>(), static_cast<int>(rows), static_cast<int>(ceil_div(rows, 4) * 4)};
}
template <class Out>
MatrixView out_view(const Tensor& t, int64_t rows, int64_t columns) {
  constexpr auto kType = sizeof(Out) == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return {t.data<void>(), kType, rows, columns, columns * static_cast<int64_t>(sizeof(Out))};
}

}  // namespace dsv3
