// linear_cross_entropy forward: cross_entropy of x (N, C) times weight (V, C) transposed; logits exist only in the
// registers of a tile. 2 N V C operations.
//
// A block takes 128 of the rows that count and kLinearCrossEntropyRange columns, tile by tile; of each tile, rows leave
// (max, sum of exponentials, sum of z), merged into those of the range, one number for each of the two warps that share
// a row. Then a warp merges the ranges of a row in order. What a row's loss depends on is its own logits alone.
//
// The idea of never storing logits is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
// arXiv:2411.09009.
#include "cuda/linear_cross_entropy/rows.cuh"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kMergeWarps = 8;
static_assert(sizeof(RowSum) == kLinearCrossEntropyPartial);

// One block. Rows that do not count have their results here.
__global__ void __launch_bounds__(kCountThreads)
    linear_cross_entropy_count_kernel(const __grid_constant__ LinearCrossEntropyFwdParams p) {
  count_rows(p.targets, p.options.ignore_index, static_cast<int>(p.rows), p.index,
             reinterpret_cast<int*>(dynamic_shared()), [&](int row, bool counts) {
               if (counts) return;
               p.lse[row] = 0.0;
               p.row_losses[row] = 0.0f;
             });
}

// Adds one tile, whose first row and column are `row` and `col`, to the partial sums of its rows.
template <bool kCapped, typename Product>
GK_DEVICE void add_tile(Product& product, const LinearCrossEntropyFwdParams& p, const LossTerms& terms, int row,
                        int count, int col, RowSum* partials, bool first) {
  product.each_row([&](int row_of_tile, int, auto& z) {
    const int r = row + row_of_tile;
    const bool inside = r < count;
    squash<kCapped>(terms, z);
    const int place = inside ? place_of_column<Product>(target_of(p.targets, p.index[r]) - col) : -1;
    ThreadSum mine;
#pragma unroll
    for (int k = 0; k < 2 * Product::kAcross; ++k) {
      if (k == place) p.target_z[r] = z[k];
      if (terms.label_smoothing > 0) mine.z_sum += col + column_of<Product>(k) < terms.cols ? z[k] : 0.0f;
      if (col + column_of<Product>(k) >= terms.cols) z[k] = -INFINITY;
    }
    add_columns<float>(mine, z);
    const RowSum sum = merge_lanes<4>(terms, mine);
    if (!inside || (lane_id() & 3) != 0) return;
    RowSum* partial = partials + 2 * r;
    RowSum all = sum;
    if (!first) {
      all = *partial;
      merge(all, sum);
    }
    *partial = all;
  });
}

template <typename T, Layout kX, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    linear_cross_entropy_fwd_kernel(const __grid_constant__ LinearCrossEntropyFwdParams p,
                                    const __grid_constant__ LossTerms terms) {
  using Product = TileProduct<T, kX, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int count = p.index[p.rows], down = (count + Product::kRows - 1) / Product::kRows;
  const int cols = static_cast<int>(p.cols), width = static_cast<int>(p.width);
  const int parts = static_cast<int>(linear_cross_entropy_parts(p.cols));
  // Blocks of rows that share a range of the weight follow each other.
  for (unsigned i = blockIdx.x; i < static_cast<unsigned>(parts * down); i += gridDim.x) {
    const int part = static_cast<int>(i) / down, row = (static_cast<int>(i) - part * down) * Product::kRows;
    const int begin = part * kLinearCrossEntropyRange;
    const int end = cols - begin < kLinearCrossEntropyRange ? cols : begin + kLinearCrossEntropyRange;
    const int warp = static_cast<int>(threadIdx.x) / 32 % 2;
    RowSum* partials = static_cast<RowSum*>(p.partials) + int64_t{part} * p.rows * 2 + warp;
    for (int col = begin; col < end; col += Product::kCols) {
      const Operand<T> x{static_cast<const T*>(p.x), p.x_stride, 1, p.index};
      const Operand<T> weight{static_cast<const T*>(p.weight), p.weight_stride[0], p.weight_stride[1]};
      Product product;
      product.clear();
      product.add(shared, x, row, count, weight, col, cols, 0, width);
      if (p.options.softcap > 0)
        add_tile<true>(product, p, terms, row, count, col, partials, col == begin);
      else
        add_tile<false>(product, p, terms, row, count, col, partials, col == begin);
    }
  }
}

