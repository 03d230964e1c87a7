// Warpgroups (sm_90): four neighbouring warps of a block, the first a multiple of four (PTX ISA, "setmaxnreg",
// "elect.sync").
#pragma once

#include <device/core.cuh>
#include <device/memory.cuh>

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

// No instruction is scheduled across this. Within a basic block ptxas moves arithmetic past waits for products under
// way and past arrivals at barriers, which nothing in the block needs; so this ends the block, by a loop that is never
// entered, for one branch. `number` is never 2^32 - 1, and ptxas must not know that: a parameter of the kernel, or an
// address in a register. tools/cuda_check.py shows whether it helped. (An empty loop and a branch to what follows fold
// away. A predicated exit costs less, but ptxas waits for all products under way before it: C7517.)
GK_DEVICE void scheduling_fence(uint32_t number) {
  asm volatile(
      "{\n.reg .pred never;\nsetp.eq.u32 never, %0, 0xffffffff;\nNEVER: @!never bra ON;\nnanosleep.u32 64;\n"
      "bra NEVER;\nON:\n}" ::"r"(number)
      : "memory");
}

// The same, and `made` is made before it: what later blocks alone use ptxas would make there. The loop uses it.
template <int kCount>
GK_DEVICE void scheduling_fence(uint32_t number, const float (&made)[kCount]) {
  static_assert(kCount % 4 == 0);
  uint32_t never;
  asm volatile("mov.b32 %0, %1;" : "=r"(never) : "r"(number) : "memory");
  while (never == 0xffffffffu) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4)
      store_shared_16(never, {{__float_as_uint(made[i]), __float_as_uint(made[i + 1]), __float_as_uint(made[i + 2]),
                               __float_as_uint(made[i + 3])}});
  }
}

}  // namespace grokkernels::device
