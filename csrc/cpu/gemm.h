// Matrix products for CPU kernels: c (m, n) float32 = a (m, k) times b (k, n), one thread per call.
//
// a and b are float, bfloat16 or float16 with any strides, their rows or columns gathered if the caller likes. Where
// the processor multiplies bfloat16 itself two of them go through panels of their own: gemm_bfloat16.h. Else a register
// tile of c runs along the sum. One operand gives it vectors, from a panel that stays in the first-level cache; the
// other single numbers, to be broadcast, from lines that lie dense along the sum: float32 is read where it lies, all
// else widened into a copy. Which is which depends on b:
//
//   rows dense, or nothing:   vectors of b, numbers of a    c grows where it lies
//   columns dense (weights):  vectors of a, numbers of b    c^T grows, kTurned of its rows at a time
//
// so that a large b is never turned round while it is copied, and dense columns are not copied at all. The form of the
// loops is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
//
// Every element of c is summed in the order of k, in runs of kRun, whatever m and n are. Only for a few rows
// (kStreamRows: decoding) and dense columns of b are there dot products instead, which read at the speed of memory;
// their sums differ in the last bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/loops.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/products.h"
#include "cpu/simd.h"
#include "cpu/strided.h"
#if defined(GK_SIMD_BFLOAT16)
#include "cpu/gemm_bfloat16.h"
#endif

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// The register tile: beside its sums there is room for the vectors and a broadcast number. Where vectors are fewer, it
// has kNarrowRows.
#if defined(GK_SIMD_AVX512)
inline constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(GK_SIMD_AVX2)
inline constexpr int kTileRows = 6, kTileVectors = 2;
#else
inline constexpr int kTileRows = 4, kTileVectors = 2;
#endif
inline constexpr int kNarrowRows = 8;
inline constexpr int kTileCols = kTileVectors * kLanes;
// Products that a register sums before it is added to c. Short runs keep the error of float32 sums below that of one
// long chain.
inline constexpr int64_t kRun = 64;
inline constexpr int64_t kDepth = 128;      // of a panel: kTileCols * kDepth floats fit the first-level cache
inline constexpr int64_t kBlockRows = 256;  // of a that are packed at once
inline constexpr int64_t kBlockCols = 256;  // of b that are packed at once: 128 KB of the second-level cache
inline constexpr int64_t kTurned = 48;      // columns of b that all rows of a meet before their c^T is turned round
inline constexpr int kStreamRows = 4;       // up to so many rows of a, b is streamed where its columns are dense
inline constexpr int64_t kPackedFloats = 4 * kBlockRows * kDepth;  // of a: 512 KB of the second-level cache
static_assert(kBlockRows % kTileCols == 0 && kBlockCols % kTileCols == 0);
static_assert(kTurned % kTileRows == 0 && kTurned % kNarrowRows == 0 && kTurned % kLanes == 0);
static_assert(kDepth % kLanes == 0 && kDepth % kRun == 0);

namespace detail {

// c (kRows, cols) = or += kRows lines of a times b (depth, kVectors * kLanes); cols <= kVectors * kLanes. Elements of a
// that lie `ahead` further are asked for.
template <int kVectors, int kRows>
void tile(int64_t depth, const Lines<float>& a, int64_t first, const float* b, float* c, int64_t ldc, int64_t cols,
          bool accumulate, int64_t ahead) {
  constexpr int64_t kLine = 64 / sizeof(float);  // elements of a cache line
  const float* line[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) line[r] = a(first + r);
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    const int64_t end = begin + kRun < depth ? begin + kRun : depth;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int64_t p = 0; p < kRun; p += kLine) __builtin_prefetch(line[r] + begin + p + ahead, 0, 2);
    vf sum[kRows][kVectors] = {};
    for (int64_t p = begin; p < end; ++p) {
      vf column[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) column[v] = load(b + p * (kVectors * kLanes) + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const vf x = set1(line[r][p]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* out = c + r * ldc + v * kLanes;
        const int64_t left = cols - v * kLanes;
        if (left >= kLanes) {
          store(out, accumulate ? load(out) + sum[r][v] : sum[r][v]);
        } else if (left > 0) {
          const int n = static_cast<int>(left);
          store_n(out, accumulate ? load_n(out, n) + sum[r][v] : sum[r][v], n);
        }
      }
    accumulate = true;
  }
}

template <int kVectors, int kRows>
void tile_of(int64_t rows, int64_t depth, const Lines<float>& a, int64_t first, const float* b, float* c, int64_t ldc,
             int64_t cols, bool accumulate, int64_t ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kVectors, kRows - 1>(rows, depth, a, first, b, c, ldc, cols, accumulate, ahead);
  }
  tile<kVectors, kRows>(depth, a, first, b, c, ldc, cols, accumulate, ahead);
}

