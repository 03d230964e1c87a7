// moe_permute and moe_unpermute: token order to expert order, and back as a weighted sum.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

struct MoePermuteFwdParams {
  DType dtype;
  int64_t tokens, top_k, cols, experts;  // N, K, C, E
  int64_t capacity;                      // most rows of an expert; N * K or more when there is no limit
  const void* x;                         // (N, C), rows x_stride elements apart
  const int32_t* indices;                // (N, K)
  void* rows;                            // (N*K, C)
  int32_t* slots;                        // (N, K): row of (n, k), -1 when dropped
  int32_t* offsets;                      // (E): where each expert's rows end
  int32_t* counts;                       // work space on a device: expert_order_counts(N * K, E) elements
  int64_t x_stride;
};

struct MoePermuteBwdParams {
  DType dtype;
  int64_t tokens, top_k, cols;
  const void* drows;  // (N*K, C), rows drows_stride elements apart
  const int32_t* slots;
  void* dx;  // (N, C)
  int64_t drows_stride;
};

struct MoeUnpermuteFwdParams {
  DType dtype;
  int64_t tokens, top_k, cols;
  const void* y;         // (N*K, C), rows y_stride elements apart
  const float* weights;  // (N, K)
  const int32_t* slots;  // (N, K)
  void* out;             // (N, C)
  int64_t y_stride;
};

struct MoeUnpermuteBwdParams {
  DType dtype;
  int64_t tokens, top_k, cols;
  const void* dout;  // (N, C), rows dout_stride elements apart
  const void* y;     // (N*K, C), rows y_stride elements apart
  const float* weights;
  const int32_t* slots;
  void* dy;         // (N*K, C)
  float* dweights;  // (N, K)
  uint8_t* named;   // work space on a device: (N*K), whether a slot names the row
  int64_t dout_stride, y_stride;
};

void moe_permute_fwd_cpu(const MoePermuteFwdParams& params);
void moe_permute_bwd_cpu(const MoePermuteBwdParams& params);
void moe_unpermute_fwd_cpu(const MoeUnpermuteFwdParams& params);
void moe_unpermute_bwd_cpu(const MoeUnpermuteBwdParams& params);
void moe_permute_fwd_cuda(const MoePermuteFwdParams& params, Stream stream);
void moe_permute_bwd_cuda(const MoePermuteBwdParams& params, Stream stream);
void moe_unpermute_fwd_cuda(const MoeUnpermuteFwdParams& params, Stream stream);
void moe_unpermute_bwd_cuda(const MoeUnpermuteBwdParams& params, Stream stream);

}  // namespace grokkernels
