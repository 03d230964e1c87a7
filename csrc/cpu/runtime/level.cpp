#include "cpu/runtime/level.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace grokkernels::cpu {
namespace {

constexpr const char* kNames[kNumLevels] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

int find(const char* name) {
  std::string allowed;
  for (int i = 0; i <= highest_level(); ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
    allowed += (i ? ", " : "") + std::string(kNames[i]);
  }
  throw std::invalid_argument("CPU level '" + std::string(name) +
                              "' is not available; this machine allows: " + allowed);
}

int initial_level() {
  const char* forced = std::getenv("GROKKERNELS_CPU_LEVEL");
  if (forced == nullptr || *forced == '\0') return highest_level();
  try {
    return find(forced);
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string("GROKKERNELS_CPU_LEVEL: ") + error.what());
  }
}

#if defined(__x86_64__)
// Whether there is a matrix unit for bfloat16 and the operating system lets this process use its registers.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kBf16Tiles = 1u << 22 | 1u << 24;         // leaf 7, edx: AMX-BF16, AMX-TILE
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, the state component
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16Tiles) != kBf16Tiles) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::atomic<int>& current() {
  static std::atomic<int> value{initial_level()};
  return value;
}

}  // namespace

const char* level_name(int level) { return level >= 0 && level < kNumLevels ? kNames[level] : nullptr; }

int highest_level() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
  static const int highest = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl");
    if (!avx2) return kBaseline;
    if (!avx512) return kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return kAvx512;
    if (has_amx()) return kAmx;
    // The dot instruction makes twice the products of a float32 multiply-add on AMD's processors, half as many on
    // Intel's, where widening is faster.
    return __builtin_cpu_is("amd") ? kAvx512Bf16 : kAvx512;
  }();
  return highest;
#else
  return kBaseline;
#endif
}

int level() { return current().load(std::memory_order_relaxed); }

void set_level(const char* name) { current().store(find(name), std::memory_order_relaxed); }

}  // namespace grokkernels::cpu
