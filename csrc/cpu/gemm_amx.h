// Panels of bfloat16 for the matrix unit: what pack_a, pack_b and multiply_panels of gemm.h are at level amx where both
// operands are bfloat16. Nothing is widened; products are exact and sums float32, as in the panels of float32.
//
// A panel is made of strips of kTileLines lines, rows of a or columns of b, and a strip of tiles, one per kTileDepth
// elements of the sum, each 1 KB in the form that its register takes: loads run through memory in order. Lines and
// elements that are not there are zero. The two forms are transposes of each other in words of two elements, and memory
// holds either: what lies dense along the sum is a's form, what lies dense across it becomes b's when neighbours of the
// sum are paired. Four sums are made at once, of two strips of a and two of b, so every tile that is loaded is
// multiplied twice.
//
// Included by gemm.h.
#pragma once

#include "cpu/amx.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/strided.h"
#include "cpu/transpose.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

inline constexpr int64_t kTilesDepth = 256;          // of a panel
inline constexpr int64_t kTilesCols = 64;            // of b, 32 KB: stay in the first-level cache
inline constexpr int64_t kTilesBlockRows = 512;      // of a that are packed at once, at most
inline constexpr int64_t kTilesBlockCols = 256;      // of b: 128 KB of the second-level cache
inline constexpr int64_t kTilesPacked = 256 * 1024;  // elements of a: 512 KB
inline constexpr int64_t kMostInPlace = 96;          // rows that read columns of b where they lie; more share a copy
static_assert(kTilesBlockRows * kTilesDepth <= kTilesPacked && kTilesBlockCols % kTilesCols == 0);

namespace detail {

// From strip to strip, per line: a cache line more than its tiles, so that strips do not compete for the same sets.
inline constexpr int64_t kStripStride = kTilesDepth + kTileDepth / kTileLines;
inline constexpr int64_t kStripElements = kTileLines * kStripStride;

GK_ALWAYS_INLINE int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }

GK_ALWAYS_INLINE vi load_elements(const bfloat16* p, int64_t n) {  // the first n <= kTileDepth; the others are zero
  if (n >= kTileDepth) return load_bytes(p);
  return reinterpret_cast<vi>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

// x[i] = elements p .. p + kTileDepth of line i: a's form.
GK_ALWAYS_INLINE void read_along(const Lines<bfloat16>& in, int64_t line, int64_t lines, int64_t p, int64_t depth,
                                 vf (&x)[kTileLines]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileLines; ++i)
    x[i] = line + i < lines ? as_float(load_elements(in(line + i) + p, depth - p)) : zero();
}

// 16 elements and 16 more, the first of each beside each other and so on.
GK_ALWAYS_INLINE vf pair_elements(__m512i x) {
  using bits = uint16_t __attribute__((vector_size(64)));
  const bits pairs = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<vf>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(pairs), x));
}

// The same of what `across` holds by element: x[i] = elements p + 2i and p + 2i + 1 of all lines, in pairs: b's form.
GK_ALWAYS_INLINE void read_across(const Lines<bfloat16>& across, int64_t line, int64_t lines, int64_t p, int64_t depth,
                                  vf (&x)[kTileLines]) {
  const auto pair = [&](__m256i even, __m256i odd) __attribute__((always_inline)) {
    return pair_elements(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1));
  };
  if (lines - line >= kTileLines && depth - p >= kTileDepth) {
    const auto row = [&](int64_t j) __attribute__((always_inline)) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(across(p + j) + line));
    };
#pragma GCC unroll 16
    for (int i = 0; i < kTileLines; ++i) x[i] = pair(row(2 * i), row(2 * i + 1));
    return;
  }
  const __mmask16 inside = lines - line < kTileLines ? (1u << (lines - line)) - 1 : 0xffffu;
  const auto row = [&](int64_t j) __attribute__((always_inline)) {
    return p + j < depth ? _mm256_maskz_loadu_epi16(inside, across(p + j) + line) : _mm256_setzero_si256();
  };
#pragma GCC unroll 16
  for (int i = 0; i < kTileLines; ++i) x[i] = pair(row(2 * i), row(2 * i + 1));
}

GK_ALWAYS_INLINE void store_form(bfloat16* tile, const vf (&x)[kTileLines]) {
#pragma GCC unroll 16
  for (int i = 0; i < kTileLines; ++i) store(reinterpret_cast<float*>(tile) + i * kLanes, x[i]);
}

