// The order by expert: a stable counting sort of the (n, k) pairs, indices (N, K) -> slots (N, K), offsets (E) and the
// token of each slot (N*K).
//
// Histogram, scan, scatter without a third kernel in between: the first kernel counts each chunk of pairs, and in the
// second each block adds up by itself what lies before its chunk, from counts that fit in the L2 cache. A block gives
// each warp a run of its chunk; the warps count their runs, and each then numbers its own, 32 pairs at a time: a pair's
// rank among its expert's is the warp's running count plus the lower lanes that hold the same expert. Integers only, so
// the order of additions does not matter and the result is the same for every run.
//
// Experts are taken kExperts at a time, so that their counts fit in shared memory for any number of them; up to
// kExperts the pairs are read once for the histogram and twice for the numbers.
#include <device/core.cuh>
#include <device/memory.cuh>
#include <device/warp.cuh>

#include "common/expert_order.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kExperts = 1024;  // 40 KiB of counts

// Pairs [begin, end); there are fewer than 2^31.
struct Run {
  unsigned begin, end;
};

GK_DEVICE Run run_of(Run of, unsigned part, unsigned parts) {
  const unsigned length = ((of.end - of.begin + parts - 1) / parts + 31) / 32 * 32;
  const unsigned begin = of.begin + part * length, end = begin + length;
  return {begin < of.end ? begin : of.end, end < of.end ? end : of.end};
}

// Adds how often each expert of [first, first + n) is in a run to count (n); `lane` of `lanes` threads share the run.
GK_DEVICE void count_experts(const int32_t* indices, Run run, int64_t first, int n, unsigned lane, unsigned lanes,
                             int* count) {
  for (unsigned i = run.begin + lane; i < run.end; i += lanes) {
    const int64_t expert = indices[i] - first;
    if (expert >= 0 && expert < n) atomic_add(&count[expert], 1);
  }
}

__global__ void __launch_bounds__(kThreads) expert_order_count_kernel(const __grid_constant__ ExpertOrderParams p) {
  int* count = reinterpret_cast<int*>(dynamic_shared());  // (kExperts)
  const int thread = static_cast<int>(threadIdx.x);
  const Run chunk = run_of({0, static_cast<unsigned>(p.tokens * p.top_k)}, blockIdx.x, gridDim.x);
  for (int64_t first = 0; first < p.experts; first += kExperts) {
    const int n = static_cast<int>(p.experts - first < kExperts ? p.experts - first : kExperts);
    for (int e = thread; e < n; e += kThreads) count[e] = 0;
    sync_threads();
    count_experts(p.indices, chunk, first, n, thread, kThreads, count);
    sync_threads();
    for (int e = thread; e < n; e += kThreads) p.counts[blockIdx.x * p.experts + first + e] = count[e];
    sync_threads();
  }
}

