// Matrices in memory as the packing of gemm.h sees them.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// A matrix in memory: element (i, j) lies at data[i * row + j * col]. With `rows` row i lies at rows[i] * row instead,
// with `cols` column j at cols[j] * col: a gather, which the packing does on its way.
template <typename T>
struct Strided {
  const T* data;
  int64_t row, col;
  const int32_t* rows = nullptr;
  const int32_t* cols = nullptr;

  Strided transposed() const { return {data, col, row, cols, rows}; }
  Strided from(int64_t i, int64_t j) const {
    return {data + (rows ? 0 : i * row) + (cols ? 0 : j * col), row, col, rows ? rows + i : nullptr,
            cols ? cols + j : nullptr};
  }
};

// Whether products of these types are the processor's own, in the strips of strips.h.
template <typename TA, typename TB>
inline constexpr bool kOnTiles = false;
#if defined(GK_SIMD_BFLOAT16)
template <>
inline constexpr bool kOnTiles<bfloat16, bfloat16> = true;
#endif

namespace detail {

// Lines of a matrix: its rows, or its columns.
template <typename T>
struct Lines {
  const T* data;
  int64_t stride, step;  // elements from line to line, from element to element
  const int32_t* index;  // lines are gathered
  const int32_t* index_in_line;

  const T* operator()(int64_t i) const { return data + (index ? index[i] : i) * stride; }
  const T* at(int64_t i, int64_t j) const { return (*this)(i) + (index_in_line ? index_in_line[j] : j) * step; }
  bool dense() const { return step == 1 && index_in_line == nullptr; }
};

template <typename T>
Lines<T> lines_of(const Strided<T>& x) {
  return {x.data, x.row, x.col, x.rows, x.cols};
}

inline constexpr int kScratchA = 6, kScratchB = 7;  // slots that gemm takes; its callers leave them alone

}  // namespace detail

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
