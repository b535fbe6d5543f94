// Host side of a launch: device guard, cached device properties, checked and programmatic launches, dispatch on a
// dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

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
  int carveout = -1;  // per cent of a multiprocessor's memory to share, the rest being L1; -1: as the driver chooses
};

// Dynamic shared memory beyond what every kernel may use must be asked for, once a kernel and device.
inline void allow_smem(const char* name, const void* kernel, size_t bytes) {
  constexpr size_t kDefault = 32 * 1024;  // 48 KiB with the static part
  if (bytes <= kDefault) return;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  size_t& known = allowed[{device, kernel}];
  if (bytes <= known) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
  known = bytes;
}

// Launches with programmatic stream serialisation: the kernel may start while the one before it drains, and must call
// `wait_for_inputs` before it reads anything that an earlier kernel wrote.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const Launch& shape, cudaStream_t stream, Args&&... args) {
  if (shape.grid.x == 0) return;
  allow_smem(name, reinterpret_cast<const void*>(kernel), shape.smem);
  cudaLaunchAttribute attributes[3] = {};
  unsigned count = 0;
  const auto attribute = [&](cudaLaunchAttributeID id) -> cudaLaunchAttributeValue& {
    attributes[count].id = id;
    return attributes[count++].val;
  };
  attribute(cudaLaunchAttributeProgrammaticStreamSerialization).programmaticStreamSerializationAllowed = 1;
  if (shape.cluster > 1) {
    attribute(cudaLaunchAttributeClusterDimension).clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  }
  if (shape.carveout >= 0) {
    attribute(cudaLaunchAttributePreferredSharedMemoryCarveout).sharedMemCarveout = shape.carveout;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...), name);
}

// Clusters (of one block: blocks) of a kernel that fit on the current device at once: the grid of a persistent kernel.
// None where the device has been divided and a cluster is larger than the part. Kept a kernel and device, since asking
// takes longer than a launch.
template <class... Params>
int resident_clusters(const char* name, void (*kernel)(Params...), const Launch& shape) {
  using Key = std::tuple<int, const void*, size_t, int>;
  static std::map<Key, int> known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const Key key{device, reinterpret_cast<const void*>(kernel), shape.smem, shape.cluster};
  if (const auto found = known.find(key); found != known.end()) return found->second;
  allow_smem(name, reinterpret_cast<const void*>(kernel), shape.smem);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.cluster);
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.smem;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  check_cuda(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), name);
  return known[key] = clusters;
}

// The same for a kernel that is about to run: throws where there are none.
template <class... Params>
int some_clusters(const char* name, void (*kernel)(Params...), const Launch& shape) {
  const int clusters = resident_clusters(name, kernel, shape);
  if (clusters == 0) throw std::runtime_error(std::string(name) + ": no cluster of this kernel fits on the device");
  return clusters;
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
