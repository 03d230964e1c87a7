// What every kernel needs: its place in the grid, barriers of the block and the warp, shared memory, the launch.
//
// The headers of this folder are the vocabulary that kernels are written in: each PTX instruction once, behind a name.
// csrc/emulated/device has the same names with their C++ meaning; which one a kernel gets is the include path's choice,
// and a kernel holds no #ifdef for it. So kernels use no <<<>>>, no __shared__ variables, no instruction but through
// these names, include them with <> (quotes would find this folder first), and assume nothing about which blocks run at
// the same time.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "common/device.h"
#include "common/dtypes.h"
#include "common/launch_watch.h"

#define GK_DEVICE __device__ __forceinline__

namespace grokkernels::device {

inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

GK_DEVICE int lane_id() {
  int lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

GK_DEVICE void sync_threads() { __syncthreads(); }

GK_DEVICE void sync_warp(uint32_t lanes = kAllLanes) { __syncwarp(lanes); }

// The block's dynamic shared memory, aligned to 1024 bytes.
GK_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char grokkernels_dynamic_shared[];
  return grokkernels_dynamic_shared;
}

// The 32-bit address in the shared window that the instructions of the other headers take.
GK_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// What this thread wrote before is seen by the device before what it writes after.
GK_DEVICE void fence_device() { __threadfence(); }

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("grokkernels: ") + what + ": " + cudaGetErrorString(status));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "no current CUDA device");
  return device;
}

// Of the current device. The runtime is asked once for each: attributes do not change.
template <cudaDeviceAttr kAttribute>
int device_attribute() {
  constexpr int kRemembered = 64;
  static std::atomic<int> known[kRemembered];  // one more than the attribute; 0: not asked yet
  const int device = current_device();
  if (device < kRemembered && known[device] != 0) return known[device] - 1;
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "the CUDA device does not describe itself");
  if (device < kRemembered) known[device] = value + 1;
  return value;
}

// Compute capability times ten, and the number of multiprocessors, of the current device.
inline int device_architecture() {
  return device_attribute<cudaDevAttrComputeCapabilityMajor>() * 10 +
         device_attribute<cudaDevAttrComputeCapabilityMinor>();
}

inline int device_multiprocessors() { return device_attribute<cudaDevAttrMultiProcessorCount>(); }

// Lets a block of the kernel have so much dynamic shared memory on the current device. The runtime is asked only for
// more than before, and never for less: a thread that launches with more may be between its question and its launch.
inline void allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  size_t& most = allowed[{device, kernel}];
  if (bytes <= most) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
             "the kernel's shared memory was refused");
  most = bytes;
}

inline const char* kernel_name(const void* kernel) {
  const char* name = nullptr;
  check_cuda(cudaFuncGetName(&name, kernel), "a kernel has no name");
  return name;
}

// Runs `kernel` on the grid; an empty grid does nothing. Throws std::runtime_error when the launch is refused.
template <typename... Args>
void launch(void (*kernel)(Args...), const LaunchShape& shape, Stream stream, std::type_identity_t<Args>... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (launch_watch() && !launch_watch()(kernel_name(address), shape)) return;
  if (shape.shared_bytes > 48 * 1024) allow_shared_memory(address, shape.shared_bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.grid.x, shape.grid.y, shape.grid.z);
  config.blockDim = dim3(shape.block.x, shape.block.y, shape.block.z);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {shape.cluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = shape.cluster > 1 ? 1 : 0;
  if (shape.cluster > 8)
    check_cuda(cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
               "the cluster size was refused");
  check_cuda(cudaLaunchKernelEx(&config, kernel, args...), "a kernel was not launched");
}

// Sets memory of the device to zero, in the order of the stream.
inline void zero_memory(void* memory, size_t bytes, Stream stream) {
  if (bytes > 0)
    check_cuda(cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)), "memory was not cleared");
}

}  // namespace grokkernels::device
