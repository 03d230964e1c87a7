// cross_entropy: the loss of a language model's logits (N, V) against targets (N).
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

enum class Reduction : int { none, sum, mean };

// What linear_cross_entropy shares with cross_entropy.
//   z = logit_scale * logit, or softcap * tanh(logit_scale * logit / softcap) where softcap > 0
//   loss = logsumexp(z) - (1 - label_smoothing) * z[target] - label_smoothing * mean(z) + z_loss * logsumexp(z)^2
struct LossOptions {
  double softcap, logit_scale, z_loss, label_smoothing;
  int64_t ignore_index;  // rows with this target give no loss and no gradient, and are not read
  Reduction reduction;   // mean divides by the number of rows that are not ignored, or by 1 where all are
};

// N integers, each in [0, V) or ignore_index. Where the host cannot look at them, a row with another one becomes NaN.
struct Targets {
  const void* data;
  int64_t stride;
  bool wide;  // int64, else int32

  GK_ALWAYS_INLINE int64_t operator[](int64_t row) const {
    return wide ? static_cast<const int64_t*>(data)[row * stride] : static_cast<const int32_t*>(data)[row * stride];
  }
};

struct CrossEntropyFwdParams {
  DType dtype;
  int64_t rows, cols;  // N, V
  const void* logits;  // (N, V), rows logits_stride elements apart
  int64_t logits_stride;
  Targets targets;
  LossOptions options;
  float* loss;  // (N) for Reduction::none, else one number
  double* lse;  // (N) logsumexp(z); 0 for ignored rows
  // Workspaces of the cuda column.
  void* partials;     // cross_entropy_workspace(rows, cols) bytes
  float* row_losses;  // (N), or `loss` for Reduction::none
};

struct CrossEntropyBwdParams {
  DType dtype;
  int64_t rows, cols;
  const void* logits;
  int64_t logits_stride;
  Targets targets;
  LossOptions options;
  const float* dloss;  // like loss, dloss_stride elements apart
  int64_t dloss_stride;
  const double* lse;
  void* dlogits;   // (N, V), dense
  float* divisor;  // one number: workspace of the cuda column
};

// Columns that one block of the cuda column takes, and the bytes that it leaves of them where there are several ranges.
inline constexpr int64_t kCrossEntropyColumns = 8192;
GK_ALWAYS_INLINE constexpr int64_t cross_entropy_parts(int64_t cols) {
  return (cols + kCrossEntropyColumns - 1) / kCrossEntropyColumns;
}
GK_ALWAYS_INLINE constexpr int64_t cross_entropy_workspace(int64_t rows, int64_t cols) {
  return cross_entropy_parts(cols) == 1 ? 0 : rows * cross_entropy_parts(cols) * 24;
}

void cross_entropy_fwd_cpu(const CrossEntropyFwdParams& params);
void cross_entropy_bwd_cpu(const CrossEntropyBwdParams& params);
void cross_entropy_fwd_cuda(const CrossEntropyFwdParams& params, Stream stream);
void cross_entropy_bwd_cuda(const CrossEntropyBwdParams& params, Stream stream);

}  // namespace grokkernels
