// rms_norm: y = x * rsqrt(mean(x^2) + eps) * weight over the last dim, optionally after adding a residual.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

struct RmsNormFwdParams {
  DType dtype;           // of x, residual, y, h
  DType weight_dtype;    // float32 or dtype
  int64_t rows, cols;    // N, C
  const void* x;         // (N, C), rows x_stride elements apart
  const void* residual;  // (N, C), rows residual_stride elements apart, or null
  const void* weight;    // (C)
  void* y;               // (N, C)
  void* h;               // (N, C) x + residual, or null when residual is
  float* rstd;           // (N)
  int64_t x_stride, residual_stride;
  float eps;
  bool zero_centered;  // scales by 1 + weight
  float* sums;         // CUDA, for rows in several pieces (common/norm_plan.h): (N, pieces)
};

struct RmsNormBwdParams {
  DType dtype;
  DType weight_dtype;
  int64_t rows, cols;
  const void* dy;      // (N, C)
  const void* dh;      // (N, C) gradient that reaches x + residual by another way, or null
  const void* x;       // (N, C): what was normalised
  const void* weight;  // (C)
  const float* rstd;   // (N)
  void* dx;            // (N, C)
  void* dweight;       // (C), in weight_dtype
  int64_t dy_stride, dh_stride, x_stride;
  bool zero_centered;
  float* sums;     // CUDA, for rows in several pieces (common/norm_plan.h): (N, pieces)
  float* partial;  // CUDA: (chunks, C), each chunk's part of dweight
};

void rms_norm_fwd_cpu(const RmsNormFwdParams& params);
void rms_norm_bwd_cpu(const RmsNormBwdParams& params);
void rms_norm_fwd_cuda(const RmsNormFwdParams& params, Stream stream);
void rms_norm_bwd_cuda(const RmsNormBwdParams& params, Stream stream);

}  // namespace grokkernels
