// The limits of the machine: chains of multiply-adds in registers, a sum over memory, a copy past the caches.
#include "machine_limits.h"

#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr int kChains = 12;  // two multiply-adds a cycle, four cycles each: eight would do

}  // namespace

void limit_fma(const LimitFmaParams& p) {
  const int64_t threads = num_threads();
  float sums[256] = {};  // of up to so many threads
  parallel_range(threads, kMinParallelCost, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      vf x[kChains];
      for (int c = 0; c < kChains; ++c) x[c] = set1(static_cast<float>(c));
      const vf scale = set1(0.5f), add = set1(1.0f);
      for (int64_t i = 0; i < p.rounds; ++i)
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) x[c] = fma(x[c], scale, add);
      vf sum = zero();
      for (int c = 0; c < kChains; ++c) sum = sum + x[c];
      sums[t % 256] = reduce_add(sum);
    }
  });
  for (const float sum : sums) *p.sink += sum;
  *p.flops = threads * p.rounds * kChains * kLanes * 2;
}

void limit_read(const LimitReadParams& p) {
  float sums[256] = {};
  constexpr int64_t kBlock = 64 * 1024;
  parallel_range((p.count + kBlock - 1) / kBlock, kBlock, [&](int64_t first, int64_t last) {
    vf sum[8] = {};
    const int64_t end = last * kBlock < p.count ? last * kBlock : p.count;
    int64_t i = first * kBlock;
    for (; i + 8 * kLanes <= end; i += 8 * kLanes)
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) sum[v] = sum[v] + load(p.x + i + v * kLanes);
    float total = 0;
    for (int v = 0; v < 8; ++v) total += reduce_add(sum[v]);
    sums[first % 256] = total;
  });
  for (const float sum : sums) *p.sink += sum;
}

void limit_copy(const LimitCopyParams& p) {
  parallel_range(p.count / 1024, 2048, [&](int64_t first, int64_t last) {
    for (int64_t i = first * 1024; i < last * 1024; i += kLanes) stream_store(p.y + i, load(p.x + i));
    stream_fence();
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(limit_fma, LimitFmaParams);
GK_CPU_LAUNCHER(limit_read, LimitReadParams);
GK_CPU_LAUNCHER(limit_copy, LimitCopyParams);
