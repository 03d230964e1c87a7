// Strides of tensors that kernels take as they lie in memory.
#pragma once

#include <cstdint>

namespace grokkernels {

// A matrix, or a stack of them, in elements from one to the next.
struct StackStrides {
  int64_t stack, row, col;

  bool operator==(const StackStrides&) const = default;
};

}  // namespace grokkernels
