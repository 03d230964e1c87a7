// What a launcher and its caller agree on: the grid, and the stream as an opaque pointer, so that no header but the
// device's own names a CUDA type.
#pragma once

#include <cstddef>
#include <cstdint>

namespace grokkernels {

// A cudaStream_t; nothing to the emulated device.
using Stream = void*;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

struct Size3 {
  unsigned x = 1, y = 1, z = 1;
};

struct LaunchShape {
  Size3 grid, block;
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  unsigned cluster = 1;     // blocks of a cluster, along x
};

}  // namespace grokkernels
