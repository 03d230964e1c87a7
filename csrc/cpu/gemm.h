// Matrix products for CPU kernels: c (m, n) float32 = a (m, k) times b (k, n), one thread per call.
//
// a and b are float, bfloat16 or float16 with any strides, their rows or columns gathered if the caller likes. At level
// amx two bfloat16 go through the matrix unit in panels of their own: gemm_amx.h. Else both are widened to float32 and
// laid out in panels that stay in the caches; a register tile of c, kTileRows by kTileCols, then runs down a panel with
// one fused multiply-add per lane and product. Widening beats the bfloat16 dot instruction on machines without matrix
// units. The form of the loops is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
// (2008); one thing differs: rows of a stay rows, since the tile only ever broadcasts them.
//
// Every element of c is summed in the order of k, in runs of kRun, whatever m and n are. Only for a few rows
// (kStreamRows: decoding) and dense columns of b are there dot products instead, which copy nothing and read at the
// speed of memory; their sums differ in the last bits.
#pragma once

#include <cstdint>

#include "cpu/loops.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"
#include "cpu/strided.h"
#include "cpu/transpose.h"
#if defined(GK_SIMD_AMX)
#include "cpu/gemm_amx.h"
#endif

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// The register tile: with one vector of b per column and one broadcast, it leaves a register or two free.
#if defined(GK_SIMD_AVX512)
inline constexpr int kTileRows = 6, kTileVectors = 4;
#elif defined(GK_SIMD_AVX2)
inline constexpr int kTileRows = 6, kTileVectors = 2;
#else
inline constexpr int kTileRows = 4, kTileVectors = 2;
#endif
inline constexpr int kTileCols = kTileVectors * kLanes;
// Products that a register sums before it is added to c. Short runs keep the error of float32 sums below that of one
// long chain, and cost nothing that could be measured down to 16 while c is in the cache.
inline constexpr int64_t kRun = 16;
inline constexpr int64_t kDepth = 128;      // of a panel: kTileCols * kDepth floats of b fit the first-level cache
inline constexpr int64_t kBlockRows = 192;  // of a that are packed at once, a multiple of kTileRows
inline constexpr int kStreamRows = 4;       // up to so many rows of a, b is streamed where its columns are dense
inline constexpr int64_t kPackedFloats = 4 * kBlockRows * kDepth;  // of a: 384 KB of the second-level cache
static_assert(kBlockRows % kTileRows == 0 && kDepth % kLanes == 0 && kDepth % kRun == 0);

namespace detail {

// out[i][j] = line i, element j, in float32; zero for length <= j < padded. padded is a multiple of kLanes.
template <typename T>
void copy_lines(const Lines<T>& in, int64_t lines, int64_t length, int64_t padded, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < lines; ++i) {
    const T* line = in(i);
    float* o = out + i * out_stride;
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) store(o + j, load(line + j));
    for (; j < padded; j += kLanes) store(o + j, load_n(line + j, j < length ? static_cast<int>(length - j) : 0));
  }
}

// Elements that one load takes from a line, as 32-bit words, and what becomes of a vector of such words, one from
// each line: as many vectors of float32.
template <typename T>
inline constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
GK_ALWAYS_INLINE void widen_words(vf words, vf (&x)[1], float) { x[0] = words; }
GK_ALWAYS_INLINE void widen_words(vf words, vf (&x)[2], bfloat16) {
  x[0] = as_float(as_int(words) << 16);
  x[1] = as_float(as_int(words) & ~0xffff);
}
GK_ALWAYS_INLINE void widen_words(vf words, vf (&x)[2], float16) {
  x[0] = widen(__builtin_convertvector(as_unsigned(words), vu16), float16{});
  x[1] = widen(__builtin_convertvector(as_unsigned(words) >> 16, vu16), float16{});
}

