// The order by expert and the way back.
//
// There: a stable counting sort of the (n, k) pairs, by expert, then token, then k.
// Histogram, scan, scatter: chunks of pairs are counted side by side, one scan over (expert, chunk) says where each
// chunk's pairs of an expert begin, and the chunks then number their pairs side by side.
#pragma once

#include <cstdint>

#include "cpu/loops.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// indices (pairs), slots (pairs), offsets (experts); see MoePermuteFwdParams. Takes scratch slot 0.
inline void order_by_expert(const int32_t* indices, int64_t pairs, int64_t experts, int64_t capacity, int32_t* slots,
                            int32_t* offsets) {
  constexpr int64_t kPairsPerChunk = 8192;  // below this the count is done before another thread has woken
  const int64_t wanted = pairs / kPairsPerChunk, threads = num_threads();
  const int64_t chunks = wanted < 1 ? 1 : wanted < threads ? wanted : threads;
  int32_t* counts = scratch<int32_t>(0, chunks * experts);
  const auto chunk_begin = [=](int64_t chunk) { return pairs * chunk / chunks; };
  const auto routed = [=](int32_t e) { return e >= 0 && e < experts; };

  parallel_tasks(chunks, kMinParallelCost, [&](int64_t chunk) {
    int32_t* count = counts + chunk * experts;
    for (int64_t e = 0; e < experts; ++e) count[e] = 0;
    for (int64_t i = chunk_begin(chunk); i < chunk_begin(chunk + 1); ++i)
      if (routed(indices[i])) ++count[indices[i]];
  });
  int64_t end = 0;
  for (int64_t e = 0; e < experts; ++e) {
    int32_t rank = 0;  // of the chunk's first pair among the expert's
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int32_t count = counts[chunk * experts + e];
      counts[chunk * experts + e] = rank;
      rank += count;
    }
    end += rank < capacity ? rank : capacity;
    offsets[e] = static_cast<int32_t>(end);
  }
  parallel_tasks(chunks, kMinParallelCost, [&](int64_t chunk) {
    int32_t* rank = counts + chunk * experts;
    for (int64_t i = chunk_begin(chunk); i < chunk_begin(chunk + 1); ++i) {
      const int32_t e = indices[i];
      slots[i] = -1;
      if (!routed(e)) continue;
      const int32_t r = rank[e]++;
      if (r < capacity) slots[i] = (e == 0 ? 0 : offsets[e - 1]) + r;
    }
  });
}

// out[n] (C) = sum over k, in order, of weights[n,k] * y[slots[n,k]]; without weights they are 1. Slots outside
// [0, N * K) add nothing.
template <bool kWeighted, bool kStream, typename TIn, typename TOut>
void weighted_sum(int64_t tokens, int64_t top_k, int64_t cols, const TIn* y, int64_t y_stride, const float* weights,
                  const int32_t* slots, TOut* out) {
  parallel_range(tokens, (1 + top_k) * cols, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int32_t* slot = slots + token * top_k;
      const float* weight = kWeighted ? weights + token * top_k : nullptr;
      const auto sum_at = [&](int64_t c, auto n) {
        vf sum = zero();
        for (int64_t k = 0; k < top_k; ++k) {
          if (slot[k] < 0 || slot[k] >= tokens * top_k) continue;
          const vf v = fetch_n(y + slot[k] * y_stride + c, n);
          sum = kWeighted ? fma(set1(weight[k]), v, sum) : sum + v;
        }
        return sum;
      };
      TOut* row = out + token * cols;
      int64_t c = 0;
      for (; c + 2 * kLanes <= cols; c += 2 * kLanes)
        put_pair<kStream>(row + c, sum_at(c, Full{}), sum_at(c + kLanes, Full{}));
      for_vectors(c, cols, [&](int64_t i, auto n) { store_n(row + i, sum_at(i, n), n); });
    }
    stream_fence();
  });
}

template <bool kWeighted, typename TIn, typename TOut>
void weighted_sum(int64_t tokens, int64_t top_k, int64_t cols, const TIn* y, int64_t y_stride, const float* weights,
                  const int32_t* slots, TOut* out) {
  if (should_stream(out, cols, tokens * cols * static_cast<int64_t>(sizeof(TOut))))
    weighted_sum<kWeighted, true>(tokens, top_k, cols, y, y_stride, weights, slots, out);
  else
    weighted_sum<kWeighted, false>(tokens, top_k, cols, y, y_stride, weights, slots, out);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
