// moe_experts: y_n = sum over k of weights[n,k] * down_e(act(gate_e x_n) * up_e x_n), e = indices[n,k].
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/device.h"
#include "common/dtypes.h"
#include "common/strides.h"

namespace grokkernels {

// The experts' weights as they lie in memory, in the dtype of x.
struct ExpertWeights {
  const void* gate;  // (E, F, C)
  const void* up;    // (E, F, C)
  const void* down;  // (E, C, F)
  StackStrides gate_strides, up_strides, down_strides;
};

struct MoeExpertsFwdParams {
  DType dtype;
  Activation activation;
  int64_t tokens, top_k, experts, cols, hidden_cols;  // N, K, E, C, F
  int64_t capacity;                                   // most rows of an expert; N * K or more when there is no limit
  const void* x;                                      // (N, C), rows x_stride elements apart
  ExpertWeights experts_weights;
  const float* weights;    // (N, K)
  const int32_t* indices;  // (N, K)
  void* y;                 // (N, C)
  void* gate;              // (N*K, F) gate_e x and up_e x in expert order for the backward pass; both null: not kept
  void* up;
  int32_t* slots;    // (N, K)
  int32_t* offsets;  // (E)
  // Work space, written and read inside.
  int32_t* token_of;  // (N*K): the token of each row in expert order
  void* hidden;       // (N*K, F)
  float* down;        // (N*K, C)
  int32_t* counts;    // on a device: expert_order_counts(N * K, E) elements
  int64_t x_stride;
};

// Columns of F that one number of MoeExpertsBwdParams::dots sums, on the CPU and on a device.
inline constexpr int64_t kMoeDotCols = 64, kMoeDotColsDevice = 32;

struct MoeExpertsBwdParams {
  DType dtype;
  Activation activation;
  int64_t tokens, top_k, experts, cols, hidden_cols;
  const void* dy;  // (N, C), rows dy_stride elements apart
  const void* x;   // (N, C), rows x_stride elements apart
  ExpertWeights experts_weights;
  const float* weights;    // (N, K)
  const int32_t* slots;    // (N, K)
  const int32_t* offsets;  // (E)
  const void* gate;        // (N*K, F) from the forward pass
  const void* up;
  void* dx;          // (N, C)
  void* dgate_proj;  // (E, F, C)
  void* dup_proj;    // (E, F, C)
  void* ddown_proj;  // (E, C, F)
  float* dweights;   // (N, K)
  // Work space, written and read inside.
  int32_t* token_of;    // (N*K)
  float* weight_of;     // (N*K): the weight of each row in expert order
  void* dgate;          // (N*K, F) gradients of gate_e x and up_e x
  void* dup;            // (N*K, F)
  void* scaled_hidden;  // (N*K, F): hidden times the row's weight
  float* dots;          // (N*K, F / kMoeDotCols or kMoeDotColsDevice, rounded up): parts of the weights' gradient
  float* dx_rows;       // (N*K, C)
  int64_t dy_stride, x_stride;
};

void moe_experts_fwd_cpu(const MoeExpertsFwdParams& params);
void moe_experts_bwd_cpu(const MoeExpertsBwdParams& params);
void moe_experts_fwd_cuda(const MoeExpertsFwdParams& params, Stream stream);
void moe_experts_bwd_cuda(const MoeExpertsBwdParams& params, Stream stream);

}  // namespace grokkernels
