// The least a C++ test needs: CHECK counts and prints what failed, and main returns check_result().
#pragma once

#include <cstdio>

namespace grokkernels::tests {

inline int failures = 0;

inline bool check(bool passed, const char* text, const char* file, int line) {
  if (!passed && ++failures <= 20) std::printf("%s:%d: CHECK failed: %s\n", file, line, text);
  return passed;
}

// The exit status of a test program.
inline int check_result() {
  if (failures) std::printf("%d checks failed\n", failures);
  return failures ? 1 : 0;
}

}  // namespace grokkernels::tests

// Evaluates to the condition, so that a test can print what it looked at: if (!CHECK(a == b)) printf(...).
#define CHECK(condition) ::grokkernels::tests::check(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
