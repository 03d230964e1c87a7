#include "cpu/runtime/level.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace grokkernels::cpu {
namespace {

constexpr const char* kNames[kNumLevels] = {"baseline", "avx2", "avx512"};

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
    return avx2 && avx512 ? kAvx512 : avx2 ? kAvx2 : kBaseline;
  }();
  return highest;
#else
  return kBaseline;
#endif
}

int level() { return current().load(std::memory_order_relaxed); }

void set_level(const char* name) { current().store(find(name), std::memory_order_relaxed); }

}  // namespace grokkernels::cpu