// out[j][i] = line i, element j, in float32; zero for lines <= i < padded. padded is a multiple of kLanes.
template <typename T>
void transpose_lines(const Lines<T>& in, int64_t lines, int64_t length, int64_t padded, float* out,
                     int64_t out_stride) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    const T* line[kLanes] = {};
    const int inside = lines - i >= kLanes ? kLanes : lines > i ? static_cast<int>(lines - i) : 0;
    for (int u = 0; u < inside; ++u) line[u] = in(i + u);
    vf x[kLanes];
    int64_t j = 0;
    if (inside == kLanes) {
      // Narrow elements are transposed in pairs and widened afterwards: half the exchanges, and whole cache lines.
      constexpr int kStep = kLanes * kPerWord<T>;
      for (; j + kStep <= length; j += kStep) {
#pragma GCC unroll 16
        for (int u = 0; u < kLanes; ++u) {
          x[u] = as_float(load_bytes(line[u] + j));
        }
        transpose(x);
#pragma GCC unroll 16
        for (int u = 0; u < kLanes; ++u) {
          vf wide[kPerWord<T>];
          widen_words(x[u], wide, T{});
          for (int v = 0; v < kPerWord<T>; ++v) store(out + (j + u * kPerWord<T> + v) * out_stride + i, wide[v]);
        }
      }
    }
    for (; j < length; j += kLanes) {
      const int n = length - j < kLanes ? static_cast<int>(length - j) : kLanes;
      for (int u = 0; u < kLanes; ++u) x[u] = u < inside ? load_n(line[u] + j, n) : zero();
      transpose(x);
      for (int u = 0; u < n; ++u) store(out + (j + u) * out_stride + i, x[u]);
    }
  }
}

// out[i][j] = line i, element j where elements do not lie side by side in either direction.
template <typename T>
void gather_lines(const Lines<T>& in, int64_t lines, int64_t length, int64_t padded, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < padded; ++j) out[i * out_stride + j] = j < length ? to_float(*in.at(i, j)) : 0.0f;
}

// Rows of x as rows of out, widened; columns cols .. padded are zero (those of the last kLanes in a transposed copy
// too). out_stride and padded are multiples of kLanes.
template <typename T>
void pack(const Strided<T>& x, int64_t rows, int64_t cols, int64_t padded, float* out, int64_t out_stride) {
  const Lines<T> by_row = lines_of(x), by_column = lines_of(x.transposed());
  if (by_row.dense())
    copy_lines(by_row, rows, cols, padded, out, out_stride);
  else if (by_column.dense())
    transpose_lines(by_column, cols, rows, padded, out, out_stride);
  else
    gather_lines(by_row, rows, cols, padded, out, out_stride);
}

