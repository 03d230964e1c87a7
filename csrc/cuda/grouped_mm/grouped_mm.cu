// grouped_mm: y[r] (N) = x[r] (K) times w[e] (K, N) for the rows r of group e, and the gradient of w.
//
// Forward: a grid of two blocks per multiprocessor walks the tiles of all groups (groups.cuh); x (M, K) and w (E, K, N)
// are read as they lie, from either side (gemm.cuh). The input gradient is the same product with w[e] transposed, a
// matter of strides. dw[e] (K, N) = x_e^T dy_e has a tile list of its own, whose sums run over the rows of a group.
// 2 M K N operations each; no atomics: the same bits in every run.
//
// Persistent tiles over groups are MegaBlocks' idea (Gale et al. 2022) in the form of CUTLASS's grouped kernels.
#include "cuda/gemm.cuh"
#include "cuda/grouped_mm/grouped_mm_sm90.h"
#include "cuda/groups.cuh"
#include "grouped_mm.h"

namespace grokkernels {
namespace {

using namespace device;

template <typename T, Layout kX, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2) grouped_mm_kernel(const __grid_constant__ GroupedMmParams p) {
  using Product = TileProduct<T, kX, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int rows = static_cast<int>(p.rows), cols = static_cast<int>(p.cols), groups = static_cast<int>(p.groups);
  const int across = (cols + Product::kCols - 1) / Product::kCols;
  const GroupTiles<Product::kRows> tiles{p.offsets, groups, rows, across};
  GroupTile t;
  for (unsigned i = blockIdx.x; tiles.find(i, t); i += gridDim.x) {
    const Operand<T> x{static_cast<const T*>(p.x), p.x_strides.row, p.x_strides.col};
    const Operand<T> w{static_cast<const T*>(p.w) + t.group * p.w_strides.stack, p.w_strides.col, p.w_strides.row};
    const int col = t.across * Product::kCols;
    Product product;
    product.clear();
    product.add(shared, x, t.row, t.end, w, col, cols, 0, static_cast<int>(p.depth));
    store_tile(product, static_cast<T*>(p.y), t.row, t.end, col, cols);
  }
  for (int row = rows_used(p.offsets, groups, rows) + static_cast<int>(blockIdx.x); row < rows; row += gridDim.x)
    for (int c = threadIdx.x; c < cols; c += kGemmThreads)
      static_cast<T*>(p.y)[int64_t{row} * cols + c] = narrow<T>(0.0f);
}

template <typename T, Layout kX, Layout kDy>
__global__ void __launch_bounds__(kGemmThreads, 2)
    grouped_mm_wgrad_kernel(const __grid_constant__ GroupedMmWgradParams p) {
  using Product = TileProduct<T, kX, kDy>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int depth = static_cast<int>(p.depth), cols = static_cast<int>(p.cols);
  const int down = (depth + Product::kRows - 1) / Product::kRows, across = (cols + Product::kCols - 1) / Product::kCols;
  const unsigned tiles = static_cast<unsigned>(p.groups) * static_cast<unsigned>(down * across);
  for (unsigned i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int e = static_cast<int>(i / static_cast<unsigned>(down * across));
    const int local = static_cast<int>(i - static_cast<unsigned>(e) * static_cast<unsigned>(down * across));
    const int row = local % down * Product::kRows, col = local / down * Product::kCols;
    const Group group = group_of(p.offsets, e, static_cast<int>(p.rows));
    const Operand<T> x{static_cast<const T*>(p.x), p.x_strides.col, p.x_strides.row};
    const Operand<T> dy{static_cast<const T*>(p.dy), p.dy_strides.col, p.dy_strides.row};
    Product product;
    product.clear();
    product.add(shared, x, row, depth, dy, col, cols, group.begin, group.end);
    store_tile(product, static_cast<T*>(p.dw) + e * p.depth * p.cols, row, depth, col, cols);
  }
}

template <typename T>
void forward(const GroupedMmParams& p, Stream stream) {
  const StackStrides &xs = p.x_strides, &ws = p.w_strides;
  const Layout x = layout_of<T>(p.x, p.rows, p.depth, xs.row, xs.col);
  const Layout w = layout_of<T>(p.w, p.cols, p.depth, ws.col, ws.row, ws.stack);
  with_layouts(x, w, [&]<Layout kX, Layout kW>() {
    using Product = TileProduct<T, kX, kW>;
    const int64_t tiles = most_group_tiles(p.rows, p.groups, Product::kRows, ceil_div(p.cols, Product::kCols));
    launch(grouped_mm_kernel<T, kX, kW>,
           {.grid = {persistent_blocks(tiles, 2)}, .block = {kGemmThreads}, .shared_bytes = Product::kSharedBytes},
           stream, p);
  });
}

template <typename T>
void weight_gradient(const GroupedMmWgradParams& p, Stream stream) {
  const StackStrides &xs = p.x_strides, &dys = p.dy_strides;
  const bool dense = layout_of<T>(p.x, p.depth, p.rows, xs.col, xs.row) == Layout::along_outer &&
                     layout_of<T>(p.dy, p.cols, p.rows, dys.col, dys.row) == Layout::along_outer;
  const auto run = [&]<Layout kBoth>() {
    using Product = TileProduct<T, kBoth, kBoth>;
    const int64_t tiles = p.groups * ceil_div(p.depth, Product::kRows) * ceil_div(p.cols, Product::kCols);
    launch(grouped_mm_wgrad_kernel<T, kBoth, kBoth>,
           {.grid = {persistent_blocks(tiles, 2)}, .block = {kGemmThreads}, .shared_bytes = Product::kSharedBytes},
           stream, p);
  };
  dense ? run.template operator()<Layout::along_outer>() : run.template operator()<Layout::any>();
}

}  // namespace

void grouped_mm_cuda(const GroupedMmParams& p, Stream stream) {
  check_sizes("grouped_mm", p.rows, p.depth, p.cols, p.groups);
  if (on_hopper() && grouped_mm_sm90(p, stream)) return;
  GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p, stream));
}

void grouped_mm_wgrad_cuda(const GroupedMmWgradParams& p, Stream stream) {
  check_sizes("grouped_mm", p.rows, p.depth, p.cols, p.groups);
  if (on_hopper() && grouped_mm_wgrad_sm90(p, stream)) return;
  GK_SWITCH_DTYPE(p.dtype, T, weight_gradient<T>(p, stream));
}

}  // namespace grokkernels
