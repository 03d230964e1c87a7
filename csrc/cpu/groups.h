// The tiles of a grouped matrix product: groups of rows, each with a matrix of its own.
//
// offsets (E) int32: group e holds the rows offsets[e-1] .. offsets[e]. Whatever offsets hold, a tile stays inside the
// rows there are.
#pragma once

#include <cstdint>

#include "cpu/gemm.h"
#include "cpu/loops.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// The output tile of a task, rows x cols floats at most, kStride from row to row; narrower where there are few tiles.
// Wide, since every task packs its rows; rows a power of two apart would compete for few sets of the first-level cache.
template <typename T>
struct Block {
  static constexpr int64_t kRows = kBlockRows, kCols = 512, kNarrow = 64, kStride = kCols + 16;
  static float* scratch(int slot) { return cpu::scratch<float>(slot, kRows * kStride); }
};
#if defined(GK_SIMD_BFLOAT16)
// The processor's own products are so fast that packing shows: 1 MB, with what is packed it fills the second-level
// cache.
template <>
struct Block<bfloat16> {
  static constexpr int64_t kRows = kTilesBlockRows, kCols = 512, kNarrow = 64, kStride = kCols + 16;
  static float* scratch(int slot) { return cpu::scratch<float>(slot, kRows * kStride); }
};
#endif
static_assert(Block<float>::kCols % Block<float>::kNarrow == 0 && Block<float>::kNarrow % kTileCols == 0);

struct Group {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

inline Group group_of(const int32_t* offsets, int64_t e, int64_t rows) {
  const auto inside = [rows](int64_t row) { return row < 0 ? int64_t{0} : row > rows ? rows : row; };
  const int64_t begin = e == 0 ? 0 : inside(offsets[e - 1]);
  const int64_t end = inside(offsets[e]);
  return {begin, end > begin ? end : begin};
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What one tile costs on average, in the unit of parallel.h, when `rows` rows in up to `groups` groups meet matrices of
// depth x cols: the products, and per matrix its packing, which takes about as long as 8 products per element.
inline int64_t tile_cost(int64_t tiles, int64_t rows, int64_t groups, int64_t depth, int64_t cols) {
  const int64_t matrices = groups < rows ? groups : rows;
  return (rows / 8 + matrices) * depth * cols / (tiles + 1);
}

// An output tile of one group: rows from `row`, columns from `col`.
struct Tile {
  int64_t group, row, rows, col, cols;
};

// All tiles of an output with `cols` columns, numbered group by group. A group's rows are cut into equal parts of at
// most Block<T>::kRows; columns are cut finer when there are too few tiles to go round. Takes scratch slot 0 of the
// thread that makes it, for as long as it is used.
template <typename T>
class GroupTiles {
 public:
  GroupTiles(const int32_t* offsets, int64_t groups, int64_t rows, int64_t cols)
      : offsets_(offsets), groups_(groups), rows_(rows), cols_(cols), first_(scratch<int64_t>(0, groups + 1)) {
    count(Block<T>::kCols);
    while (first_[groups_] < 4 * num_threads() && tile_cols_ > Block<T>::kNarrow) count(tile_cols_ / 2);
  }

  int64_t count() const { return first_[groups_]; }

  Tile operator[](int64_t task) const {
    int64_t low = 0, high = groups_;  // first_[low] <= task < first_[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_[middle] <= task ? low : high) = middle;
    }
    const Group g = group_of(offsets_, low, rows_);
    const int64_t across = ceil_div(cols_, tile_cols_), local = task - first_[low];
    const int64_t part = rows_per_part(g.size()), row = local / across * part, col = local % across * tile_cols_;
    return {low, g.begin + row, g.size() - row < part ? g.size() - row : part, col,
            cols_ - col < tile_cols_ ? cols_ - col : tile_cols_};
  }

 private:
  static constexpr int64_t kStep = kOnTiles<T, T> ? 32 : kLanes;
  static int64_t rows_per_part(int64_t rows) {
    return ceil_div(ceil_div(rows, ceil_div(rows, Block<T>::kRows)), kStep) * kStep;
  }
  void count(int64_t tile_cols) {
    tile_cols_ = tile_cols;
    first_[0] = 0;
    for (int64_t e = 0; e < groups_; ++e) {
      const int64_t rows = group_of(offsets_, e, rows_).size();
      const int64_t down = rows == 0 ? 0 : ceil_div(rows, rows_per_part(rows));
      first_[e + 1] = first_[e] + down * ceil_div(cols_, tile_cols);
    }
  }

  const int32_t* offsets_;
  int64_t groups_, rows_, cols_, tile_cols_ = 0;
  int64_t* first_;  // tile number that each group starts with
};

// Rounds a tile (rows, cols) of float32 into its place.
template <typename T>
void store_tile(const float* tile, int64_t tile_stride, int64_t rows, int64_t cols, T* out, int64_t row_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = tile + i * tile_stride;
    T* to = out + i * row_stride;
    for_vectors(0, cols, [&](int64_t c, auto n) { store_n(to + c, load_n(from + c, n), n); });
  }
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