__global__ void __launch_bounds__(kThreads)
    expert_order_number_kernel(const __grid_constant__ ExpertOrderParams p, int capacity) {
  const int width = static_cast<int>(p.experts < kExperts ? p.experts : kExperts);
  int* begin = reinterpret_cast<int*>(dynamic_shared());  // (width): first the expert's pairs, then its first slot
  int* before = begin + width;                            // (width): the expert's pairs in earlier chunks
  int* ranks = before + width;                            // (kWarps, width): the next rank of each warp's run
  int* sums = ranks + kWarps * width;                     // (kWarps)
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = thread / 32;
  const unsigned top_k = static_cast<unsigned>(p.top_k);
  const uint32_t lower_lanes = (1u << lane) - 1;
  const Run chunk = run_of({0, static_cast<unsigned>(p.tokens * p.top_k)}, blockIdx.x, gridDim.x);
  const Run run = run_of(chunk, threadIdx.x / 32, kWarps);

  int used = 0;  // slots of the experts so far
  int64_t first = 0;
  do {
    const int n = static_cast<int>(p.experts - first < width ? p.experts - first : width);
    for (int i = thread; i < (2 + kWarps) * width; i += kThreads) begin[i] = 0;
    sync_threads();
    count_experts(p.indices, run, first, n, lane, 32, ranks + warp * width);
    if (gridDim.x > 1) {
      for (int i = thread; i < static_cast<int>(gridDim.x) * n; i += kThreads) {
        const int other = i / n, e = i - other * n;
        const int count = p.counts[other * p.experts + first + e];
        if (count == 0) continue;
        atomic_add(&begin[e], count);
        if (other < static_cast<int>(blockIdx.x)) atomic_add(&before[e], count);
      }
    }
    sync_threads();
    for (int e = thread; e < n; e += kThreads) {
      int rank = before[e];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const int count = ranks[w * width + e];
        ranks[w * width + e] = rank;
        rank += count;
      }
      if (gridDim.x == 1) begin[e] = rank;
    }
    sync_threads();
    for (int tile = 0; tile < n; tile += kThreads) {  // an exclusive scan of what the experts keep
      const int e = tile + thread;
      const int kept = e >= n ? 0 : begin[e] < capacity ? begin[e] : capacity;
      int sum = kept;
#pragma unroll
      for (int delta = 1; delta < 32; delta *= 2) {
        const int below = shuffle_up(sum, static_cast<unsigned>(delta));
        if (lane >= delta) sum += below;
      }
      if (lane == 31) sums[warp] = sum;
      sync_threads();
      int of_tile = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        if (w == warp) sum += used + of_tile;
        of_tile += sums[w];
      }
      if (e < n) {
        begin[e] = sum - kept;
        if (blockIdx.x == 0) p.offsets[first + e] = sum;
      }
      used += of_tile;
      sync_threads();
    }

    int* next = ranks + warp * width;
    for (unsigned at = run.begin; at < run.end; at += 32) {
      const unsigned i = at + lane;
      const int64_t index = i < run.end ? p.indices[i] : -1, expert = index - first;
      const bool here = index >= 0 && expert >= 0 && expert < n;
      const uint32_t same = match_any(here ? static_cast<unsigned>(expert) : ~0u);
      const int start = here ? next[expert] : 0, rank = start + count_bits(same & lower_lanes);
      sync_warp();
      if (here && (same & lower_lanes) == 0) next[expert] = start + count_bits(same);
      sync_warp();
      if (here) {
        const int slot = rank < capacity ? begin[expert] + rank : -1;
        p.slots[i] = slot;
        if (slot >= 0 && p.token_of != nullptr) p.token_of[slot] = static_cast<int32_t>(i / top_k);
      } else if (first == 0 && i < run.end && (index < 0 || index >= p.experts)) {
        p.slots[i] = -1;
      }
    }
    sync_threads();
    first += kExperts;
  } while (first < p.experts);

  if (p.token_of == nullptr) return;
  for (unsigned slot = chunk.begin + thread; slot < chunk.end; slot += kThreads)
    if (slot >= static_cast<unsigned>(used)) p.token_of[slot] = -1;
}

}  // namespace

void order_by_expert_cuda(const ExpertOrderParams& p, Stream stream) {
  const int64_t pairs = p.tokens * p.top_k;
  const unsigned chunks = static_cast<unsigned>(expert_order_chunks(pairs));
  const size_t width = static_cast<size_t>(p.experts < kExperts ? p.experts : kExperts);
  if (chunks > 1)
    launch(expert_order_count_kernel, {.grid = {chunks}, .block = {kThreads}, .shared_bytes = 4 * width}, stream, p);
  launch(expert_order_number_kernel,
         {.grid = {chunks}, .block = {kThreads}, .shared_bytes = 4 * ((2 + kWarps) * width + kWarps)}, stream, p,
         static_cast<int>(p.capacity < pairs ? p.capacity : pairs));
}

}  // namespace grokkernels