// Of a panel with `cols` columns, kTileCols at most.
GK_ALWAYS_INLINE int64_t panel_width(int64_t cols) {
  return cols >= kTileCols ? kTileCols : (cols + kLanes - 1) / kLanes * kLanes;
}

// c (rows, cols) = or += the first rows of a times a panel of b, panel_width(cols) wide.
template <int kVectors = kTileVectors>
void multiply_panel(int64_t rows, int64_t cols, int64_t depth, const Lines<float>& a, const float* b, float* c,
                    int64_t ldc, bool accumulate, int64_t ahead) {
  if constexpr (kVectors > 1) {
    if (cols <= (kVectors - 1) * kLanes)
      return multiply_panel<kVectors - 1>(rows, cols, depth, a, b, c, ldc, accumulate, ahead);
  }
  constexpr int kRows = kVectors == kTileVectors ? kTileRows : kNarrowRows;
  for (int64_t i = 0; i < rows; i += kRows)
    tile_of<kVectors, kRows>(rows - i, depth, a, i, b, c + i * ldc, ldc, cols, accumulate, ahead);
}

// Whether rows of x can be broadcast from where they lie.
template <typename T>
bool lies_in_place(const Strided<T>& x) {
  return std::is_same_v<T, float> && lines_of(x).dense();
}

// The rows of x from element p on; `copy` has them, kDepth apart, if they cannot be read where they lie.
template <typename T>
Lines<float> rows_from(const Strided<T>& x, int64_t p, const float* copy) {
  if constexpr (std::is_same_v<T, float>)
    if (lies_in_place(x)) return {x.data + p, x.row, 1, x.rows, nullptr};
  return {copy, kDepth, 1, nullptr, nullptr};
}

// Rows of x, `depth` elements of each, kDepth floats apart.
template <typename T>
void pack_rows(const Strided<T>& x, int64_t rows, int64_t depth, float* out) {
  pack(x, rows, depth, (depth + kLanes - 1) / kLanes * kLanes, out, kDepth);
}

// b (depth, cols) as panels of kTileCols columns, the last one narrower, kTileCols * kDepth floats apart.
template <typename T>
void pack_panels(const Strided<T>& b, int64_t depth, int64_t cols, float* panels) {
  constexpr int64_t kAhead = 8;  // rows
  const Lines<T> rows = lines_of(b);
  if (!rows.dense()) {
    for (int64_t j = 0; j < cols; j += kTileCols) {
      const int64_t width = panel_width(cols - j);
      pack(b.from(0, j), depth, cols - j < width ? cols - j : width, width, panels + j * kDepth, width);
    }
    return;
  }
  for (int64_t p = 0; p < depth; ++p) {  // along the rows of b, as far as they are wanted
    const T* row = rows(p);
    const T* later = rows(p + kAhead < depth ? p + kAhead : depth - 1);
    for (int64_t j = 0; j < cols; j += kTileCols) {
      const int64_t width = panel_width(cols - j);
      float* out = panels + j * kDepth + p * width;
      ask_ahead(later + j, kTileCols * static_cast<int64_t>(sizeof(T)), 0);
      int64_t v = 0;
      for (; v < width && j + v + kLanes <= cols; v += kLanes) store(out + v, load(row + j + v));
      if (v < width) store(out + v, load_n(row + j + v, static_cast<int>(cols - j - v)));
    }
  }
}

