// Warpgroups, as csrc/cuda/device/warpgroup.cuh has them: of setmaxnreg only the sums are checked, and the elected lane
// depends on the seed.
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

template <int kRegisters>
GK_DEVICE void registers_give() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulated::warp_collective(kAllLanes, "setmaxnreg.dec", nullptr,
                            [](void**, uint32_t) { emulated::set_registers(kRegisters, false); });
}

template <int kRegisters>
GK_DEVICE void registers_take() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  emulated::warp_collective(kAllLanes, "setmaxnreg.inc", nullptr,
                            [](void**, uint32_t) { emulated::set_registers(kRegisters, true); });
}

GK_DEVICE bool elect_one(uint32_t lanes = kAllLanes) {
  emulated::warp_collective(lanes, "elect_one", nullptr, [](void**, uint32_t) {});
  uint32_t left = lanes;
  for (uint64_t skip = emulated::settings().seed % static_cast<uint64_t>(__builtin_popcount(lanes)); skip > 0; --skip)
    left &= left - 1;
  return lane_id() == __builtin_ctz(left);
}

GK_DEVICE int warpgroup_id() { return emulated::current().index / 128; }

GK_DEVICE void scheduling_fence(uint32_t) {}

template <int kCount>
GK_DEVICE void scheduling_fence(uint32_t, const float (&)[kCount]) {}

}  // namespace grokkernels::device
