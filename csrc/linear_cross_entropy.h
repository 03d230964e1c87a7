// linear_cross_entropy: cross_entropy of x (N, C) times weight (V, C) transposed, without ever holding (N, V) logits.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"
#include "cross_entropy.h"

namespace grokkernels {

struct LinearCrossEntropyFwdParams {
  DType dtype;                // of x and weight
  int64_t rows, width, cols;  // N, C, V
  const void* x;              // (N, C), rows x_stride elements apart
  const void* weight;         // (V, C), any strides
  int64_t x_stride, weight_stride[2];
  Targets targets;
  LossOptions options;
  float* loss;  // (N) for Reduction::none, else one number
  double* lse;  // (N); 0 for ignored rows
  // Work space on a device.
  float* row_losses;  // (N): loss itself for Reduction::none
  int32_t* index;     // (N + 1): the rows that count, in order; how many
  float* target_z;    // (N)
  void* partials;     // linear_cross_entropy_workspace(rows, cols) bytes
};

struct LinearCrossEntropyBwdParams {
  DType dtype;
  int64_t rows, width, cols;
  const void* x;
  const void* weight;
  int64_t x_stride, weight_stride[2];
  Targets targets;
  LossOptions options;
  const float* dloss;  // like loss, dloss_stride elements apart
  int64_t dloss_stride;
  const double* lse;
  void* dx;       // (N, C) dense, or null
  void* dweight;  // (V, C) dense, or null
  void* dlogits;  // workspace: rows * linear_cross_entropy_stride(linear_cross_entropy_columns(...)), on the CPU
                  // floats, on a device of dtype
  float* dx_sum;  // workspace: (N, C), or null when dx is
  // Work space on a device.
  int32_t* index;  // (N + 1)
  float* scales;   // (3)
};

// Elements of dlogits that are held at once: what stays near a CPU's cores, what fills a device.
inline constexpr int64_t kLinearCrossEntropyHost = int64_t{4} << 20, kLinearCrossEntropyDevice = int64_t{16} << 20;

// The columns that makes, no fewer than 512.
GK_ALWAYS_INLINE int64_t linear_cross_entropy_columns(int64_t rows, int64_t cols, int64_t elements) {
  constexpr int64_t kBlock = 512;
  const int64_t fit = elements / (rows > 0 ? rows : 1) / kBlock * kBlock;
  const int64_t held = fit > kBlock ? fit : kBlock;
  return held < cols ? held : cols;
}

// From one row of dlogits to the next: whole vectors, and no power of two, which would crowd few sets of the caches.
GK_ALWAYS_INLINE constexpr int64_t linear_cross_entropy_stride(int64_t columns) {
  return (columns + 15) / 16 * 16 + 16;
}

// Columns whose logits one block of a device adds up; like all sizes there, no function of N. Each range leaves two
// partial sums per row.
inline constexpr int kLinearCrossEntropyRange = 4096, kLinearCrossEntropyPartial = 24;

GK_ALWAYS_INLINE constexpr int64_t linear_cross_entropy_parts(int64_t cols) {
  return (cols + kLinearCrossEntropyRange - 1) / kLinearCrossEntropyRange;
}

GK_ALWAYS_INLINE constexpr int64_t linear_cross_entropy_workspace(int64_t rows, int64_t cols) {
  return rows * linear_cross_entropy_parts(cols) * 2 * kLinearCrossEntropyPartial;
}

void linear_cross_entropy_fwd_cpu(const LinearCrossEntropyFwdParams& params);
void linear_cross_entropy_bwd_cpu(const LinearCrossEntropyBwdParams& params);
void linear_cross_entropy_fwd_cuda(const LinearCrossEntropyFwdParams& params, Stream stream);
void linear_cross_entropy_bwd_cuda(const LinearCrossEntropyBwdParams& params, Stream stream);

}  // namespace grokkernels
