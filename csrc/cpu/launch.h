// From one launcher that torch (or a C++ program) calls to the copy of the kernel for this machine's level.
//
// A file csrc/cpu/<op>.cpp defines `void name(const Params&)` in grokkernels::cpu, inside `inline namespace
// GK_CPU_LEVEL`, and ends with GK_CPU_LAUNCHER(name, Params). The file is compiled once per level; its baseline copy
// also defines grokkernels::name_cpu, which picks.
#pragma once

#include "common/dtypes.h"
#include "cpu/runtime/level.h"

#if !GK_CPU_IS_BASELINE
#define GK_CPU_LAUNCHER(name, Params) static_assert(true)
#elif defined(__x86_64__)
#define GK_CPU_LAUNCHER(name, Params)                                                                            \
  namespace grokkernels::cpu {                                                                                   \
  namespace avx2 {                                                                                               \
  void name(const Params&);                                                                                      \
  }                                                                                                              \
  namespace avx512 {                                                                                             \
  void name(const Params&);                                                                                      \
  }                                                                                                              \
  namespace avx512bf16 {                                                                                         \
  void name(const Params&);                                                                                      \
  }                                                                                                              \
  namespace amx {                                                                                                \
  void name(const Params&);                                                                                      \
  }                                                                                                              \
  }                                                                                                              \
  void grokkernels::name##_cpu(const Params& params) {                                                           \
    static constexpr void (*kTable[])(const Params&) = {cpu::baseline::name, cpu::avx2::name, cpu::avx512::name, \
                                                        cpu::avx512bf16::name, cpu::amx::name};                  \
    kTable[cpu::level()](params);                                                                                \
  }                                                                                                              \
  static_assert(true)
#else
#define GK_CPU_LAUNCHER(name, Params)                                       \
  void grokkernels::name##_cpu(const Params& params) { cpu::name(params); } \
  static_assert(true)
#endif
