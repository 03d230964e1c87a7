// The order by expert on the device, which moe_permute and moe_experts both begin with: csrc/cuda/expert_order.cu.
#pragma once

#include <cstdint>

#include "common/device.h"

namespace grokkernels {

// The (n, k) pairs are numbered by expert, then token, then k; what an expert gets beyond `capacity` is dropped, and so
// is an index outside [0, E).
struct ExpertOrderParams {
  int64_t tokens, top_k, experts;  // N, K, E; N * K < 2^31
  int64_t capacity;                // most rows of an expert; N * K or more when there is no limit
  const int32_t* indices;          // (N, K)
  int32_t* slots;                  // (N, K): the number of (n, k), -1 when dropped
  int32_t* offsets;                // (E): where each expert's numbers end
  int32_t* token_of;               // (N*K): the token of each number, -1 past the last one; or null
  int32_t* counts;                 // work space of expert_order_counts(N * K, E) elements
};

// The pairs are counted in this many chunks. Each chunk reads the counts of all, so there are only so many of them; few
// pairs make one chunk, and one kernel does all of it.
constexpr int64_t expert_order_chunks(int64_t pairs) {
  constexpr int64_t kPairs = 4096, kMost = 64;
  const int64_t chunks = (pairs + kPairs - 1) / kPairs;
  return chunks < 1 ? 1 : chunks > kMost ? kMost : chunks;
}

constexpr int64_t expert_order_counts(int64_t pairs, int64_t experts) {
  const int64_t chunks = expert_order_chunks(pairs);
  return chunks > 1 ? chunks * experts : 0;
}

// One or two kernels; the host waits for nothing.
void order_by_expert_cuda(const ExpertOrderParams& params, Stream stream);

}  // namespace grokkernels
