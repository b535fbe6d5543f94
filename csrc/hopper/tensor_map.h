// TMA descriptors. The driver's encoder is fetched at run time, so that the module links no libcuda.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../common/launch.cuh"

namespace dsv3 {

// A matrix of `rows` rows of `columns` elements, row_stride bytes apart (a multiple of 16), read or written in boxes.
// Elements outside the matrix read as zero and are not written.
struct MatrixView {
  const void* data;
  CUtensorMapDataType dtype;
  int64_t rows, columns, row_stride;
};

namespace detail {
template <int kDims>
CUtensorMap encode_map(const MatrixView& m, const cuuint64_t (&sizes)[kDims], const cuuint64_t (&strides)[kDims - 1],
                       const cuuint32_t (&box)[kDims], bool swizzle) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map;
  cuuint32_t steps[kDims];
  for (cuuint32_t& step : steps) step = 1;
  const CUresult status =
      encode(&map, m.dtype, kDims, const_cast<void*>(m.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  DSV3_CHECK(status == CUDA_SUCCESS, "no TMA descriptor for ", m.rows, " rows of ", m.columns, " elements, ",
             m.row_stride, " bytes apart (driver error ", static_cast<int>(status), ")");
  return map;
}
}  // namespace detail

inline CUtensorMap tensor_map(const MatrixView& m, int box_rows, int box_columns, bool swizzle) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.row_stride)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  return detail::encode_map<2>(m, sizes, strides, box, swizzle);
}

// A bf16 matrix as sub-blocks of 64 columns, [columns / 64, rows, 64]: boxes of rows and several sub-blocks, which come one behind
// the other.
inline CUtensorMap sub_blocks_map(const void* data, int64_t rows, int64_t columns, int box_rows, int box_subs) {
  constexpr int kColumns = 64, kBytes = 2;
  const MatrixView m{data, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rows, columns, columns * kBytes};
  const cuuint64_t sizes[] = {kColumns, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(columns / kColumns)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(m.row_stride), kColumns * kBytes};
  const cuuint32_t box[] = {kColumns, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_subs)};
  return detail::encode_map<3>(m, sizes, strides, box, true);
}

}  // namespace dsv3
