// The error words of the devices: see device_error.h.
#include "device_error.h"

#include <stdexcept>
#include <string>

#include "launch.cuh"

namespace dsv3 {
namespace {
constexpr int kMaxDevices = 64;
DeviceError* words[kMaxDevices] = {};
int devices_with_word = 0;  // a bound on the devices to look at: 0 until the first word is made
}  // namespace

DeviceError* device_error() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  if (words[device] == nullptr) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // an allocation of the host's disturbs no capture
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    void* word = nullptr;
    const cudaError_t status = cudaHostAlloc(&word, sizeof(DeviceError), cudaHostAllocMapped | cudaHostAllocPortable);
    check_cuda(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    check_cuda(status, "cudaHostAlloc of the device error word");
    words[device] = new (word) DeviceError{};
    devices_with_word = device + 1 > devices_with_word ? device + 1 : devices_with_word;
  }
  return words[device];
}

void raise_device_error() {
  for (int device = 0; device < devices_with_word; ++device) {
    volatile DeviceError* const word = words[device];
    if (word == nullptr || word->code == 0) continue;
    const auto code = static_cast<DeviceErrorCode>(word->code);
    const std::string group = std::to_string(word->group), limit = std::to_string(word->limit);
    const std::string first = std::to_string(word->first), second = std::to_string(word->second);
    word->code = 0;
    std::string text;
    if (code == DeviceErrorCode::kOffsets) {
      text = "offsets must start at 0, not decrease and stay within the " + limit + " rows, got offsets[" + group +
             "] = " + first + " before " + second;
    } else if (code == DeviceErrorCode::kSlots) {
      text = "offsets must stay within the " + limit + " slots, got groups that need " + first;
    } else if (code == DeviceErrorCode::kPages) {
      text = "block_table must name one of the " + limit + " pages for every key of a sequence, got block_table[" +
             group + ", " + second + "] = " + first;
    } else if (code == DeviceErrorCode::kCacheSlots) {
      text = "slot_mapping must be -1 or one of the " + limit + " rows of the cache, got slot_mapping[" + group +
             "] = " + first;
    } else if (code == DeviceErrorCode::kPositions) {
      text = "positions must lie within the " + limit + " rows of cos and sin, got positions[" + group + "] = " + first;
    } else {
      text = "counts must lie between 0 and the " + limit + " rows of a group, got counts[" + group + "] = " + first;
    }
    throw std::runtime_error("an earlier op on device " + std::to_string(device) + " did nothing: " + text);
  }
}

}  // namespace dsv3