// c (kRows, n) = or += a (kRows, k) times b, whose columns lie dense in memory: dot products, column after column, so
// that b is read once, in the order of memory, and never copied. Rows of a are a_stride apart, zero up to it.
template <typename P, int kRows, typename T>
void stream(int64_t n, int64_t k, const typename P::Other* a, int64_t a_stride, const Strided<T>& b, float* c,
            int64_t ldc, bool accumulate) {
  constexpr int kChains = 4;  // of sums per row, to hide the latency of the multiply-add
  for (int64_t j = 0; j < n; ++j) {
    const T* column = b.data + j * b.col;
    vf sum[kRows][kChains] = {};
    int64_t p = 0;
    for (; p + kChains * P::kStep <= k; p += kChains * P::kStep) {
      if constexpr (P::kAskAhead > 0)
        ask_ahead(column + p, kChains * P::kStep * static_cast<int64_t>(sizeof(T)), P::kAskAhead);
#pragma GCC unroll 8
      for (int v = 0; v < kChains; ++v) {
        const vf x = P::first(column + p + v * P::kStep);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] = P::add(x, P::other(a + r * a_stride + p + v * P::kStep), sum[r][v]);
      }
    }
    for (; p < k; p += P::kStep) {
      const vf x = P::first(column + p, k - p);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][0] = P::add(x, P::other(a + r * a_stride + p), sum[r][0]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float dot = reduce_add((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
      float* out = c + r * ldc + j;
      *out = accumulate ? *out + dot : dot;
    }
  }
}

template <typename P, int kRows, typename T>
void stream_of(int64_t rows, int64_t n, int64_t k, const typename P::Other* a, int64_t a_stride, const Strided<T>& b,
               float* c, int64_t ldc, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return stream_of<P, kRows - 1>(rows, n, k, a, a_stride, b, c, ldc, accumulate);
  }
  stream<P, kRows>(n, k, a, a_stride, b, c, ldc, accumulate);
}

// Rows of a as `stream` takes them.
template <typename T>
void pack_streamed(const Strided<T>& a, int64_t rows, int64_t k, int64_t padded, float* out) {
  pack(a, rows, k, padded, out, padded);
}
inline void pack_streamed(const Strided<bfloat16>& a, int64_t rows, int64_t k, int64_t padded, bfloat16* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < padded; ++p) out[i * padded + p] = p < k ? *lines_of(a).at(i, p) : bfloat16{};
}

// c[i] (m, n) = or += a times b[i], c[i] where it lies: vectors of b, numbers of a.
template <int kProducts, typename TA, typename TB>
void multiply_rows(int64_t m, int64_t n, int64_t k, const Strided<TA>& a, const Strided<TB> (&b)[kProducts],
                   float* const (&c)[kProducts], int64_t ldc, bool accumulate) {
  float* copy = scratch<float>(kScratchA, kPackedFloats);
  float* panels = scratch<float>(kScratchB, kBlockCols * kDepth);
  const bool in_place = lies_in_place(a);
  const int64_t most = in_place ? m : kBlockRows;
  for (int64_t i = 0; i < m; i += most) {
    const int64_t rows = m - i < most ? m - i : most;
    const Strided<TA> block = a.from(i, 0);
    const int64_t span = in_place ? k : kPackedFloats / (rows * kDepth) * kDepth;
    for (int64_t begin = 0; begin < k; begin += span) {
      const int64_t end = begin + span < k ? begin + span : k;
      const auto depth_at = [&](int64_t p) { return end - p < kDepth ? end - p : kDepth; };
      for (int64_t p = begin; p < end && !in_place; p += kDepth)
        pack_rows(block.from(0, p), rows, depth_at(p), copy + (p - begin) * rows);
      for (int x = 0; x < kProducts; ++x)
        for (int64_t first = 0; first < n; first += kBlockCols) {
          const int64_t cols = n - first < kBlockCols ? n - first : kBlockCols;
          for (int64_t p = begin; p < end; p += kDepth) {
            const Lines<float> numbers = rows_from(block, p, copy + (p - begin) * rows);
            pack_panels(b[x].from(p, first), depth_at(p), cols, panels);
            for (int64_t j = 0; j < cols; j += kTileCols)
              multiply_panel(rows, cols - j < kTileCols ? cols - j : kTileCols, depth_at(p), numbers,
                             panels + j * kDepth, c[x] + i * ldc + first + j, ldc, accumulate || p > 0, kDepth);
          }
        }
    }
  }
}

