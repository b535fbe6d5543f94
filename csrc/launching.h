#pragma once

#include <mutex>

namespace dsv3 {

// Held from the first look at an argument to the launch: what host functions remember (attributes of kernels, plans, error
// words) is shared, and calls come with and without the GIL.
inline std::mutex& launching() {
  static std::mutex mutex;
  return mutex;
}

}  // namespace dsv3
