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
  float* step;  // steps made; the launcher adds one
};

// What the elements of one tensor share in one step: written before the update, by which `step` has been raised.
struct alignas(16) AdamwStep {
  float step_size;        // lr / (1 - beta1^step)
  float root_correction;  // 1 / sqrt(1 - beta2^step)
  float grad_scale;       // what gradients are multiplied by: the clipping coefficient, negative to maximize
  float live;             // 0: the norm is not finite, nothing is updated
};

struct AdamwParams {
  const AdamwTensor* tensors;  // on the host, wherever their elements lie
  int64_t count, chunks;       // tensors, and their chunks in total
  AdamwStep* steps;            // workspace: one for each tensor
  const float* norm;           // of all gradients, one number where they lie; null not to clip
  double max_norm;
  bool maximize;
  double lr, beta1, beta2, eps, weight_decay;
};

struct NormTensor {
  DType dtype;
  int64_t numel, first_chunk;
  const void* data;
};

struct GlobalNormParams {
  const NormTensor* tensors;  // on the host
  int64_t count, chunks;
  double* partials;  // workspace: one number for each chunk
  float* norm;       // one number: sqrt of the sum of all squares
};

void adamw_cpu(const AdamwParams& params);
void global_norm_cpu(const GlobalNormParams& params);
void adamw_cuda(const AdamwParams& params, Stream stream);
void global_norm_cuda(const GlobalNormParams& params, Stream stream);

}  // namespace grokkernels
