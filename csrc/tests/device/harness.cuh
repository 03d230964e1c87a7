// KERNEL(name, { ... }): a kernel of one warp over words `in` and `out`, with its `lane`, that conformance_run finds by
// name. The same file builds for a GPU (nvcc), for the emulated device (the C++ compiler), and to PTX.
#pragma once

#include <cstdio>
#include <cstring>
#include <device/convert.cuh>
#include <device/core.cuh>
#include <exception>

namespace conformance {

inline constexpr size_t kSharedBytes = 32 * 1024;

using Kernel = void (*)(const uint32_t* in, uint32_t* out);

struct Entry {
  const char* name;
  Kernel kernel;
  unsigned threads;
  Entry* next;
};

inline Entry* g_entries = nullptr;

struct Register {
  Entry entry;
  Register(const char* name, Kernel kernel, unsigned threads) : entry{name, kernel, threads, g_entries} {
    g_entries = &entry;
  }
};

#if defined(__CUDACC__)
inline void run(const Entry& entry, const uint32_t* in, uint32_t* out, size_t words) {
  using grokkernels::device::check_cuda;
  uint32_t *device_in = nullptr, *device_out = nullptr;
  const size_t bytes = words * sizeof(uint32_t);
  check_cuda(cudaMalloc(&device_in, bytes), "no memory");
  check_cuda(cudaMalloc(&device_out, bytes), "no memory");
  check_cuda(cudaMemcpy(device_in, in, bytes, cudaMemcpyHostToDevice), "copy in");
  check_cuda(cudaMemcpy(device_out, out, bytes, cudaMemcpyHostToDevice), "copy in");
  grokkernels::device::launch(entry.kernel, {.grid = {1}, .block = {entry.threads}, .shared_bytes = kSharedBytes},
                              nullptr, device_in, device_out);
  check_cuda(cudaDeviceSynchronize(), "the kernel failed");
  check_cuda(cudaMemcpy(out, device_out, bytes, cudaMemcpyDeviceToHost), "copy out");
  cudaFree(device_in);
  cudaFree(device_out);
}
#else
inline void run(const Entry& entry, const uint32_t* in, uint32_t* out, size_t) {
  grokkernels::device::launch(entry.kernel, {.grid = {1}, .block = {entry.threads}, .shared_bytes = kSharedBytes},
                              nullptr, in, out);
}
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

#define KERNEL_OF(name, threads, ...)                                                   \
  extern "C" __global__ void name([[maybe_unused]] const uint32_t* in, uint32_t* out) { \
    [[maybe_unused]] const int lane = static_cast<int>(threadIdx.x);                    \
    __VA_ARGS__                                                                         \
  }                                                                                     \
  static conformance::Register g_##name(#name, name, threads);
#define KERNEL(name, ...) KERNEL_OF(name, 32, __VA_ARGS__)

// Runs a kernel on `words` words; 0, or 1 with the reason in `message`.
#define RUN_BY_NAME()                                                                                           \
  extern "C" __attribute__((visibility("default"))) int conformance_run(                                        \
      const char* name, const uint32_t* in, uint32_t* out, size_t words, char* message, size_t message_bytes) { \
    for (conformance::Entry* entry = conformance::g_entries; entry != nullptr; entry = entry->next) {           \
      if (std::strcmp(entry->name, name) != 0) continue;                                                        \
      try {                                                                                                     \
        conformance::run(*entry, in, out, words);                                                               \
        return 0;                                                                                               \
      } catch (const std::exception& error) {                                                                   \
        std::snprintf(message, message_bytes, "%s", error.what());                                              \
        return 1;                                                                                               \
      }                                                                                                         \
    }                                                                                                           \
    std::snprintf(message, message_bytes, "no kernel of this name");                                            \
    return 1;                                                                                                   \
  }
