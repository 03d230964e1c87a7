// Products of two bfloat16 matrices in strips: what gemm.h hands on where the processor multiplies bfloat16 itself.
// Included by gemm.h.
#pragma once

#include <cstdint>

#include "cpu/parallel.h"
#if defined(GK_SIMD_AMX)
#include "cpu/strips_amx.h"
#else
#include "cpu/strips_dot.h"
#endif

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

inline constexpr int64_t kTilesCols = 64;            // of b, 32 KB: stay in the first-level cache
inline constexpr int64_t kTilesBlockRows = 512;      // of a that are packed at once, at most
inline constexpr int64_t kTilesBlockCols = 256;      // of b: 128 KB of the second-level cache
inline constexpr int64_t kTilesPacked = 256 * 1024;  // elements of a: 512 KB
inline constexpr int64_t kMostInPlace = 96;          // rows that read columns of b where they lie; more share a copy
static_assert(kTilesBlockRows * kTilesDepth <= kTilesPacked && kTilesBlockCols % kTilesCols == 0);

// c (rows, cols) = or += panel of a times panel of b. The caller has configured the tiles.
inline void multiply_panels(int64_t rows, int64_t cols, int64_t depth, const bfloat16* a, const bfloat16* b, float* c,
                            int64_t ldc, bool accumulate) {
  for (int64_t begin = 0; begin < cols; begin += kTilesCols)
    for (int64_t i = 0; i < rows; i += 2 * kTileLines)
      for (int64_t j = begin; j < cols && j < begin + kTilesCols; j += 2 * kTileLines) {
        const bool tall = rows - i > kTileLines, wide = cols - j > kTileLines;
        const auto multiply = tall   ? wide ? detail::multiply_strips<2, 2> : detail::multiply_strips<2, 1>
                                : wide ? detail::multiply_strips<1, 2>
                                     : detail::multiply_strips<1, 1>;
        const bool last = j + 2 * kTileLines >= cols || j + 2 * kTileLines >= begin + kTilesCols;
        const bool lowest = i + 2 * kTileLines >= rows;
        const float* next = c + (!last    ? i * ldc + j + 2 * kTileLines
                                 : lowest ? 0
                                          : (i + 2 * kTileLines) * ldc + begin);
        multiply(rows - i, cols - j, depth, a + i * detail::kStripStride, b + j * detail::kStripStride, c + i * ldc + j,
                 ldc, accumulate, next);
      }
}

