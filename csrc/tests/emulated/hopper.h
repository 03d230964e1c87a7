// Small kernels that use each of Hopper's instructions in the vocabulary: csrc/tests/emulated/hopper_sm90.cu. The
// emulated device runs them in csrc/tests/emulated/test_hopper.cpp; nvcc compiles them as any kernel.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/tensor_tiles.h"

namespace grokkernels::tests {

inline constexpr int kProductRows = 64, kProductDepth = 64;

// d (64, cols) = a (64, 64) b (64, cols); a: row-major, or column-major when a_transposed; b: (cols, 64) row-major, or
// (64, cols) when b_transposed. d starts as what it holds when `accumulate`.
struct ProductParams {
  DType dtype;
  Swizzle swizzle;
  bool a_transposed, b_transposed, a_in_registers, accumulate;
  int cols;  // 64 or 128
  const void *a, *b;
  float* d;
};
void product(const ProductParams& params, Stream stream);

// One of the mistakes that the emulated device must name.
enum class Mistake : int {
  none,
  expects_more_bytes,
  reads_early,
  no_fence,
  lanes_differ,
  warps_differ,
  returns_early,
  misaligned,
  no_registers,
  cluster_returns_early,
  plain_load_from_cluster,
  no_proxy_fence,
};
void mistake(Mistake which, const ProductParams& params, Stream stream);

// Blocks of a cluster of 4 pass rows of 64 floats on: y[r] = x[r] + x[(r + 1) % 4] + x[0] + arrivals (4 for rank 0).
void exchange(const float* x, float* y, Stream stream);

// x (rows, cols) is copied to y box by box, added to `sum`, and doubled into `twice` in runs of bytes; cols % 4 == 0.
struct CopyParams {
  const float* x;
  float *y, *sum, *twice;
  int rows, cols;
};
void copy_boxes(const CopyParams& params, Stream stream);

// A ring of 2 slots filled by cp.async through an mbarrier: y[i] = x[i] + 1, n % 256 == 0.
void ring(const float* x, float* y, int n, Stream stream);

}  // namespace grokkernels::tests
