// grouped_mm: y_e = x_e w_e for groups of rows, and its derivatives.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"
#include "common/strides.h"

namespace grokkernels {

struct GroupedMmParams {  // y[r] = x[r] w[e], r in group e; zero past the last group
  DType dtype;
  int64_t rows, depth, cols, groups;  // M, K, N, E
  const void* x;                      // (M, K), any strides
  const void* w;                      // (E, K, N), any strides
  const int32_t* offsets;             // (E): where each group ends
  void* y;                            // (M, N)
  StackStrides x_strides, w_strides;  // x_strides.stack is not used
};

struct GroupedMmWgradParams {  // dw[e] = x_e^T dy_e; zero for an empty group
  DType dtype;
  int64_t rows, depth, cols, groups;
  const void* x;           // (M, K), any strides
  const void* dy;          // (M, N), any strides
  const int32_t* offsets;  // (E)
  void* dw;                // (E, K, N)
  StackStrides x_strides, dy_strides;
};

void grouped_mm_cpu(const GroupedMmParams& params);
void grouped_mm_wgrad_cpu(const GroupedMmWgradParams& params);
void grouped_mm_cuda(const GroupedMmParams& params, Stream stream);
void grouped_mm_wgrad_cuda(const GroupedMmWgradParams& params, Stream stream);

}  // namespace grokkernels
