// What every kernel needs, as csrc/cuda/device/core.cuh has it, for the emulated device.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/device.h"
#include "common/dtypes.h"
#include "emulated/runtime/device.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define GK_DEVICE inline

#define threadIdx (::grokkernels::emulated::current().thread)
#define blockIdx (::grokkernels::emulated::current().block->index)
#define blockDim (::grokkernels::emulated::current_launch().block)
#define gridDim (::grokkernels::emulated::current_launch().grid)

namespace grokkernels::device {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

GK_DEVICE int lane_id() { return emulated::current().lane; }

GK_DEVICE void sync_threads() { emulated::named_barrier(0, 0, true); }

GK_DEVICE void sync_warp(uint32_t lanes = kAllLanes) { emulated::warp_barrier(lanes); }

GK_DEVICE unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(emulated::current().block->shared);
}

GK_DEVICE uint32_t shared_address(const void* pointer) { return emulated::shared_address(pointer); }

// For race checking: a fence orders itself with every other, which is more than CUDA's does.
GK_DEVICE void fence_device() {
  static char every_fence;
  emulated::release(&every_fence);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  emulated::acquire(&every_fence);
}

inline int device_architecture() { return emulated::settings().architecture; }

inline int device_multiprocessors() { return emulated::settings().multiprocessors; }

template <typename... Args>
void launch(void (*kernel)(Args...), const LaunchShape& shape, Stream, std::type_identity_t<Args>... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  if (emulated::executor() &&
      !emulated::executor()(shape, {reinterpret_cast<const void*>(kernel), {{&args, sizeof(args)}...}}))
    return;
  emulated::run_grid(shape, [&] { kernel(args...); });
}

inline void zero_memory(void* memory, size_t bytes, Stream) {
  if (bytes > 0) std::memset(memory, 0, bytes);
}

}  // namespace grokkernels::device
