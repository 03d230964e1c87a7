// The way back from expert order: out[n] (C) = sum over k, in order, of weights[n,k] * y[slots[n,k]]; without weights
// they are 1. Slots outside [0, N * K) add nothing.
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/groups.cuh"
#include "cuda/vector.cuh"

namespace grokkernels::device {

inline constexpr int kCombineThreads = 256;

struct CombineParams {
  int64_t tokens, top_k, cols;
  const float* y;        // (N*K, C)
  const float* weights;  // (N, K), or null
  const int32_t* slots;  // (N, K)
  void* out;             // (N, C)
};

// A thread sums kWidth neighbouring columns of one token.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kCombineThreads) moe_experts_combine_kernel(const __grid_constant__ CombineParams p) {
  const int64_t across = (p.cols + kWidth - 1) / kWidth;
  const int64_t i = int64_t{blockIdx.x} * kCombineThreads + threadIdx.x;
  if (i >= p.tokens * across) return;
  const int64_t token = i / across, col = (i - token * across) * kWidth;
  float sum[kWidth] = {};
#pragma unroll 4
  for (int64_t k = 0; k < p.top_k; ++k) {
    const int64_t slot = p.slots[token * p.top_k + k];
    if (slot < 0 || slot >= p.tokens * p.top_k) continue;
    const float weight = p.weights != nullptr ? p.weights[token * p.top_k + k] : 1.0f;
    const float* row = p.y + slot * p.cols + col;
    float y[kWidth];
    if constexpr (kWidth == 4)
      load_vector(row, y);
    else
      y[0] = row[0];
#pragma unroll
    for (int c = 0; c < kWidth; ++c) sum[c] = fmaf(weight, y[c], sum[c]);
  }
  T* out = static_cast<T*>(p.out) + token * p.cols + col;
  if constexpr (kWidth == 4 && sizeof(T) == 4)
    store_vector(out, sum);
  else if constexpr (kWidth == 4)
    store_8(out, {{narrow_pair<T>(sum[0], sum[1]), narrow_pair<T>(sum[2], sum[3])}});
  else
    out[0] = narrow<T>(sum[0]);
}

template <typename T>
void combine(const CombineParams& p, Stream stream) {
  const auto run = [&](auto kernel, int64_t width) {
    const int64_t threads = p.tokens * ceil_div(p.cols, width);
    launch(kernel, {.grid = {static_cast<unsigned>(ceil_div(threads, kCombineThreads))}, .block = {kCombineThreads}},
           stream, p);
  };
  p.cols % 4 == 0 ? run(moe_experts_combine_kernel<T, 4>, 4) : run(moe_experts_combine_kernel<T, 1>, 1);
}

}  // namespace grokkernels::device
