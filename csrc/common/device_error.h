// What a kernel found wrong in data that the host has not seen: offsets that decrease, counts that exceed the rows. The
// kernel writes nothing wrong and sets a word in pinned memory, one a device; the next call from the host reads it
// without a synchronisation, clears it and raises.
#pragma once

#include <cstdint>

namespace dsv3 {

enum class DeviceErrorCode : uint32_t { kNone, kOffsets, kSlots, kCounts, kPages, kCacheSlots, kPositions };

struct DeviceError {
  uint32_t code;
  int32_t group;
  int64_t first, second, limit;
};

// The current device's word, mapped into its address space. Made at the first call, also while a stream is captured.
DeviceError* device_error();

// Throws std::runtime_error with the numbers if a kernel of any device has reported an error since the last call.
void raise_device_error();

}  // namespace dsv3
