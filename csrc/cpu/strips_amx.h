// Products of strips on the matrix unit. Four sums are made at once, of two strips of a and two of b, so every tile
// that is loaded is multiplied twice.
#pragma once

#include <cstdint>

#include "cpu/amx.h"
#include "cpu/strips.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

namespace detail {

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

}  // namespace detail

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
