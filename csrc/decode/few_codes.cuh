// Weights in FP8 for few tokens: codes become bf16 in registers on their way into the tensor core, exactly, and the tokens stay
// bf16. The sums of 128 columns, which share a scale, are multiplied by it in fp32; so the product is that of the dequantised
// weights, unrounded.
#pragma once

#include <cstdint>

#include "../common/launch.cuh"
#include "../common/tensor.h"
#include "../common/vector.cuh"
#include "../hopper/wgmma.cuh"

namespace dsv3 {

constexpr int kScaleBlock = 128;  // rows and columns that share a scale

// Scales are read one by one: those of one expert among others may begin anywhere.
inline void check_scales(const char* name, const Tensor& sf) {
  DSV3_CHECK(sf.is_cuda() && sf.dtype() == Dtype::kFloat32 && sf.is_contiguous(), name,
             " must be float32 on a CUDA device and contiguous, got ", sf);
}

// Two codes as a pair of bf16, by way of fp16 and fp32. NOTE: shifted into place and multiplied by 2^120 it is four instructions
// of the integer pipe instead of two, and that is what there is least of.
__device__ __forceinline__ uint32_t codes_to_bf16(uint16_t codes) {
  uint32_t pair;
  asm("{ .reg .b32 h; .reg .b16 l, u; .reg .f32 x, y; cvt.rn.f16x2.e4m3x2 h, %1; mov.b32 {l, u}, h; cvt.f32.f16 x, l; "
      "cvt.f32.f16 y, u; cvt.rn.bf16x2.f32 %0, y, x; }"
      : "=r"(pair)
      : "h"(codes));
  return pair;
}
// The lower and the upper two of four.
__device__ __forceinline__ void codes_to_bf16(uint32_t codes, uint32_t& lower, uint32_t& upper) {
  lower = codes_to_bf16(static_cast<uint16_t>(codes)), upper = codes_to_bf16(static_cast<uint16_t>(codes >> 16));
}

__device__ __forceinline__ uint16_t load_shared_codes(uint32_t address) {  // two of them
  uint16_t codes;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(codes) : "r"(address) : "memory");
  return codes;
}

// The scales of every kStep-th of a row of blocks: the lanes of a warp have 32 of them at a time.
template <int kStep>
class BlockScales {
 public:
  __device__ __forceinline__ BlockScales(const float* row, int first, int blocks)
      : row_(row), block_(first), blocks_(blocks) {
    read();
  }
  __device__ __forceinline__ float next() {
    if (at_ == kWarpSize) read();
    return __shfl_sync(0xffffffffu, mine_, at_++);
  }

 private:
  __device__ __forceinline__ void read() {
    const int mine = block_ + static_cast<int>(threadIdx.x) % kWarpSize * kStep;
    mine_ = mine < blocks_ ? row_[mine] : 0.f;
    block_ += kWarpSize * kStep;
    at_ = 0;
  }
  const float* row_;
  int block_, blocks_, at_;
  float mine_;
};

}  // namespace dsv3