// A warp merges the ranges of a row that counts.
__global__ void __launch_bounds__(kMergeWarps * 32)
    linear_cross_entropy_merge_kernel(const __grid_constant__ LinearCrossEntropyFwdParams p,
                                      const __grid_constant__ LossTerms terms) {
  const int i = static_cast<int>(blockIdx.x) * kMergeWarps + static_cast<int>(threadIdx.x) / 32;
  if (i >= p.index[p.rows]) return;
  const int parts = static_cast<int>(linear_cross_entropy_parts(p.cols));
  RowSum sum;
  for (int part = lane_id(); part < 2 * parts; part += 32)
    merge(sum, static_cast<const RowSum*>(p.partials)[(int64_t{part / 2} * p.rows + i) * 2 + part % 2]);
  sum = merge_lanes(terms, sum);
  if (lane_id() != 0) return;
  const int row = p.index[i];
  double lse = nan(""), loss = lse;
  if (is_word(terms, target_of(p.targets, row))) {
    lse = logsumexp(sum);
    loss = row_loss(terms, lse, p.target_z[i], sum.z_sum);
  }
  p.lse[row] = lse;
  p.row_losses[row] = static_cast<float>(loss);
}

// One block.
__global__ void __launch_bounds__(kCountThreads)
    linear_cross_entropy_reduce_kernel(const __grid_constant__ LinearCrossEntropyFwdParams p) {
  double total = 0.0;
  for (int64_t row = threadIdx.x; row < p.rows; row += kCountThreads) total += p.row_losses[row];
  total = block_sum<kCountThreads>(total, reinterpret_cast<double*>(dynamic_shared()));
  const int count = p.options.reduction == Reduction::mean && p.index[p.rows] > 0 ? p.index[p.rows] : 1;
  if (threadIdx.x == 0) *p.loss = static_cast<float>(total / count);
}

template <typename T>
void forward(const LinearCrossEntropyFwdParams& p, Stream stream) {
  const LossTerms terms = loss_terms(p.options, p.cols);
  launch(linear_cross_entropy_count_kernel, {.block = {kCountThreads}, .shared_bytes = kCountThreads / 32 * 4}, stream,
         p);
  const auto run = [&]<Layout kX, Layout kW>() {
    using Product = TileProduct<T, kX, kW>;
    const int64_t tiles = linear_cross_entropy_parts(p.cols) * ceil_div(p.rows, Product::kRows);
    launch(linear_cross_entropy_fwd_kernel<T, kX, kW>,
           {.grid = {persistent_blocks(tiles, 2)}, .block = {kGemmThreads}, .shared_bytes = Product::kSharedBytes},
           stream, p, terms);
  };
  const bool dense =
      layout_of<T>(p.x, p.rows, p.width, p.x_stride, 1) == Layout::along_depth &&
      layout_of<T>(p.weight, p.cols, p.width, p.weight_stride[0], p.weight_stride[1]) == Layout::along_depth;
  dense ? run.template operator()<Layout::along_depth, Layout::along_depth>()
        : run.template operator()<Layout::any, Layout::any>();
  launch(linear_cross_entropy_merge_kernel,
         {.grid = {static_cast<unsigned>(ceil_div(p.rows, kMergeWarps))}, .block = {kMergeWarps * 32}}, stream, p,
         terms);
  if (p.options.reduction != Reduction::none)
    launch(linear_cross_entropy_reduce_kernel, {.block = {kCountThreads}, .shared_bytes = kCountThreads / 32 * 8},
           stream, p);
}

}  // namespace

void linear_cross_entropy_fwd_cuda(const LinearCrossEntropyFwdParams& p, Stream stream) {
  check_sizes("linear_cross_entropy", p.rows, p.width, p.cols);
  GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p, stream));
}

}  // namespace grokkernels
