// KERNEL(name, { ... }): a kernel of one warp over words `in` and `out`, with its `lane`, that conformance_run finds by
// name. KERNEL_OF(name, threads, { ... }) has more threads (and says how many: setmaxnreg is dropped from a kernel that
// may have any number); KERNEL_TILES(name, tiles, { ... }) has one warp, and
// `in_map` and `out_map` besides: tensor maps of `in` and `out`, both of them `tiles(data)`. The same file builds for a
// GPU (nvcc), for the emulated device (the C++ compiler), and to PTX.
#pragma once

#include <cstdio>
#include <cstring>
#include <device/convert.cuh>
#include <device/core.cuh>
#include <device/tma.cuh>
#include <exception>

namespace conformance {

inline constexpr size_t kSharedBytes = 32 * 1024;

using grokkernels::TensorTiles;
using grokkernels::device::TensorMap;
using Kernel = void (*)(const uint32_t* in, uint32_t* out);
using TilesKernel = void (*)(const uint32_t* in, uint32_t* out, TensorMap in_map, TensorMap out_map);
using Tiles = TensorTiles (*)(const void* data);

struct Entry {
  const char* name;
  unsigned threads;
  Kernel kernel;  // or, with tiles:
  TilesKernel tiles_kernel;
  Tiles tiles;
  Entry* next;
};

inline Entry* g_entries = nullptr;

struct Register {
  Entry entry;
  Register(const char* name, unsigned threads, Kernel kernel, TilesKernel tiles_kernel = nullptr, Tiles tiles = nullptr)
      : entry{name, threads, kernel, tiles_kernel, tiles, g_entries} {
    g_entries = &entry;
  }
};

inline const Entry* find(const char* name) {
  const Entry* entry = g_entries;
  while (entry != nullptr && std::strcmp(entry->name, name) != 0) entry = entry->next;
  return entry;
}

// `in` and `out` in the device's memory.
inline void launch(const Entry& entry, const uint32_t* in, uint32_t* out) {
  const grokkernels::LaunchShape shape{.grid = {1}, .block = {entry.threads}, .shared_bytes = kSharedBytes};
  if (entry.tiles == nullptr)
    grokkernels::device::launch(entry.kernel, shape, nullptr, in, out);
  else
    grokkernels::device::launch(entry.tiles_kernel, shape, nullptr, in, out,
                                grokkernels::device::make_tensor_map(entry.tiles(in)),
                                grokkernels::device::make_tensor_map(entry.tiles(out)));
}

#if defined(__CUDACC__)
inline void run(const Entry& entry, const uint32_t* in, uint32_t* out, size_t words) {
  using grokkernels::device::check_cuda;
  uint32_t *device_in = nullptr, *device_out = nullptr;
  const size_t bytes = words * sizeof(uint32_t);
  check_cuda(cudaMalloc(&device_in, bytes), "no memory");
  check_cuda(cudaMalloc(&device_out, bytes), "no memory");
  check_cuda(cudaMemcpy(device_in, in, bytes, cudaMemcpyHostToDevice), "copy in");
  check_cuda(cudaMemcpy(device_out, out, bytes, cudaMemcpyHostToDevice), "copy in");
  launch(entry, device_in, device_out);
  check_cuda(cudaDeviceSynchronize(), "the kernel failed");
  check_cuda(cudaMemcpy(out, device_out, bytes, cudaMemcpyDeviceToHost), "copy out");
  cudaFree(device_in);
  cudaFree(device_out);
}
#else
inline void run(const Entry& entry, const uint32_t* in, uint32_t* out, size_t) { launch(entry, in, out); }
#endif

// A float of moderate size, and a pair of them, from random bits: sums of their products are exact in float.
GK_DEVICE float small(uint32_t bits) { return static_cast<float>(static_cast<int>(bits % 257) - 128) / 16.0f; }

template <typename T>
GK_DEVICE uint32_t small_pair(uint32_t bits) {
  return grokkernels::device::narrow_pair<T>(small(bits & 0xFFFF), small(bits >> 16));
}

}  // namespace conformance

using conformance::small;
using conformance::small_pair;

#define KERNEL_OF(name, threads, ...)                                                                                 \
  extern "C" __global__ void __launch_bounds__(threads, 1) name([[maybe_unused]] const uint32_t* in, uint32_t* out) { \
    [[maybe_unused]] const int lane = static_cast<int>(threadIdx.x);                                                  \
    __VA_ARGS__                                                                                                       \
  }                                                                                                                   \
  static conformance::Register g_##name(#name, threads, name);
#define KERNEL(name, ...) KERNEL_OF(name, 32, __VA_ARGS__)
#define KERNEL_TILES(name, tiles, ...)                                                                               \
  extern "C" __global__ void name([[maybe_unused]] const uint32_t* in, [[maybe_unused]] uint32_t* out,               \
                                  [[maybe_unused]] const __grid_constant__ grokkernels::device::TensorMap in_map,    \
                                  [[maybe_unused]] const __grid_constant__ grokkernels::device::TensorMap out_map) { \
    [[maybe_unused]] const int lane = static_cast<int>(threadIdx.x);                                                 \
    __VA_ARGS__                                                                                                      \
  }                                                                                                                  \
  static conformance::Register g_##name(#name, 32, nullptr, name, tiles);

// conformance_run runs a kernel on `words` words: 0, or 1 with the reason in `message`. conformance_tiles tells what
// the tensor maps of a kernel describe, for who makes them in another way: 1, or 0 when it takes none.
#define RUN_BY_NAME()                                                                                           \
  extern "C" __attribute__((visibility("default"))) int conformance_run(                                        \
      const char* name, const uint32_t* in, uint32_t* out, size_t words, char* message, size_t message_bytes) { \
    const conformance::Entry* entry = conformance::find(name);                                                  \
    try {                                                                                                       \
      if (entry == nullptr) throw std::runtime_error("no kernel of this name");                                 \
      conformance::run(*entry, in, out, words);                                                                 \
      return 0;                                                                                                 \
    } catch (const std::exception& error) {                                                                     \
      std::snprintf(message, message_bytes, "%s", error.what());                                                \
      return 1;                                                                                                 \
    }                                                                                                           \
  }                                                                                                             \
  extern "C" __attribute__((visibility("default"))) int conformance_tiles(const char* name, const void* data,   \
                                                                          grokkernels::TensorTiles* tiles) {    \
    const conformance::Entry* entry = conformance::find(name);                                                  \
    if (entry == nullptr || entry->tiles == nullptr) return 0;                                                  \
    *tiles = entry->tiles(data);                                                                                \
    return 1;                                                                                                   \
  }
