// Barriers of part of a block, as csrc/cuda/device/barrier.cuh has them.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

GK_DEVICE void named_barrier_sync(int id, int threads) { emulated::named_barrier(id, threads, true); }
GK_DEVICE void named_barrier_arrive(int id, int threads) { emulated::named_barrier(id, threads, false); }

}  // namespace grokkernels::device