// A panel from `lines` lines of `depth` elements, in b's form or in a's. Memory is read in the order in which it lies.
template <bool kPairs>
void pack_tiles(const Lines<bfloat16>& along, const Lines<bfloat16>& across, int64_t lines, int64_t depth,
                bfloat16* panel) {
  const auto tile = [&](int64_t line, int64_t p) { return panel + line * kStripStride + p * kTileLines; };
  if (across.dense() && !along.dense()) {
    for (int64_t p = 0; p < depth; p += kTileDepth)
      for (int64_t line = 0; line < lines; line += kTileLines) {
        vf x[kTileLines];
        read_across(across, line, lines, p, depth, x);
        if constexpr (!kPairs) transpose(x);
        store_form(tile(line, p), x);
      }
    return;
  }
  for (int64_t line = 0; line < lines; line += kTileLines)
    for (int64_t p = 0; p < depth; p += kTileDepth) {
      vf x[kTileLines];
      if (along.dense()) {
        read_along(along, line, lines, p, depth, x);
      } else {
        alignas(64) bfloat16 some[kTileLines][kTileDepth] = {};
        for (int64_t i = 0; i < kTileLines && line + i < lines; ++i)
          for (int64_t j = 0; j < kTileDepth && p + j < depth; ++j) some[i][j] = *along.at(line + i, p + j);
        for (int i = 0; i < kTileLines; ++i) x[i] = as_float(load_bytes(some[i]));
      }
      if constexpr (kPairs) transpose(x);
      store_form(tile(line, p), x);
    }
}

// One tile of c, or the part (rows, cols) of it that there is, from and to memory.
template <int kTile>
GK_ALWAYS_INLINE void tile_begin(const float* c, int64_t ldc, int64_t rows, int64_t cols, bool accumulate) {
  if (!accumulate) {
    tile_zero<kTile>();
  } else if (rows >= kTileLines && cols >= kTileLines) {
    tile_load<kTile>(c, ldc * 4);
  } else {
    alignas(64) float part[kTileLines][kTileLines] = {};
    for (int64_t i = 0; i < kTileLines && i < rows; ++i)
      store(part[i], load_n(c + i * ldc, static_cast<int>(cols < kTileLines ? cols : kTileLines)));
    tile_load<kTile>(part, sizeof(part[0]));
  }
}
template <int kTile>
GK_ALWAYS_INLINE void tile_end(float* c, int64_t ldc, int64_t rows, int64_t cols) {
  if (rows >= kTileLines && cols >= kTileLines) return tile_store<kTile>(c, ldc * 4);
  alignas(64) float part[kTileLines][kTileLines];
  tile_store<kTile>(part, sizeof(part[0]));
  for (int64_t i = 0; i < kTileLines && i < rows; ++i)
    store_n(c + i * ldc, load(part[i]), static_cast<int>(cols < kTileLines ? cols : kTileLines));
}

// c = or += kA strips of a times kB strips of b, while the next c comes nearer.
template <int kA, int kB>
void multiply_strips(int64_t rows, int64_t cols, int64_t depth, const bfloat16* a, const bfloat16* b, float* c,
                     int64_t ldc, bool accumulate, const float* next) {
  constexpr int64_t kRight = kTileLines;
  const int64_t down = kTileLines * ldc;
  tile_begin<0>(c, ldc, rows, cols, accumulate);
  if constexpr (kB == 2) tile_begin<1>(c + kRight, ldc, rows, cols - kRight, accumulate);
  if constexpr (kA == 2) tile_begin<2>(c + down, ldc, rows - kTileLines, cols, accumulate);
  if constexpr (kA == 2 && kB == 2) tile_begin<3>(c + down + kRight, ldc, rows - kTileLines, cols - kRight, accumulate);
  for (int64_t p = 0; p < depth; p += kTileDepth, a += kTileElements, b += kTileElements) {
    tile_load<4>(a, 64);
    tile_load<6>(b, 64);
    tile_dot<0, 4, 6>();
    if constexpr (kB == 2) {
      tile_load<7>(b + kStripElements, 64);
      tile_dot<1, 4, 7>();
    }
    if constexpr (kA == 2) {
      tile_load<5>(a + kStripElements, 64);
      tile_dot<2, 5, 6>();
    }
    if constexpr (kA == 2 && kB == 2) tile_dot<3, 5, 7>();
    for (int i = 0; i < kTileLines / 4; ++i, next += ldc) {
      __builtin_prefetch(next, 1);
      if constexpr (kB == 2) __builtin_prefetch(next + kRight, 1);
    }
  }
  tile_end<0>(c, ldc, rows, cols);
  if constexpr (kB == 2) tile_end<1>(c + kRight, ldc, rows, cols - kRight);
  if constexpr (kA == 2) tile_end<2>(c + down, ldc, rows - kTileLines, cols);
  if constexpr (kA == 2 && kB == 2) tile_end<3>(c + down + kRight, ldc, rows - kTileLines, cols - kRight);
}

}  // namespace detail

