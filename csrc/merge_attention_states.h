// merge_attention_states: attention over a union of key sets, from the attention over each of the two.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

// Strides in elements of a tensor (B, T, H, D), whose last dim is dense, or (B, H, T).
struct MergeStrides {
  int64_t batch, token, head;
};

struct MergeAttentionStatesFwdParams {
  DType dtype;  // of o1, o2, o
  int64_t batch, tokens, heads, dim;
  const void* o1;     // (B, T, H, D)
  const void* o2;     // (B, T, H, D)
  const float* lse1;  // (B, H, T)
  const float* lse2;  // (B, H, T)
  void* o;            // (B, T, H, D), contiguous
  float* lse;         // (B, H, T), contiguous
  MergeStrides o1_stride, o2_stride, lse1_stride, lse2_stride;
};

struct MergeAttentionStatesBwdParams {
  DType dtype;
  int64_t batch, tokens, heads, dim;
  const void* dout;   // (B, T, H, D), the gradient of o
  const float* dlse;  // (B, H, T), or null
  const void* o1;
  const void* o2;
  const float* lse1;
  const float* lse2;
  void* do1;     // (B, T, H, D), contiguous
  void* do2;     // (B, T, H, D), contiguous
  float* dlse1;  // (B, H, T), contiguous
  float* dlse2;  // (B, H, T), contiguous
  MergeStrides dout_stride, dlse_stride, o1_stride, o2_stride, lse1_stride, lse2_stride;
};

void merge_attention_states_fwd_cpu(const MergeAttentionStatesFwdParams& params);
void merge_attention_states_bwd_cpu(const MergeAttentionStatesBwdParams& params);
void merge_attention_states_fwd_cuda(const MergeAttentionStatesFwdParams& params, Stream stream);
void merge_attention_states_bwd_cuda(const MergeAttentionStatesBwdParams& params, Stream stream);

}  // namespace grokkernels