namespace detail {

// Few rows wait for b: where its columns are dense along the sum nothing of it is copied. All rows pass two strips of
// it before the next ones. n is a multiple of two strips, k of a tile's depth.
template <int kProducts>
void few_rows_on_tiles(int64_t m, int64_t n, int64_t k, const Strided<bfloat16>& a,
                       const Strided<bfloat16> (&b)[kProducts], float* const (&c)[kProducts], int64_t ldc,
                       bool accumulate) {
  const int64_t strips = (m + kTileLines - 1) / kTileLines, a_panel = strips * kStripElements;
  const int64_t span = kTilesPacked / (strips * kTileLines * kTilesDepth) * kTilesDepth;
  bfloat16* panels = scratch<bfloat16>(kScratchA, kTilesPacked / kTilesDepth * kStripStride);
  configure_tiles();
  for (int64_t begin = 0; begin < k; begin += span) {
    const int64_t depth = at_most(k - begin, span);
    for (int64_t p = 0; p < depth; p += kTilesDepth)
      pack_b(a.from(0, begin + p).transposed(), at_most(depth - p, kTilesDepth), m, panels + p / kTilesDepth * a_panel);
    for (int x = 0; x < kProducts; ++x)
      for (int64_t j = 0; j < n; j += 2 * kTileLines)
        for (int64_t strip = 0; strip < strips; strip += 2) {
          const auto multiply = strips - strip > 1 ? multiply_transposed<2> : multiply_transposed<1>;
          const int64_t row = strip * kTileLines;
          multiply(m - row, depth, panels + strip * kStripElements, a_panel, b[x].data + begin + j * b[x].col, b[x].col,
                   c[x] + row * ldc + j, ldc, accumulate || begin > 0, strip == 0);
        }
  }
  release_tiles();
}

// c^T = b^T a^T, as multiply_columns in gemm.h: columns of b that are dense along the sum have a's form and are copied
// as they are, and what has to be paired is a.
template <int kProducts>
void columns_on_tiles(int64_t m, int64_t n, int64_t k, const Strided<bfloat16>& a,
                      const Strided<bfloat16> (&b)[kProducts], float* const (&c)[kProducts], int64_t ldc,
                      bool accumulate) {
  constexpr int64_t kCols = 2 * kTileLines, kTurnedStride = kTilesBlockRows + kTileLines;
  constexpr int64_t kAhead = 2 * kTilesDepth;
  bfloat16* right = scratch<bfloat16>(kScratchA, kTilesPacked / kTilesDepth * kStripStride);
  float* turned = scratch<float>(kScratchB, kCols * (kTurnedStride + kStripStride / 2));
  bfloat16* left = reinterpret_cast<bfloat16*>(turned + kCols * kTurnedStride);
  configure_tiles();
  for (int64_t i = 0; i < m; i += kTilesBlockRows) {
    const int64_t rows = at_most(m - i, kTilesBlockRows), lines = (rows + kTileLines - 1) / kTileLines * kTileLines;
    const int64_t span = kTilesPacked / (lines * kTilesDepth) * kTilesDepth;
    for (int64_t begin = 0; begin < k; begin += span) {
      const int64_t end = at_most(begin + span, k);
      const auto panel = [&](int64_t p) { return right + (p - begin) / kTilesDepth * (lines * kStripStride); };
      for (int64_t p = begin; p < end; p += kTilesDepth)
        pack_b(a.from(i, p).transposed(), at_most(end - p, kTilesDepth), rows, panel(p));
      const bool begun = accumulate || begin > 0;
      for (int x = 0; x < kProducts; ++x)
        for (int64_t j = 0; j < n; j += kCols) {
          const int64_t cols = at_most(n - j, kCols);
          float* out = c[x] + i * ldc + j;
          if (begun)
            transpose_lines(Lines<float>{out, ldc, 1, nullptr, nullptr}, rows, cols, lines, turned, kTurnedStride);
          for (int64_t p = begin; p < end; p += kTilesDepth) {
            const int64_t depth = at_most(end - p, kTilesDepth);
            const int64_t later = p - begin + kAhead, reach = end - begin;
            const int64_t ahead = later < reach ? kAhead : kCols * b[x].col + (later - reach) % reach - (p - begin);
            copy_columns(b[x].from(p, j), depth, cols, left, ahead);
            multiply_panels(cols, rows, depth, left, panel(p), turned, kTurnedStride, begun || p > begin);
          }
          turn_back(rows, cols, turned, kTurnedStride, out, ldc);
        }
    }
  }
  release_tiles();
}

// gemm_shared of gemm.h. How b lies decides how it is read, which is what products of few rows wait for: columns dense
// along the sum are read to the end of a span, kTilesCols at a time; rows of b in one stretch of kTilesBlockCols.
template <int kProducts>
void gemm_on_tiles(int64_t m, int64_t n, int64_t k, const Strided<bfloat16>& a, const Strided<bfloat16> (&b)[kProducts],
                   bool columns_dense, float* const (&c)[kProducts], int64_t ldc, bool accumulate) {
  if (columns_dense && m <= kMostInPlace && n % (2 * kTileLines) == 0 && k % kTileDepth == 0)
    return few_rows_on_tiles(m, n, k, a, b, c, ldc, accumulate);
  // What is turned round: a and c, or b, which is read faster.
  if (columns_dense && 2 * m * (k + n) < n * k) return columns_on_tiles(m, n, k, a, b, c, ldc, accumulate);
  bfloat16* panel_a = scratch<bfloat16>(kScratchA, kTilesPacked / kTilesDepth * kStripStride);
  bfloat16* panel_b = scratch<bfloat16>(kScratchB, kTilesBlockCols * kStripStride);
  const bool along = b[0].row == 1 && b[0].rows == nullptr;
  configure_tiles();
  for (int64_t i = 0; i < m; i += kTilesBlockRows) {
    const int64_t rows = at_most(m - i, kTilesBlockRows), lines = (rows + kTileLines - 1) / kTileLines * kTileLines;
    const int64_t span = along ? kTilesPacked / (lines * kTilesDepth) * kTilesDepth : kTilesDepth;
    const int64_t step = a.col == 1 ? kTileLines : lines;
    const int64_t width = along ? kTilesCols : kTilesBlockCols;
    for (int64_t begin = 0; begin < k; begin += span) {
      const int64_t end = at_most(begin + span, k);
      const auto panel = [&](int64_t p) { return panel_a + (p - begin) / kTilesDepth * (lines * kStripStride); };
      for (int64_t line = 0; line < rows; line += step)
        for (int64_t p = begin; p < end; p += kTilesDepth)
          pack_a(a.from(i + line, p), at_most(rows - line, step), at_most(end - p, kTilesDepth),
                 panel(p) + line * kStripStride);
      for (int x = 0; x < kProducts; ++x)
        for (int64_t j = 0; j < n; j += width) {
          const int64_t cols = at_most(n - j, width);
          for (int64_t p = begin; p < end; p += kTilesDepth) {
            const int64_t depth = at_most(end - p, kTilesDepth);
            pack_b(b[x].from(p, j), depth, cols, panel_b);
            multiply_panels(rows, cols, depth, panel(p), panel_b, c[x] + i * ldc + j, ldc, accumulate || p > 0);
          }
        }
    }
  }
  release_tiles();
}

}  // namespace detail

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
