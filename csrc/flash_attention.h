// flash_attention: o = softmax(scores) v per sequence and head, with its logsumexp; scores as in
// grokkernels/reference/flash_attention.py. One launcher serves batches of equal sequences and packed ones.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

// A tensor (B, T, H, D) or, packed, (total, H, D): strides in elements, last dim dense. For the CUDA kernels every row
// of it begins at a multiple of 16 bytes and is followed by zeros to the next one, and row_stride is at most
// kFlashAttentionRowStride (but o may lie anyhow).
struct AttentionTensor {
  const void* data;
  int64_t batch_stride;  // 0 when packed
  int64_t row_stride;
  int64_t head_stride;
};

inline constexpr int64_t kFlashAttentionRowStride = int64_t{1} << 22;

struct FlashAttentionProblem {
  DType dtype;              // of q, k, v, o and their gradients
  int64_t batch;            // B sequences
  int64_t queries, keys;    // T, S of each sequence; when packed total_q, total_k
  int64_t heads, kv_heads;  // H, Hkv
  int64_t dim, value_dim;   // D, Dv
  AttentionTensor q, k, v;
  const int32_t* cu_seqlens_q;  // (B + 1), or null: a batch of equal sequences
  const int32_t* cu_seqlens_k;  // (B + 1), or null
  const int64_t* q_start;       // (B) position of the first query, or null: S - T
  const float* sinks;           // (H), or null
  const float* alibi_slopes;    // (B or 1, H), or null
  int64_t alibi_batch_stride;   // 0 or H
  float scale;
  float softcap;            // 0: none
  int64_t left, right;      // keys seen on either side of the query's position, -1: all
  int64_t temperature_len;  // 0: none
};

struct FlashAttentionFwdParams {
  FlashAttentionProblem problem;
  void* o;     // (B, T, H, Dv) or (total_q, H, Dv), dense
  float* lse;  // (B, H, T) or (H, total_q), dense
  float* top;  // as lse: largest score of the row (CUDA: or one that is less by no more than 8 ln 2), and
  float* inv;  // 1 / sum of exp(score - top); 0 for a row without a key
};

struct FlashAttentionBwdParams {
  FlashAttentionProblem problem;
  AttentionTensor o, dout;  // (B, T, H, Dv) or (total_q, H, Dv)
  const float* top;         // (B, H, T) or (H, total_q), dense, as is inv: see above. exp(score - top) * inv has
  const float* inv;         // a smaller error than exp(score - lse)
  const float* dlse;        // as top, or null
  void* dq;                 // dense, as are dk and dv
  void* dk;
  void* dv;
  float* dsinks;     // (H), or null when sinks is
  float* delta;      // as top: rowsum(dout * o) - dlse
  float* workspace;  // flash_attention_bwd_workspace floats, or _workspace_cuda
};

// Query rows of the backward pass's panels, the query heads of a group counted as rows of their own.
inline constexpr int64_t kFlashAttentionPanel = 64;

// Keys of the backward pass's blocks.
inline constexpr int64_t kFlashAttentionKeys = 96;

// Query rows of a kv head that are few.
inline constexpr int64_t kFlashAttentionFewRows = 8;

// Floats in which the backward pass adds up dq: the rows of every (sequence, kv head), padded to panels.
inline int64_t flash_attention_dq_floats(const FlashAttentionProblem& p) {
  const int64_t rows = p.cu_seqlens_q == nullptr ? p.batch * p.queries : p.queries;
  return (rows * p.heads + p.batch * p.kv_heads * kFlashAttentionPanel) * ((p.dim + 15) / 16 * 16);
}

// Floats in which it keeps q.k and dout.v of a sequence whose rows are few.
inline int64_t flash_attention_few_floats(const FlashAttentionProblem& p, int64_t queries, int64_t keys) {
  const int64_t rows = queries * (p.heads / p.kv_heads);
  const int64_t padded = (keys + kFlashAttentionKeys - 1) / kFlashAttentionKeys * kFlashAttentionKeys;
  return rows > kFlashAttentionFewRows ? 0 : 2 * rows * padded * p.kv_heads;
}

// Floats that the backward pass needs.
inline int64_t flash_attention_bwd_workspace(const FlashAttentionProblem& p) {
  int64_t floats = flash_attention_dq_floats(p);
  if (p.cu_seqlens_q == nullptr) return floats + p.batch * flash_attention_few_floats(p, p.queries, p.keys);
  for (int64_t b = 0; b < p.batch; ++b)
    floats += flash_attention_few_floats(p, p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b],
                                         p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b]);
  return floats;
}

// The same for the CUDA kernels: rowsum(p * dp) per row, where there are sinks.
inline int64_t flash_attention_bwd_workspace_cuda(const FlashAttentionProblem& p) {
  return p.sinks == nullptr ? 0 : (p.cu_seqlens_q == nullptr ? p.batch * p.queries : p.queries) * p.heads;
}

void flash_attention_fwd_cpu(const FlashAttentionFwdParams& params);
void flash_attention_bwd_cpu(const FlashAttentionBwdParams& params);
void flash_attention_fwd_cuda(const FlashAttentionFwdParams& params, Stream stream);
void flash_attention_bwd_cuda(const FlashAttentionBwdParams& params, Stream stream);

}  // namespace grokkernels
