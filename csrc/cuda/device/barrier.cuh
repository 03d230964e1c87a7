// Barriers of part of a block: bar.sync and bar.arrive with a number from 1 to 15 (0 is sync_threads). `threads` is a
// multiple of 32 and counts those that arrive and those that wait.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

GK_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

GK_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace grokkernels::device
