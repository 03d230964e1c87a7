// cp.async (sm_80): 16 or 4 bytes from global to shared memory without registers. A thread waits for its own copies;
// others see them after a barrier that follows that wait.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

// 16 bytes to a shared address, past the L1 cache; zeros when not `valid` (then nothing is read). Both 16-byte aligned.
GK_DEVICE void copy_async_16(uint32_t to, const void* from, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 4 bytes, 4-byte aligned: for rows that are not 16-byte aligned.
GK_DEVICE void copy_async_4(uint32_t to, const void* from, bool valid = true) {
  const int bytes = valid ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The copies since the last commit become a group.
GK_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroupsLeft groups of this thread are under way.
template <int kGroupsLeft>
GK_DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

}  // namespace grokkernels::device
