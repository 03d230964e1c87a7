// What this machine can do at most, for benchmarks to be held against: work that is nothing but arithmetic, or nothing
// but memory. The caller takes the time.
#pragma once

#include <cstdint>

namespace grokkernels {

struct LimitFmaParams {
  int64_t rounds;  // each thread does 12 vectors of float32 multiply-adds per round
  double* sink;    // (1): keeps the compiler from leaving the work out
  int64_t* flops;  // (1): what was done
};

struct LimitReadParams {
  const float* x;  // (count), read once by all threads together
  int64_t count;
  double* sink;
};

struct LimitCopyParams {
  const float* x;  // (count)
  float* y;        // (count), aligned to 64 bytes: written past the caches
  int64_t count;
};

void limit_fma_cpu(const LimitFmaParams& params);
void limit_read_cpu(const LimitReadParams& params);
void limit_copy_cpu(const LimitCopyParams& params);

}  // namespace grokkernels
