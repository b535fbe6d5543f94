// Host side of a launch: device guard, cached device properties, checked and programmatic launches, dispatch on a
// dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tensor.h"

namespace dsv3 {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch error is not sticky: clear it, so that it is reported once and here
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes a tensor's device current for the lifetime of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Tensor& t) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (t.device() != previous_) check_cuda(cudaSetDevice(t.device()), "cudaSetDevice");
    changed_ = t.device() != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// Number of multiprocessors of the current device (132 on an H100 SXM, 78 on an H20).
inline int sm_count() {
  constexpr int kMaxDevices = 64;
  static int counts[kMaxDevices] = {};
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (counts[device] == 0) {
    check_cuda(cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
  }
  return counts[device];
}

struct Launch {
  dim3 grid;
  dim3 block;
  size_t smem = 0;
  int cluster = 1;
};

// Launches with programmatic stream serialisation: the kernel may start while the one before it drains, and must call
// `wait_for_inputs` before it reads anything that an earlier kernel wrote.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Launch& shape, cudaStream_t stream, Args&&... args) {
  if (shape.grid.x == 0) return;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = shape.cluster;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

// Calls f with a value of the C++ type of a floating dtype: visit_float(x.dtype(), [&](auto zero) { using T =
// decltype(zero); ... }).
template <class F>
void visit_float(const char* name, Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return f(__nv_bfloat16{});
    case Dtype::kFloat32:
      return f(float{});
    default:
      detail::fail(name, " must be bfloat16 or float32, got ", dtype);
  }
}

}  // namespace dsv3
