// mbarrier, as csrc/cuda/device/mbarrier.cuh has it. A wait that can never end is named in the deadlock's report, with
// what the barrier still expects.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

GK_DEVICE void mbarrier_init(uint32_t barrier, int arrivals) { emulated::mbarrier_init(barrier, arrivals); }
GK_DEVICE void fence_mbarrier_init() { emulated::fence_mbarriers(); }
GK_DEVICE void mbarrier_arrive(uint32_t barrier) { emulated::mbarrier_arrive(barrier, 0, 1); }
GK_DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  emulated::mbarrier_arrive(barrier, bytes, 1);
}
GK_DEVICE void mbarrier_expect(uint32_t barrier, uint32_t bytes) { emulated::mbarrier_arrive(barrier, bytes, 0); }
GK_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) { emulated::mbarrier_arrive(barrier, 0, 1); }
GK_DEVICE void mbarrier_arrive_cluster_release(uint32_t barrier) { emulated::mbarrier_arrive(barrier, 0, 1); }
GK_DEVICE void mbarrier_arrive_after_copies(uint32_t barrier) { emulated::mbarrier_arrive_after_copies(barrier); }
GK_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) { emulated::mbarrier_wait(barrier, parity); }
GK_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) { emulated::mbarrier_wait(barrier, parity); }

}  // namespace grokkernels::device
