// Products of strips with the dot instruction: each of 16 lanes of a sum takes a pair of products, two of b's elements
// times two of a's, which are broadcast. Eight lines of a by two strips of b are 16 sums, enough to hide its latency.
//
// One instruction adds the odd product of the pair, then the even one, each rounded once; denormal numbers count as
// zero, operands and sums alike. Intel, "Architecture Instruction Set Extensions", VDPBF16PS.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/strips.h"
#include "cpu/transpose.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// The matrix unit has to be configured, vectors do not.
GK_ALWAYS_INLINE void configure_tiles() {}
GK_ALWAYS_INLINE void release_tiles() {}

namespace detail {

inline constexpr int kDotRows = 8;
static_assert(kTileLines % kDotRows == 0);

// sum += kDotRows lines of a, `row` elements apart, times kStrips strips of b, over one tile's depth.
template <int kStrips>
GK_ALWAYS_INLINE void dot_tile(const bfloat16* a, int64_t row, const bfloat16* b, vf (&sum)[kDotRows][kStrips]) {
  for (int pair = 0; pair < kTileDepth; pair += 2) {
    vf right[kStrips];
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s) right[s] = as_float(load_bytes(b + s * kStripElements + pair * kTileLines));
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r) {
      int32_t two;
      __builtin_memcpy(&two, a + r * row + pair, sizeof(two));
      const vf left = as_float(set1(two));
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) sum[r][s] = add_pairs(left, right[s], sum[r][s]);
    }
  }
}

// c = or += kA strips of a times kB strips of b; of c there are (rows, cols). (The next c is asked for on the matrix
// unit only.)
template <int kA, int kB>
void multiply_strips(int64_t rows, int64_t cols, int64_t depth, const bfloat16* a, const bfloat16* b, float* c,
                     int64_t ldc, bool accumulate, const float* /*next*/) {
  for (int i = 0; i < kA * kTileLines && i < rows; i += kDotRows) {
    const bfloat16* left = a + i / kTileLines * kStripElements + i % kTileLines * kTileDepth;
    float* out = c + i * ldc;
    const bool whole = rows - i >= kDotRows && cols >= kB * kTileLines;
    // Where lines or columns are missing, sums pass through a copy of what there is.
    float part[kDotRows][kB * kTileLines];
    const auto columns = [&](int s) { return static_cast<int>(at_most(cols - s * kTileLines, kTileLines)); };
    if (!whole && accumulate)
      for (int r = 0; r < kDotRows && r < rows - i; ++r)
        for (int s = 0; s < kB; ++s)
          store(part[r] + s * kTileLines, load_n(out + r * ldc + s * kTileLines, columns(s)));
    float* at = whole ? out : part[0];
    const int64_t stride = whole ? ldc : kB * kTileLines;
    vf sum[kDotRows][kB];
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < kB; ++s) sum[r][s] = accumulate ? load(at + r * stride + s * kTileLines) : zero();
    const bfloat16* right = b;
    for (int64_t p = 0; p < depth; p += kTileDepth, left += kTileElements, right += kTileElements)
      dot_tile(left, kTileDepth, right, sum);
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < kB; ++s) store(at + r * stride + s * kTileLines, sum[r][s]);
    if (!whole)
      for (int r = 0; r < kDotRows && r < rows - i; ++r)
        for (int s = 0; s < kB; ++s)
          store_n(out + r * ldc + s * kTileLines, load(part[r] + s * kTileLines), columns(s));
  }
}

// Two strips of columns of c, kStrips strips of rows: c^T (32, rows) = or += b^T a^T over `depth`, columns of b read
// where they lie, `col` apart. The first to read b asks for what comes next kAhead elements ahead: along the sum, then
// in the next columns.
template <int kStrips>
void multiply_transposed(int64_t rows, int64_t depth, const bfloat16* a, int64_t a_panel, const bfloat16* b,
                         int64_t col, float* c, int64_t ldc, bool accumulate, bool first) {
  constexpr int64_t kAhead = 16 * kTileDepth;
  alignas(64) float turned[2 * kTileLines][kStrips * kTileLines];
  for (int j = 0; j < 2 * kTileLines; j += kDotRows) {
    const bfloat16* column = b + j * col;
    vf sum[kDotRows][kStrips] = {};
    for (int64_t p = 0; p < depth; p += kTileDepth) {
      if (first)
        for (int r = 0; r < kDotRows; ++r)
          __builtin_prefetch(column + r * col + (p + kAhead < depth ? p + kAhead : kDotRows * col + p + kAhead - depth),
                             0, 2);
      dot_tile(column + p, col, a + p / kTilesDepth * a_panel + p % kTilesDepth * kTileLines, sum);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kDotRows; ++r)
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) store(turned[j + r] + s * kTileLines, sum[r][s]);
  }
  for (int j = 0; j < 2 * kTileLines; j += kTileLines)
    for (int s = 0; s < kStrips; ++s) {
      vf x[kTileLines];
#pragma GCC unroll 16
      for (int i = 0; i < kTileLines; ++i) x[i] = load(turned[j + i] + s * kTileLines);
      transpose(x);
      for (int64_t i = 0; i < kTileLines && s * kTileLines + i < rows; ++i) {
        float* out = c + (s * kTileLines + i) * ldc + j;
        store(out, accumulate ? load(out) + x[i] : x[i]);
      }
    }
}

}  // namespace detail

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
