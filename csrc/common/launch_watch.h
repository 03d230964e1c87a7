// Who looks on while a library launches kernels: tests and tools ask which kernels ran.
#pragma once

#include <functional>

#include "common/device.h"

namespace grokkernels {

// Told of each launch before it, with the kernel's mangled name; the kernel runs where the answer is true.
using LaunchWatch = std::function<bool(const char* kernel, const LaunchShape& shape)>;

// The library's own; empty: nobody looks on. It is set while nothing is launched.
inline LaunchWatch& launch_watch() {
  static LaunchWatch watch;
  return watch;
}

}  // namespace grokkernels
