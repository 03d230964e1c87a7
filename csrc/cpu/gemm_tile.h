// Small matrix products on float32 tiles that lie in scratch: the register tile that attention is made of.
//
// C (m, n) = A (m, k) B (k, n), with n counted in vectors along the lanes and every A element broadcast. A tile of
// kTileRows x up to kTileVectors accumulators hides the latency of the multiply-add and leaves registers for the
// vectors of B and one for the broadcast. One column panel of B stays in the first-level cache while all rows of A
// pass.
//
// Rounding: the k products are added up on their own before they meet C, in one chain, or, where k is long or errors
// are to be smaller, with kChains = 2: even and odd k have accumulators of their own, and a tile half the rows.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

#if defined(GK_SIMD_AVX512)
inline constexpr int kTileRows = 8;  // 8 x 3 accumulators of 32 registers
#else
inline constexpr int kTileRows = 4;  // 4 x 3 of 16
#endif
inline constexpr int kTileVectors = 3;

enum class Into {
  kWrite,    // C = scale[0] * A B
  kAdd,      // C = C + A B
  kRescale,  // C = scale[row] * C + A B
};

// A's element (row, i) is a[row * a_row + i * a_step]; kAdjacent says a_row = 1, and else a_step = 1.
template <Into kInto, bool kAdjacent, int kChains, int kVectors>
GK_ALWAYS_INLINE void gemm_tile(int64_t k, const float* a, int64_t a_stride, const float* b, int64_t b_stride, float* c,
                                int64_t c_stride, const float* scale) {
  constexpr int kRows = kTileRows / kChains;
  vf sum[kChains][kRows][kVectors] = {};
  auto step = [&](int64_t i, vf(&to)[kRows][kVectors]) __attribute__((always_inline)) {
    vf right[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + i * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf left = set1(kAdjacent ? a[i * a_stride + r] : a[r * a_stride + i]);
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) to[r][v] = fma(left, right[v], to[r][v]);
    }
  };
  int64_t i = 0;
  for (; i + kChains <= k; i += kChains) {
    step(i, sum[0]);
    if constexpr (kChains == 2) step(i + 1, sum[1]);
  }
  if (i < k) step(i, sum[0]);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + r * c_stride + v * kLanes;
      vf total = sum[0][r][v];
      if constexpr (kChains == 2) total = total + sum[1][r][v];
      if constexpr (kInto == Into::kWrite) store(at, total * set1(scale[0]));
      if constexpr (kInto == Into::kAdd) store(at, load(at) + total);
      if constexpr (kInto == Into::kRescale) store(at, fma(load(at), set1(scale[r]), total));
    }
}

template <Into kInto, bool kAdjacent, int kChains, int kVectors>
GK_ALWAYS_INLINE void gemm_panel(int64_t m, int64_t k, const float* a, int64_t a_stride, const float* b,
                                 int64_t b_stride, float* c, int64_t c_stride, const float* scale) {
  for (int64_t r = 0; r < m; r += kTileRows / kChains)
    gemm_tile<kInto, kAdjacent, kChains, kVectors>(k, a + r * (kAdjacent ? 1 : a_stride), a_stride, b, b_stride,
                                                   c + r * c_stride, c_stride,
                                                   kInto == Into::kRescale ? scale + r : scale);
}

// m rounded up to kTileRows: A, C and scale must have those rows too. a_stride is the distance of A's rows, or, when
// kAdjacent, of its columns.
template <Into kInto, bool kAdjacent, int kChains>
[[gnu::noinline]] void gemm(int64_t m, int64_t vectors, int64_t k, const float* a, int64_t a_stride, const float* b,
                            int64_t b_stride, float* c, int64_t c_stride, const float* scale = nullptr) {
  while (vectors > 0) {  // 4 as 2 + 2: no tile too narrow to keep the multipliers busy
    const int now = vectors >= 3 && vectors != 4 ? 3 : vectors >= 2 ? 2 : 1;
    if (now == 3) gemm_panel<kInto, kAdjacent, kChains, 3>(m, k, a, a_stride, b, b_stride, c, c_stride, scale);
    if (now == 2) gemm_panel<kInto, kAdjacent, kChains, 2>(m, k, a, a_stride, b, b_stride, c, c_stride, scale);
    if (now == 1) gemm_panel<kInto, kAdjacent, kChains, 1>(m, k, a, a_stride, b, b_stride, c, c_stride, scale);
    vectors -= now;
    b += now * kLanes;
    c += now * kLanes;
  }
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
