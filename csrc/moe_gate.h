// moe_gate: the experts that each token goes to, their weights, and the two losses that keep the gate in shape.
#pragma once

#include <cstdint>

#include "common/device.h"
#include "common/dtypes.h"

namespace grokkernels {

// What forward and backward share: how logits become scores, and scores weights.
struct MoeGateOptions {
  DType dtype;                     // of logits
  int64_t tokens, experts, top_k;  // N, E, K
  const void* logits;              // (N, E), rows logits_stride elements apart
  int64_t logits_stride;
  float softcap;  // 0: none
  float jitter;   // 0: none
  uint64_t seed;  // of the jitter
  float routed_scale;
  bool sigmoid;     // scores are sigmoid(z), not softmax(z)
  bool topk_first;  // the weights are a softmax over the chosen logits
  bool renormalize;
};

// On a device, `moe_gate_width` lanes of a warp share a row, and moe_gate_blocks blocks the rows: sums over rows are
// made per block first, so their number depends on the shape alone.
inline constexpr int64_t kMoeGateThreads = 256, kMoeGateMostExperts = 1024;

constexpr int64_t moe_gate_width(int64_t experts) {
  return experts <= 8 ? 2 : experts <= 16 ? 4 : experts <= 32 ? 8 : experts <= 64 ? 16 : 32;
}

constexpr int64_t moe_gate_blocks(int64_t tokens, int64_t experts) {
  constexpr int64_t kMost = 384;  // about three for each multiprocessor
  const int64_t rows = kMoeGateThreads / moe_gate_width(experts), blocks = (tokens + rows - 1) / rows;
  return blocks < 1 ? 1 : blocks > kMost ? kMost : blocks;
}

// Work space of the forward pass on a device.
struct MoeGateWork {
  float* shares;    // (blocks, E): the scores, divided by each row's total
  int32_t* counts;  // (blocks, E)
  double* sums;     // (blocks, 2): lse^2, tokens routed; then (E): parts of the load balance loss
  int32_t* ticket;  // ()
};

struct MoeGateFwdParams {
  MoeGateOptions gate;
  const float* bias;                // (E), added to choose, or null
  int64_t num_groups, topk_groups;  // groups of E / num_groups neighbours; the choice is among topk_groups of them
  float* weights;                   // (N, K)
  int32_t* indices;                 // (N, K), -1: nowhere
  int32_t* counts;                  // (E)
  float* load_balance_loss;         // ()
  float* z_loss;                    // ()
  MoeGateWork work;                 // on a device
};

struct MoeGateBwdParams {
  MoeGateOptions gate;
  const float* dweights;            // (N, K) or null
  const float* dload_balance_loss;  // () or null
  const float* dz_loss;             // () or null
  const int32_t* indices;           // (N, K)
  const int32_t* counts;            // (E)
  void* dlogits;                    // (N, E)
};

void moe_gate_fwd_cpu(const MoeGateFwdParams& params);
void moe_gate_bwd_cpu(const MoeGateBwdParams& params);
void moe_gate_fwd_cuda(const MoeGateFwdParams& params, Stream stream);
void moe_gate_bwd_cuda(const MoeGateBwdParams& params, Stream stream);

}  // namespace grokkernels