// a (rows, depth), depth <= kTilesDepth.
inline void pack_a(const Strided<bfloat16>& a, int64_t rows, int64_t depth, bfloat16* panel) {
  detail::pack_tiles<false>(detail::lines_of(a), detail::lines_of(a.transposed()), rows, depth, panel);
}

// b (depth, cols), depth <= kTilesDepth.
inline void pack_b(const Strided<bfloat16>& b, int64_t depth, int64_t cols, bfloat16* panel) {
  detail::pack_tiles<true>(detail::lines_of(b.transposed()), detail::lines_of(b), cols, depth, panel);
}

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

// A tile of c^T from and to c, of which there are `rows` rows.
template <int kTile>
GK_ALWAYS_INLINE void transposed_begin(const float* c, int64_t ldc, int64_t rows, bool accumulate) {
  if (!accumulate) return tile_zero<kTile>();
  vf x[kTileLines] = {};
  for (int64_t i = 0; i < kTileLines && i < rows; ++i) x[i] = load(c + i * ldc);
  transpose(x);
  alignas(64) float tile[kTileLines][kTileLines];
  for (int i = 0; i < kTileLines; ++i) store(tile[i], x[i]);
  tile_load<kTile>(tile, sizeof(tile[0]));
}
template <int kTile>
GK_ALWAYS_INLINE void transposed_end(float* c, int64_t ldc, int64_t rows) {
  alignas(64) float tile[kTileLines][kTileLines];
  tile_store<kTile>(tile, sizeof(tile[0]));
  vf x[kTileLines];
  for (int i = 0; i < kTileLines; ++i) x[i] = load(tile[i]);
  transpose(x);
  for (int64_t i = 0; i < kTileLines && i < rows; ++i) store(c + i * ldc, x[i]);
}

// Two strips of columns of c, kStrips strips of rows: c^T (32, rows) = or += b^T a^T over `depth`, tiles of b^T read
// where they lie, columns of b `col` apart. The first to read b asks for what comes next kAhead elements ahead: along
// the sum, then in the next columns.
template <int kStrips>
void multiply_transposed(int64_t rows, int64_t depth, const bfloat16* a, int64_t a_panel, const bfloat16* b,
                         int64_t col, float* c, int64_t ldc, bool accumulate, bool first) {
  constexpr int64_t kAhead = 16 * kTileDepth, kRight = kTileLines;
  const int64_t down = kTileLines * ldc;
  transposed_begin<0>(c, ldc, rows, accumulate);
  transposed_begin<1>(c + kRight, ldc, rows, accumulate);
  if constexpr (kStrips == 2) transposed_begin<2>(c + down, ldc, rows - kTileLines, accumulate);
  if constexpr (kStrips == 2) transposed_begin<3>(c + down + kRight, ldc, rows - kTileLines, accumulate);
  for (int64_t p = 0; p < depth; p += kTileDepth) {
    const bfloat16* right = a + p / kTilesDepth * a_panel + p % kTilesDepth * kTileLines;
    tile_load<4>(b + p, col * 2);
    tile_load<5>(b + kRight * col + p, col * 2);
    tile_load<6>(right, 64);
    tile_dot<0, 4, 6>();
    tile_dot<1, 5, 6>();
    if constexpr (kStrips == 2) {
      tile_load<7>(right + kStripElements, 64);
      tile_dot<2, 4, 7>();
      tile_dot<3, 5, 7>();
    }
    if (!first) continue;
    const bfloat16* next = b + (p + kAhead < depth ? p + kAhead : 2 * kRight * col + (p + kAhead - depth));
    for (int i = 0; i < 2 * kTileLines; ++i) __builtin_prefetch(next + i * col, 0, 2);
  }
  transposed_end<0>(c, ldc, rows);
  transposed_end<1>(c + kRight, ldc, rows);
  if constexpr (kStrips == 2) transposed_end<2>(c + down, ldc, rows - kTileLines);
  if constexpr (kStrips == 2) transposed_end<3>(c + down + kRight, ldc, rows - kTileLines);
}

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

// Columns of b, dense along the sum, as a panel in a's form. What lies `ahead` further is asked for.
inline void copy_columns(const Strided<bfloat16>& b, int64_t depth, int64_t cols, bfloat16* panel, int64_t ahead) {
  const Lines<bfloat16> columns = lines_of(b.transposed());
  for (int64_t line = 0; line < cols; line += kTileLines)
    for (int64_t p = 0; p < depth; p += kTileDepth) {
      vf x[kTileLines];
      read_along(columns, line, cols, p, depth, x);
      for (int64_t i = line; i < cols && i < line + kTileLines; ++i) __builtin_prefetch(columns(i) + p + ahead, 0, 2);
      store_form(panel + line * kStripStride + p * kTileLines, x);
    }
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
