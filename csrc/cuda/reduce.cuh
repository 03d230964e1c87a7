// Sums and maxima over the lanes of a warp and the threads of a block, built from the vocabulary.
#pragma once

#include <device/core.cuh>
#include <device/warp.cuh>

namespace grokkernels::device {

// Over each segment of kWidth lanes; every lane gets the result, bitwise the same.
template <int kWidth = 32, typename T>
GK_DEVICE T warp_sum(T x) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask, kWidth);
  return x;
}

// The same for several numbers. Where lanes go on differently with each, they are summed before: nvcc takes a condition
// that stays the same out of a loop (13.0 does), and a shuffle in that loop would then stand in two branches, with
// lanes of one warp in both.
template <int kWidth = 32, int kCount>
GK_DEVICE void warp_sum_each(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = warp_sum<kWidth>(x[i]);
}

template <int kWidth = 32>
GK_DEVICE float warp_max(float x) {
#pragma unroll
  for (int mask = kWidth / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask, kWidth));
  return x;
}

// Sum over a block of kThreads threads along x, in a fixed order; every thread gets it. `scratch` is kThreads / 32
// numbers of shared memory, free again after the next sync_threads.
template <int kThreads, typename T>
GK_DEVICE T block_sum(T x, T* scratch) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  x = warp_sum(x);
  if constexpr (kThreads == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  sync_threads();
  T sum = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += scratch[warp];
  return sum;
}

template <int kThreads>
GK_DEVICE float block_max(float x, float* scratch) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  x = warp_max(x);
  if constexpr (kThreads == 32) return x;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  sync_threads();
  float most = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / 32; ++warp) most = fmaxf(most, scratch[warp]);
  return most;
}

}  // namespace grokkernels::device