// c (kRows, cols) = or += a (kRows, depth), rows kDepth apart, times b (depth, kTileCols). cols <= kTileCols.
template <int kRows>
void tile(int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols, bool accumulate) {
  for (int64_t begin = 0; begin < depth; begin += kRun) {
    const int64_t end = begin + kRun < depth ? begin + kRun : depth;
    vf sum[kRows][kTileVectors] = {};
    for (int64_t p = begin; p < end; ++p) {
      vf column[kTileVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) column[v] = load(b + p * kTileCols + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const vf x = set1(a[r * kDepth + p]);
#pragma GCC unroll 8
        for (int v = 0; v < kTileVectors; ++v) sum[r][v] = fma(x, column[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) {
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

template <int kRows = kTileRows>
void tile_of(int64_t rows, int64_t depth, const float* a, const float* b, float* c, int64_t ldc, int64_t cols,
             bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_of<kRows - 1>(rows, depth, a, b, c, ldc, cols, accumulate);
  }
  tile<kRows>(depth, a, b, c, ldc, cols, accumulate);
}

// c (kRows, n) = or += a (kRows, k) times b, whose columns lie dense in memory: dot products, column after column, so
// that b is read once, in the order of memory, and never copied. a is float32, rows a_stride apart, zero up to it.
template <int kRows, typename T>
void stream(int64_t n, int64_t k, const float* a, int64_t a_stride, const Strided<T>& b, float* c, int64_t ldc,
            bool accumulate) {
  constexpr int kChains = 4;  // of sums per row, to hide the latency of the fused multiply-add
  for (int64_t j = 0; j < n; ++j) {
    const T* column = b.data + j * b.col;
    vf sum[kRows][kChains] = {};
    int64_t p = 0;
    for (; p + kChains * kLanes <= k; p += kChains * kLanes) {
      ask_ahead(column + p, kChains * kLanes * static_cast<int64_t>(sizeof(T)), 4096);
#pragma GCC unroll 8
      for (int v = 0; v < kChains; ++v) {
        const vf y = load(column + p + v * kLanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] = fma(load(a + r * a_stride + p + v * kLanes), y, sum[r][v]);
      }
    }
    for (; p < k; p += kLanes) {
      const vf y = load_n(column + p, k - p < kLanes ? static_cast<int>(k - p) : kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][0] = fma(load(a + r * a_stride + p), y, sum[r][0]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const float dot = reduce_add((sum[r][0] + sum[r][1]) + (sum[r][2] + sum[r][3]));
      float* out = c + r * ldc + j;
      *out = accumulate ? *out + dot : dot;
    }
  }
}

template <typename T, int kRows = kStreamRows>
void stream_of(int64_t rows, int64_t n, int64_t k, const float* a, int64_t a_stride, const Strided<T>& b, float* c,
               int64_t ldc, bool accumulate) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return stream_of<T, kRows - 1>(rows, n, k, a, a_stride, b, c, ldc, accumulate);
  }
  stream<kRows>(n, k, a, a_stride, b, c, ldc, accumulate);
}

}  // namespace detail

// The panels, for callers that multiply one of them many times. depth <= kDepth.

// a (rows, depth) in float32, its rows kDepth floats apart.
template <typename T>
void pack_a(const Strided<T>& a, int64_t rows, int64_t depth, float* panel) {
  detail::pack(a, rows, depth, (depth + kLanes - 1) / kLanes * kLanes, panel, kDepth);
}

// b (depth, cols), cols <= kTileCols, in float32: depth rows of kTileCols floats, zero beyond cols.
template <typename T>
void pack_b(const Strided<T>& b, int64_t depth, int64_t cols, float* panel) {
  detail::pack(b, depth, cols, kTileCols, panel, kTileCols);
}

// c (rows, cols) = or += panel of a times panel of b.
inline void multiply_panels(int64_t rows, int64_t cols, int64_t depth, const float* a, const float* b, float* c,
                            int64_t ldc, bool accumulate) {
  for (int64_t i = 0; i < rows; i += kTileRows)
    detail::tile_of(rows - i, depth, a + i * kDepth, b, c + i * ldc, ldc, cols, accumulate);
}

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
  float* panel_a = scratch<float>(detail::kScratchA, kPackedFloats);
  const int64_t padded = (k + kLanes - 1) / kLanes * kLanes;
  constexpr int kMostStreamed = kOnTiles<TA, TB> ? 2 : kStreamRows;  // more are few_rows_on_tiles'
  bool streams = m <= kMostStreamed && m * padded <= kPackedFloats;
  for (const Strided<TB>& x : b) streams = streams && x.row == 1 && x.rows == nullptr && x.cols == nullptr;
  if (streams) {
    detail::pack(a, m, k, padded, panel_a, padded);
    for (int x = 0; x < kProducts; ++x) detail::stream_of(m, n, k, panel_a, padded, b[x], c[x], ldc, accumulate);
    return;
  }
#if defined(GK_SIMD_AMX)
  if constexpr (kOnTiles<TA, TB>) return detail::gemm_on_tiles(m, n, k, a, b, c, ldc, accumulate);
#endif
  float* panel_b = scratch<float>(detail::kScratchB, kTileCols * kDepth);
  for (int64_t i = 0; i < m; i += kBlockRows) {
    const int64_t rows = m - i < kBlockRows ? m - i : kBlockRows;
    // As much of k as fits: the fewer the rows, the longer each column of b is read at a stretch.
    const int64_t span = kPackedFloats / (rows * kDepth) * kDepth;
    for (int64_t begin = 0; begin < k; begin += span) {
      const int64_t end = begin + span < k ? begin + span : k;
      const auto depth_at = [&](int64_t p) { return end - p < kDepth ? end - p : kDepth; };
      for (int64_t p = begin; p < end; p += kDepth)
        pack_a(a.from(i, p), rows, depth_at(p), panel_a + (p - begin) * rows);
      for (int64_t j = 0; j < n; j += kTileCols) {
        const int64_t cols = n - j < kTileCols ? n - j : kTileCols;
        for (int x = 0; x < kProducts; ++x) {
          for (int64_t p = begin; p < end; p += kDepth) {
            pack_b(b[x].from(p, j), depth_at(p), cols, panel_b);
            multiply_panels(rows, cols, depth_at(p), panel_a + (p - begin) * rows, panel_b, c[x] + i * ldc + j, ldc,
                            accumulate || p > 0);
          }
        }
      }
    }
  }
}

// c (m, n), rows ldc apart, = or += a (m, k) times b (k, n).
template <typename TA, typename TB>
void gemm(int64_t m, int64_t n, int64_t k, const Strided<TA>& a, const Strided<TB>& b, float* c, int64_t ldc,
          bool accumulate) {
  gemm_shared<1, TA, TB>(m, n, k, a, {b}, {c}, ldc, accumulate);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
