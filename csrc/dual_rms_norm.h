// dual_rms_norm: h = residual + rms_norm(x, post_weight), y = rms_norm(h, pre_weight), over the last dim.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

struct DualRmsNormFwdParams {
  DType dtype;              // of x, residual, y, h
  DType weight_dtype;       // of both weights: float32 or dtype
  int64_t rows, cols;       // N, C
  const void* x;            // (N, C), rows x_stride elements apart
  const void* residual;     // (N, C), rows residual_stride elements apart
  const void* post_weight;  // (C)
  const void* pre_weight;   // (C)
  void* y;                  // (N, C)
  void* h;                  // (N, C)
  float* post_rstd;         // (N), of x
  float* pre_rstd;          // (N), of h
  int64_t x_stride, residual_stride;
  float eps;
  bool zero_centered;  // scales by 1 + weight
  float* sums;         // CUDA, for rows in several pieces (common/norm_plan.h): (N, pieces)
};

struct DualRmsNormBwdParams {
  DType dtype;
  DType weight_dtype;
  int64_t rows, cols;
  const void* dy;  // (N, C)
  const void* dh;  // (N, C) gradient that reaches h by another way, or null
  const void* x;   // (N, C)
  const void* h;   // (N, C)
  const void* post_weight;
  const void* pre_weight;
  const float* post_rstd;
  const float* pre_rstd;
  void* dx;            // (N, C)
  void* dresidual;     // (N, C): all that reaches h
  void* dpost_weight;  // (C), in weight_dtype
  void* dpre_weight;   // (C), in weight_dtype
  int64_t dy_stride, dh_stride, x_stride, h_stride;
  bool zero_centered;
  float* sums;     // CUDA, for rows in several pieces (common/norm_plan.h): (N, pieces)
  float* partial;  // CUDA: (2, chunks, C), each chunk's part of dpost_weight and dpre_weight
};

void dual_rms_norm_fwd_cpu(const DualRmsNormFwdParams& params);
void dual_rms_norm_bwd_cpu(const DualRmsNormBwdParams& params);
void dual_rms_norm_fwd_cuda(const DualRmsNormFwdParams& params, Stream stream);
void dual_rms_norm_bwd_cuda(const DualRmsNormBwdParams& params, Stream stream);

}  // namespace grokkernels
