// rotary: rotary position embedding of queries and keys in one call.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

// q or k: (batch, tokens, heads, D), elements of the last dim side by side, the other dims anywhere.
struct RotaryTensor {
  const void* x;  // null: no such tensor
  void* y;        // what x becomes; may be x itself
  int64_t heads;
  int64_t x_batch, x_token, x_head;  // strides in elements
  int64_t y_batch, y_token, y_head;
};

// The position of token t of sequence b is positions[b * tokens + t] if position_per_token, else its place in its
// sequence plus positions[b], or plus `offset` without positions.
struct RotaryParams {
  DType dtype;
  int64_t batch, tokens, dim;     // B, T, D; packed sequences are one batch entry of all their tokens
  int64_t rotated, max_position;  // R <= D
  RotaryTensor q, k;
  const float* cos;           // (max_position, R / 2)
  const float* sin;           // (max_position, R / 2)
  const int64_t* positions;   // (B * T), (B) or (sequences); or null
  const int32_t* cu_seqlens;  // (sequences + 1): the first token of each packed sequence; or null, then T tokens each
  int64_t sequences;          // B, or of cu_seqlens
  int64_t offset;
  bool position_per_token;
  bool interleaved;  // pairs (2i, 2i + 1), else (i, i + R / 2)
  bool inverse;      // turns by the opposite angle
  // Set to the first token (of B * T) without a row in the tables, its position below 0 or not below max_position, or
  // -1. If there is one, nothing is read or written. CUDA: null; what turns of such a token becomes NaN, and of one
  // that no sequence of cu_seqlens holds.
  int64_t* outside;
};

void rotary_cpu(const RotaryParams& params);
void rotary_cuda(const RotaryParams& params, Stream stream);

}  // namespace grokkernels
