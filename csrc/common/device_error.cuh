// The device's side of device_error.h.
#pragma once

#include "device_error.h"

namespace dsv3 {

__device__ __forceinline__ void report(DeviceError* error, DeviceErrorCode code, int group, int64_t first,
                                       int64_t second, int64_t limit) {
  volatile DeviceError* const word = error;
  word->group = group;
  word->first = first;
  word->second = second;
  word->limit = limit;
  __threadfence_system();
  word->code = static_cast<uint32_t>(code);
}

}  // namespace dsv3