// c[i] (m, n) = or += a times b[i], whose columns are dense along the sum: c^T, vectors of a, numbers of b.
template <int kProducts, typename TA, typename TB>
void multiply_columns(int64_t m, int64_t n, int64_t k, const Strided<TA>& a, const Strided<TB> (&b)[kProducts],
                      float* const (&c)[kProducts], int64_t ldc, bool accumulate) {
  constexpr int64_t kTurnedStride = kBlockRows + kLanes;
  float* panels = scratch<float>(kScratchA, kPackedFloats);
  float* turned = scratch<float>(kScratchB, kTurned * (kTurnedStride + kDepth));
  float* copy = turned + kTurned * kTurnedStride;
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const int64_t rows = m - i < kBlockRows ? m - i : kBlockRows, lanes = (rows + kLanes - 1) / kLanes * kLanes;
    const int64_t packed = (rows + kTileCols - 1) / kTileCols * kTileCols;
    const int64_t span = kPackedFloats / (packed * kDepth) * kDepth;
    for (int64_t begin = 0; begin < k; begin += span) {
      const int64_t end = begin + span < k ? begin + span : k;
      const auto depth_at = [&](int64_t p) { return end - p < kDepth ? end - p : kDepth; };
      for (int64_t p = begin; p < end; p += kDepth)
        pack_panels(a.from(i, p).transposed(), depth_at(p), rows, panels + (p - begin) * packed);
      const bool begun = accumulate || begin > 0;
      for (int x = 0; x < kProducts; ++x)
        for (int64_t j = 0; j < n; j += kTurned) {
          const int64_t cols = n - j < kTurned ? n - j : kTurned;
          const Strided<TB> block = b[x].from(0, j).transposed();
          float* out = c[x] + i * ldc + j;
          if (begun)
            transpose_lines(Lines<float>{out, ldc, 1, nullptr, nullptr}, rows, cols, lanes, turned, kTurnedStride);
          for (int64_t p = begin; p < end; p += kDepth) {
            if (!lies_in_place(block)) pack_rows(block.from(0, p), cols, depth_at(p), copy);
            const Lines<float> numbers = rows_from(block, p, copy);
            // What is wanted next: further on in these columns, or the next ones from the beginning.
            const int64_t ahead = p + kDepth < end ? kDepth : kTurned * block.row - (p - begin);
            for (int64_t line = 0; line < lanes; line += kTileCols)
              multiply_panel(cols, lanes - line < kTileCols ? lanes - line : kTileCols, depth_at(p), numbers,
                             panels + (p - begin) * packed + line * kDepth, turned + line, kTurnedStride,
                             begun || p > begin, ahead);
          }
          turn_back(rows, cols, turned, kTurnedStride, out, ldc);
        }
    }
  }
}

}  // namespace detail

// Rows of a up to which columns of b are streamed.
template <typename TA, typename TB>
inline constexpr int kMostStreamed = kStreamRows;
#if defined(GK_SIMD_BFLOAT16)
template <>
inline constexpr int kMostStreamed<bfloat16, bfloat16> = kStripsStreamed;
#endif

// c[i] (m, n), rows ldc apart, = or += a (m, k) times b[i] (k, n): kProducts products that read and pack a once.
template <int kProducts, typename TA, typename TB>
void gemm_shared(int64_t m, int64_t n, int64_t k, const Strided<TA>& a, const Strided<TB> (&b)[kProducts],
                 float* const (&c)[kProducts], int64_t ldc, bool accumulate) {
  if (k <= 0 && !accumulate) {
    for (float* out : c)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) out[i * ldc + j] = 0.0f;
  }
  if (m <= 0 || n <= 0 || k <= 0) return;
  bool columns_dense = true;
  for (const Strided<TB>& x : b) columns_dense = columns_dense && x.row == 1 && x.rows == nullptr && x.cols == nullptr;
  using P = Products<TA, TB>;
  const int64_t padded = (k + P::kStep - 1) / P::kStep * P::kStep;
  if (columns_dense && m <= kMostStreamed<TA, TB> && m * padded <= kPackedFloats) {
    auto* rows = scratch<typename P::Other>(detail::kScratchA, kPackedFloats);
    detail::pack_streamed(a, m, k, padded, rows);
    for (int x = 0; x < kProducts; ++x)
      detail::stream_of<P, kMostStreamed<TA, TB>>(m, n, k, rows, padded, b[x], c[x], ldc, accumulate);
    return;
  }
#if defined(GK_SIMD_BFLOAT16)
  if constexpr (kOnTiles<TA, TB>) return detail::gemm_on_tiles(m, n, k, a, b, columns_dense, c, ldc, accumulate);
#endif
  if (columns_dense)
    detail::multiply_columns(m, n, k, a, b, c, ldc, accumulate);
  else
    detail::multiply_rows(m, n, k, a, b, c, ldc, accumulate);
}

// c (m, n), rows ldc apart, = or += a (m, k) times b (k, n).
template <typename TA, typename TB>
void gemm(int64_t m, int64_t n, int64_t k, const Strided<TA>& a, const Strided<TB>& b, float* c, int64_t ldc,
          bool accumulate) {
  gemm_shared<1, TA, TB>(m, n, k, a, {b}, {c}, ldc, accumulate);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
