// linear_cross_entropy backward, for as many columns at once as linear_cross_entropy_columns allows:
//
//   dlogits (rows that count, columns)       the logits again, turned into their gradients before they leave registers
//   dx_sum (N, C) += dlogits weight          float32; rounded into dx with the last columns
//   dweight (columns, C) = dlogits^T x       the sum runs over the rows that count, gathered as they are copied
//
// 6 N V C operations. dlogits has the dtype of x, so that both products run at its rate: what rounds is the factor of
// each product, as everywhere in 16-bit training. So that float16 holds them, they are multiplied by a power of two
// that the rows' weights give, kRoom at most, and the products divided by it: exact. Every sum has one owner and a
// fixed order. Nothing is read back by the host.
#include "cuda/linear_cross_entropy/rows.cuh"

namespace grokkernels {
namespace {

using namespace device;

constexpr float kRoom = 8192.0f;  // times what |p - q| can be, 2 at most: a fourth of float16's largest
constexpr int kZeroThreads = 128;

// The gradient of a row's loss, before the mean's division.
GK_DEVICE float upstream(const LinearCrossEntropyBwdParams& p, int row) { return p.dloss[row * p.dloss_stride]; }

// One block: the rows that count; scales[0]: what dlogits are multiplied by, [1]: its inverse, [2]: the mean's divisor.
__global__ void __launch_bounds__(kCountThreads)
    linear_cross_entropy_scales_kernel(const __grid_constant__ LinearCrossEntropyBwdParams p,
                                       const __grid_constant__ LossTerms terms) {
  int* scratch = reinterpret_cast<int*>(dynamic_shared());
  float largest = 0.0f;
  const int count = count_rows(p.targets, p.options.ignore_index, static_cast<int>(p.rows), p.index, scratch,
                               [&](int row, bool counts) {
                                 if (!counts) return;
                                 const RowGradient g = row_gradient(terms, p.lse[row], upstream(p, row));
                                 largest = fmaxf(largest, fabsf(g.weight) * fmaxf(1.0f, fabsf(g.p_factor)));
                               });
  largest = block_max<kCountThreads>(largest, reinterpret_cast<float*>(scratch));
  if (threadIdx.x != 0) return;
  const float divisor = p.options.reduction == Reduction::mean && count > 0 ? static_cast<float>(count) : 1.0f;
  largest *= fabsf(terms.slope) / divisor;
  // The power of two at or below it; where it is zero, not finite or far from 1, one that is none of that.
  largest = bits_to_float(float_to_bits(fminf(fmaxf(largest, 0x1p-110f), 0x1p120f)) & 0x7F800000u);
  p.scales[0] = kRoom / largest;
  p.scales[1] = largest / kRoom;
  p.scales[2] = divisor;
}

template <bool kCapped, typename T, typename Product>
GK_DEVICE void differentiate_tile(Product& product, const LinearCrossEntropyBwdParams& p, const LossTerms& terms,
                                  int row, int count, int64_t first, int col, int columns, int64_t stride) {
  product.each_row([&](int row_of_tile, int, auto& x) {
    const int r = row + row_of_tile;
    const bool inside = r < count;
    const int source = inside ? p.index[r] : 0;
    const int64_t target = inside ? target_of(p.targets, source) : 0;
    const float weight = is_word(terms, target) ? upstream(p, source) / p.scales[2] * p.scales[0] : nanf("");
    logit_gradients<kCapped, float>(terms, row_gradient(terms, p.lse[source], weight), x,
                                    place_of_column<Product>(target - first - col));
#pragma unroll
    for (int k = 0; k < 2 * Product::kAcross; ++k)
      if (col + column_of<Product>(k) >= columns) x[k] = 0.0f;
    // Rows are padded with zeros to whole vectors.
    store_tile_row<Product::kAcross>(static_cast<T*>(p.dlogits) + r * stride + col, inside, true,
                                     static_cast<int>(stride) - col, Product::first_col,
                                     [&](int j, float& a, float& b) {
                                       a = x[2 * j];
                                       b = x[2 * j + 1];
                                     });
  });
}

// Columns first .. first + columns of the logits, as gradients; dlogits has rows of `stride`.
template <typename T, Layout kX, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    linear_cross_entropy_dlogits_kernel(const __grid_constant__ LinearCrossEntropyBwdParams p,
                                        const __grid_constant__ LossTerms terms, int64_t first, int columns,
                                        int stride) {
  using Product = TileProduct<T, kX, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int count = p.index[p.rows], down = (count + Product::kRows - 1) / Product::kRows;
  const int across = (columns + Product::kCols - 1) / Product::kCols;
  for (unsigned i = blockIdx.x; i < static_cast<unsigned>(down * across); i += gridDim.x) {
    const int row = static_cast<int>(i) % down * Product::kRows, col = static_cast<int>(i) / down * Product::kCols;
    const Operand<T> x{static_cast<const T*>(p.x), p.x_stride, 1, p.index};
    const Operand<T> weight{static_cast<const T*>(p.weight) + first * p.weight_stride[0], p.weight_stride[0],
                            p.weight_stride[1]};
    Product product;
    product.clear();
    product.add(shared, x, row, count, weight, col, columns, 0, static_cast<int>(p.width));
    if (p.options.softcap > 0)
      differentiate_tile<true, T>(product, p, terms, row, count, first, col, columns, stride);
    else
      differentiate_tile<false, T>(product, p, terms, row, count, first, col, columns, stride);
  }
}

template <typename T, Layout kLeft, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    linear_cross_entropy_dx_kernel(const __grid_constant__ LinearCrossEntropyBwdParams p, int64_t first, int columns,
                                   int stride) {
  using Product = TileProduct<T, kLeft, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int count = p.index[p.rows], down = (count + Product::kRows - 1) / Product::kRows;
  const int width = static_cast<int>(p.width), across = (width + Product::kCols - 1) / Product::kCols;
  const bool last = first + columns == p.cols;
  for (unsigned tile = blockIdx.x; tile < static_cast<unsigned>(down * across); tile += gridDim.x) {
    const int row = static_cast<int>(tile) % down * Product::kRows,
              col = static_cast<int>(tile) / down * Product::kCols;
    const Operand<T> dlogits{static_cast<const T*>(p.dlogits), stride, 1};
    const Operand<T> weight{static_cast<const T*>(p.weight) + first * p.weight_stride[0], p.weight_stride[1],
                            p.weight_stride[0]};
    Product product;
    product.clear();
    product.add(shared, dlogits, row, count, weight, col, width, 0, columns);
    product.each_row([&](int row_of_tile, int, const auto& product_row) {
      const int r = row + row_of_tile;
      const bool inside = r < count;
      float* sums = p.dx_sum + int64_t{r} * width + col;
      float x[Product::kAcross][2];
      if (first > 0)
        load_tile_row(sums, inside, width % 4 == 0, width - col, Product::first_col, x);
      else
#pragma unroll
        for (int j = 0; j < Product::kAcross; ++j) x[j][0] = x[j][1] = 0.0f;
#pragma unroll
      for (int j = 0; j < Product::kAcross; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) x[j][c] = fmaf(product_row[2 * j + c], p.scales[1], x[j][c]);
      if (last)
        store_tile_row(static_cast<T*>(p.dx) + (inside ? p.index[r] : 0) * p.width + col, inside,
                       width % kVector<T> == 0, width - col, Product::first_col, x);
      else
        store_tile_row(sums, inside, width % 4 == 0, width - col, Product::first_col, x);
    });
  }
}

template <typename T, Layout kBoth>
__global__ void __launch_bounds__(kGemmThreads, 2)
    linear_cross_entropy_dweight_kernel(const __grid_constant__ LinearCrossEntropyBwdParams p, int64_t first,
                                        int columns, int stride) {
  using Product = TileProduct<T, kBoth, kBoth>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int count = p.index[p.rows], width = static_cast<int>(p.width);
  const int down = (columns + Product::kRows - 1) / Product::kRows,
            across = (width + Product::kCols - 1) / Product::kCols;
  for (unsigned i = blockIdx.x; i < static_cast<unsigned>(down * across); i += gridDim.x) {
    const int row = static_cast<int>(i) % down * Product::kRows, col = static_cast<int>(i) / down * Product::kCols;
    const Operand<T> dlogits{static_cast<const T*>(p.dlogits), 1, stride};
    const Operand<T> x{static_cast<const T*>(p.x), 1, p.x_stride, nullptr, p.index};
    Product product;
    product.clear();
    product.add(shared, dlogits, row, columns, x, col, width, 0, count);
    const float scale = p.scales[1];
#pragma unroll
    for (int a = 0; a < Product::kDown; ++a)
#pragma unroll
      for (int b = 0; b < Product::kAcross; ++b)
#pragma unroll
        for (int r = 0; r < 4; ++r) product.sum[a][b][r] *= scale;
    store_tile(product, static_cast<T*>(p.dweight) + first * p.width, row, columns, col, width);
  }
}

// dx of the rows that do not count.
template <typename T>
__global__ void __launch_bounds__(kZeroThreads)
    linear_cross_entropy_zero_kernel(const __grid_constant__ LinearCrossEntropyBwdParams p) {
  const int64_t row = blockIdx.x;
  if (target_of(p.targets, row) != p.options.ignore_index) return;
  for (int64_t c = threadIdx.x; c < p.width; c += kZeroThreads)
    static_cast<T*>(p.dx)[row * p.width + c] = narrow<T>(0.0f);
}

template <typename T>
void backward(const LinearCrossEntropyBwdParams& p, Stream stream) {
  const LossTerms terms = loss_terms(p.options, p.cols);
  const int64_t held = linear_cross_entropy_columns(p.rows, p.cols, kLinearCrossEntropyDevice);
  const int64_t stride = linear_cross_entropy_stride(held);
  launch(linear_cross_entropy_scales_kernel, {.block = {kCountThreads}, .shared_bytes = kCountThreads / 32 * 4}, stream,
         p, terms);
  if (p.dx != nullptr)
    launch(linear_cross_entropy_zero_kernel<T>, {.grid = {static_cast<unsigned>(p.rows)}, .block = {kZeroThreads}},
           stream, p);
  const auto run = [&](auto product, auto kernel, int64_t down, int64_t across, auto... rest) {
    using Product = decltype(product);
    const int64_t tiles = ceil_div(down, Product::kRows) * ceil_div(across, Product::kCols);
    launch(kernel,
           {.grid = {persistent_blocks(tiles, 2)}, .block = {kGemmThreads}, .shared_bytes = Product::kSharedBytes},
           stream, p, rest...);
  };
  const Layout x = layout_of<T>(p.x, p.rows, p.width, p.x_stride, 1);
  const Layout weight = layout_of<T>(p.weight, p.cols, p.width, p.weight_stride[0], p.weight_stride[1]);
  const bool dense = x == Layout::along_depth && weight == Layout::along_depth;
  const auto columns_from = [&]<Layout kDepth, Layout kOuter>(int64_t first, int columns) {
    const int row_stride = static_cast<int>(stride);
    run(TileProduct<T, kDepth, kDepth>{}, linear_cross_entropy_dlogits_kernel<T, kDepth, kDepth>, p.rows, columns,
        terms, first, columns, row_stride);
    if (p.dx != nullptr)
      run(TileProduct<T, kDepth, kOuter>{}, linear_cross_entropy_dx_kernel<T, kDepth, kOuter>, p.rows, p.width, first,
          columns, row_stride);
    if (p.dweight != nullptr)
      run(TileProduct<T, kOuter, kOuter>{}, linear_cross_entropy_dweight_kernel<T, kOuter>, columns, p.width, first,
          columns, row_stride);
  };
  for (int64_t first = 0; first < p.cols; first += held) {
    const int columns = static_cast<int>(p.cols - first < held ? p.cols - first : held);
    dense ? columns_from.template operator()<Layout::along_depth, Layout::along_outer>(first, columns)
          : columns_from.template operator()<Layout::any, Layout::any>(first, columns);
  }
}

}  // namespace

void linear_cross_entropy_bwd_cuda(const LinearCrossEntropyBwdParams& p, Stream stream) {
  check_sizes("linear_cross_entropy", p.rows, p.width, p.cols);
  GK_SWITCH_DTYPE(p.dtype, T, backward<T>(p, stream));
}

}  // namespace grokkernels
