// Every native op. A host function checks its arguments, configures, launches and checks the launch; it allocates
// nothing on the device, never synchronises and is safe to capture in a CUDA graph. Outputs come first, then inputs,
// scalars, the stream. T tokens, H hidden. "float" dtypes are bfloat16 or float32, the same for all tensors of the call
// unless said.
#pragma once

#include <optional>

#include "common/tensor.h"

typedef struct CUstream_st* cudaStream_t;  // as the CUDA headers have it, so that the bindings need none of them

namespace dsv3 {

// norm/rmsnorm.cu. x, y, residual, residual_out, dy, dx, dresidual: float [T, H]; weight float [H]; rstd, dweight fp32;
// partial fp32 [blocks, H] is workspace (one row a multiprocessor is best).
void rmsnorm(Tensor y, std::optional<Tensor> residual_out, Tensor rstd, Tensor x, std::optional<Tensor> residual,
             Tensor weight, double eps, cudaStream_t stream);
void rmsnorm_backward(Tensor dx, Tensor dweight, Tensor partial, Tensor dy, std::optional<Tensor> dresidual, Tensor x,
                      Tensor weight, Tensor rstd, cudaStream_t stream);

}  // namespace dsv3
