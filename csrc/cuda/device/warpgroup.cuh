// Warpgroups (sm_90): four neighbouring warps of a block, the first a multiple of four (PTX ISA, "setmaxnreg",
// "elect.sync").
#pragma once

#include <device/core.cuh>

namespace grokkernels::device {

// Registers of a thread, a multiple of 8 from 24 to 256, given back to the block or taken from what others gave back
// (then it waits for them). All warps of the warpgroup call with the same number. The block starts with what the
// compiler took per thread: __launch_bounds__(384, 1) makes that 168, and 40 + 2 * 232 = 3 * 168. (Without the 1 ptxas
// ignores both: "unable to determine register count at entry".)
template <int kRegisters>
GK_DEVICE void registers_give() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
GK_DEVICE void registers_take() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// True in one of the lanes, always the same for the same `lanes`, and not to be assumed which.
GK_DEVICE bool elect_one(uint32_t lanes = kAllLanes) {
  uint32_t elected;
  asm volatile("{\n.reg .pred mine;\nelect.sync _|mine, %1;\nselp.u32 %0, 1, 0, mine;\n}" : "=r"(elected) : "r"(lanes));
  return elected != 0;
}

// threadIdx.x / 128 as a number that the compiler knows to be the same in the whole warp: branches on it do not
// diverge.
GK_DEVICE int warpgroup_id() { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / 128), 0); }

}  // namespace grokkernels::device
