// cp.async, as csrc/cuda/device/async.cuh has it: the bytes move at the wait, or at a random time before it.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

GK_DEVICE void copy_async_16(uint32_t to, const void* from, bool valid = true) {
  emulated::copy_async(to, from, 16, valid ? 16 : 0);
}

GK_DEVICE void copy_async_4(uint32_t to, const void* from, bool valid = true) {
  emulated::copy_async(to, from, 4, valid ? 4 : 0);
}

GK_DEVICE void copy_async_commit() { emulated::copy_async_commit(); }

template <int kGroupsLeft>
GK_DEVICE void copy_async_wait() {
  emulated::copy_async_wait(kGroupsLeft);
}

}  // namespace grokkernels::device
