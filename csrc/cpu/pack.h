// Copies of matrices, mostly in float32 and laid out for the register tile of gemm.h.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/strided.h"
#include "cpu/transpose.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
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

// out (rows, cols), rows ld apart, from its transpose, rows turned_ld apart, in which kLanes rows and columns begin
// wherever one begins.
inline void turn_back(int64_t rows, int64_t cols, const float* turned, int64_t turned_ld, float* out, int64_t ld) {
  for (int64_t i = 0; i < rows; i += kLanes)
    for (int64_t j = 0; j < cols; j += kLanes) {
      vf x[kLanes];
#pragma GCC unroll 16
      for (int u = 0; u < kLanes; ++u) x[u] = load(turned + (j + u) * turned_ld + i);
      transpose(x);
      const int n = cols - j < kLanes ? static_cast<int>(cols - j) : kLanes;
      for (int64_t u = 0; u < kLanes && i + u < rows; ++u) store_n(out + (i + u) * ld + j, x[u], n);
    }
}

}  // namespace detail
}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
