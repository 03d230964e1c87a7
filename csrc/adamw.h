// adamw: one step of Adam with decoupled weight decay over many tensors, and the norm of many tensors as one vector.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

// Tensors are cut into chunks of this many elements, and the chunks of all tensors shared between cores.
inline constexpr int64_t kTensorChunk = 8192;

// Elements of a tensor in memory order; param, grad, exp_avg and exp_avg_sq are laid out alike.
struct AdamwTensor {
  DType dtype;  // of param and grad
  int64_t numel;
  int64_t first_chunk;  // chunks of the tensors before this one
  void* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  double step_size;        // lr / (1 - beta1^step)
  double root_correction;  // 1 / sqrt(1 - beta2^step)
};

struct AdamwParams {
  const AdamwTensor* tensors;
  int64_t count, chunks;  // tensors, and their chunks in total
  double grad_scale;      // what gradients are multiplied by: the clipping coefficient, negative to maximize
  double lr, beta1, beta2, eps, weight_decay;
};

struct NormTensor {
  DType dtype;
  int64_t numel, first_chunk;
  const void* data;
};

struct GlobalNormParams {
  const NormTensor* tensors;
  int64_t count, chunks;
  float* norm;  // one number: sqrt of the sum of all squares
};

void adamw_cpu(const AdamwParams& params);
void global_norm_cpu(const GlobalNormParams& params);
void adamw_cuda(const AdamwParams& params, Stream stream);
void global_norm_cuda(const GlobalNormParams& params, Stream stream);

}  // namespace grokkernels
