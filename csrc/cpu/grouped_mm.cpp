// grouped_mm on the CPU: the tiles of all groups in one parallel region.
//
// Forward: y (M, N), tile by tile, group e's rows of x (M, K) times w[e] (K, N). The input gradient is the same product
// with w[e] transposed, which is a matter of strides. The weight gradient has a tile list of its own: dw (E, K, N),
// whose sums run over the rows of a group.
#include "grouped_mm.h"

#include "cpu/groups.h"
#include "cpu/launch.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

template <typename T>
void forward(const GroupedMmParams& p) {
  const Strided<T> x{static_cast<const T*>(p.x), p.x_strides.row, p.x_strides.col};
  const T* w = static_cast<const T*>(p.w);
  T* y = static_cast<T*>(p.y);
  const GroupTiles<T> tiles(p.offsets, p.groups, p.rows, p.cols);
  const int64_t cost = tile_cost(tiles.count(), p.rows, p.groups, p.depth, p.cols);
  parallel_tasks(tiles.count(), cost, [&](int64_t task) {
    const Tile t = tiles[task];
    float* tile = Block<T>::scratch(1);
    const Strided<T> weight{w + t.group * p.w_strides.stack, p.w_strides.row, p.w_strides.col};
    gemm(t.rows, t.cols, p.depth, x.from(t.row, 0), weight.from(0, t.col), tile, Block<T>::kStride, false);
    store_tile(tile, Block<T>::kStride, t.rows, t.cols, y + t.row * p.cols + t.col, p.cols);
  });
  const int64_t used = p.groups == 0 ? 0 : group_of(p.offsets, p.groups - 1, p.rows).end;
  clear(y + used * p.cols, (p.rows - used) * p.cols);
}

template <typename T>
void weight_gradient(const GroupedMmWgradParams& p) {
  constexpr int64_t kRows = Block<T>::kRows, kCols = Block<T>::kCols;
  const Strided<T> x{static_cast<const T*>(p.x), p.x_strides.row, p.x_strides.col};
  const Strided<T> dy{static_cast<const T*>(p.dy), p.dy_strides.row, p.dy_strides.col};
  T* dw = static_cast<T*>(p.dw);
  const int64_t down = ceil_div(p.depth, kRows), across = ceil_div(p.cols, kCols);
  const int64_t tasks = p.groups * down * across;
  parallel_tasks(tasks, tile_cost(tasks, p.rows, p.groups, p.depth, p.cols), [&](int64_t task) {
    const int64_t e = task / (down * across);
    const int64_t row = task / across % down * kRows, col = task % across * kCols;
    const int64_t rows = p.depth - row < kRows ? p.depth - row : kRows;
    const int64_t cols = p.cols - col < kCols ? p.cols - col : kCols;
    const Group g = group_of(p.offsets, e, p.rows);
    float* tile = Block<T>::scratch(1);
    gemm(rows, cols, g.size(), x.transposed().from(row, g.begin), dy.from(g.begin, col), tile, Block<T>::kStride,
         false);
    store_tile(tile, Block<T>::kStride, rows, cols, dw + (e * p.depth + row) * p.cols + col, p.cols);
  });
}

}  // namespace

void grouped_mm(const GroupedMmParams& p) { GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p)); }

void grouped_mm_wgrad(const GroupedMmWgradParams& p) { GK_SWITCH_DTYPE(p.dtype, T, weight_gradient<T>(p)); }

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(grouped_mm, GroupedMmParams);
GK_CPU_LAUNCHER(grouped_mm_wgrad, GroupedMmWgradParams);
