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
  void* dx;        // (N, C) dense, or null
  void* dweight;   // (V, C) dense, or null
  float* dlogits;  // workspace: rows * linear_cross_entropy_columns(rows, cols)
  float* dx_sum;   // workspace: (N, C), or null when dx is
};

// Columns of dlogits that are held at once: 64 MiB of them, and no fewer than 512.
GK_ALWAYS_INLINE int64_t linear_cross_entropy_columns(int64_t rows, int64_t cols) {
  constexpr int64_t kElements = int64_t{16} << 20, kBlock = 512;
  const int64_t fit = kElements / (rows > 0 ? rows : 1) / kBlock * kBlock;
  const int64_t held = fit > kBlock ? fit : kBlock;
  return held < cols ? held : cols;
}

void linear_cross_entropy_fwd_cpu(const LinearCrossEntropyFwdParams& params);
void linear_cross_entropy_bwd_cpu(const LinearCrossEntropyBwdParams& params);
void linear_cross_entropy_fwd_cuda(const LinearCrossEntropyFwdParams& params, Stream stream);
void linear_cross_entropy_bwd_cuda(const LinearCrossEntropyBwdParams& params, Stream stream);

}  // namespace grokkernels
