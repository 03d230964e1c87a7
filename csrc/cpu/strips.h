// Panels of bfloat16 for the processor's own products of bfloat16: the matrix unit of level amx, the dot instruction of
// avx512bf16. Nothing is widened; products are exact and sums float32.
//
// A panel is made of strips of kTileLines lines, rows of a or columns of b, and a strip of tiles, one per kTileDepth
// elements of the sum, each 1 KB in the form that a register of the matrix unit takes: loads run through memory in
// order. Lines and elements that are not there are zero. The two forms are transposes of each other in words of two
// elements, and memory holds either: what lies dense along the sum is a's form, what lies dense across it becomes b's
// when neighbours of the sum are paired.
#pragma once

#include <cstdint>

#include "cpu/pack.h"
#include "cpu/simd.h"
#include "cpu/strided.h"
#include "cpu/transpose.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

inline constexpr int kTileLines = 16;                          // rows of c and a, columns of c and b
inline constexpr int kTileDepth = 32;                          // products that one tile_dot sums into an element
inline constexpr int kTileElements = kTileLines * kTileDepth;  // of a or b

inline constexpr int64_t kTilesDepth = 256;  // of a panel

// Up to so many rows of a, columns of b are streamed as dot products of pairs, and what lies so many bytes ahead is
// asked for.
#if defined(GK_SIMD_AMX)
inline constexpr int kStripsStreamed = 2;
inline constexpr int64_t kStreamAhead = 4096;
#else
inline constexpr int kStripsStreamed = 4;
inline constexpr int64_t kStreamAhead = 0;
#endif

namespace detail {

// From strip to strip, per line: a cache line more than its tiles, so that strips do not compete for the same sets.
inline constexpr int64_t kStripStride = kTilesDepth + kTileDepth / kTileLines;
inline constexpr int64_t kStripElements = kTileLines * kStripStride;

GK_ALWAYS_INLINE int64_t at_most(int64_t count, int64_t limit) { return count < limit ? count : limit; }

GK_ALWAYS_INLINE vi load_elements(const bfloat16* p, int64_t n) {  // the first n <= kTileDepth; the others are zero
  if (n >= kTileDepth) return load_bytes(p);
  return reinterpret_cast<vi>(_mm512_maskz_loadu_epi16((1u << n) - 1, p));
}

// sum + the products of two elements in each lane; see strips_dot.h for its rounding.
GK_ALWAYS_INLINE vf add_pairs(vf x, vf y, vf sum) {
  return reinterpret_cast<vf>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
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

}  // namespace detail

// a (rows, depth), depth <= kTilesDepth.
inline void pack_a(const Strided<bfloat16>& a, int64_t rows, int64_t depth, bfloat16* panel) {
  detail::pack_tiles<false>(detail::lines_of(a), detail::lines_of(a.transposed()), rows, depth, panel);
}

// b (depth, cols), depth <= kTilesDepth.
inline void pack_b(const Strided<bfloat16>& b, int64_t depth, int64_t cols, bfloat16* panel) {
  detail::pack_tiles<true>(detail::lines_of(b.transposed()), detail::lines_of(b), cols, depth, panel);
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
