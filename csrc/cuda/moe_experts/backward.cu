// moe_experts backward, with M = N * K rows in expert order, w the weight of a row and g = dy_n down_e, the gradient of
// hidden before that weight:
//
//   dgate = w g up act'(gate), dup = w g act(gate), w hidden, and g . hidden     one kernel, hidden computed again
//   dx_n = sum over k of (dgate gate_e + dup up_e)[slots[n,k]]                    k = 0, 1, ...
//   dweights = g . hidden, from parts of kMoeDotColsDevice columns                in double, in order
//   dgate_proj_e = dgate_e^T x_e, dup_proj_e = dup_e^T x_e, ddown_proj_e = dy_e^T (w hidden)_e
//
// Rows of x and dy are gathered as they are copied to shared memory, also where the sum runs over them. Sums have one
// owner and a fixed order: bitwise repeatable, no atomics. 14 M F C operations; nothing is read back by the host.
#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"
#include "cuda/groups.cuh"
#include "cuda/moe_experts/backward_sm90.h"
#include "cuda/moe_experts/combine.cuh"
#include "cuda/moe_experts/differentiate.cuh"
#include "moe_experts.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256;

// The token and the weight of each row in expert order; those of rows that no slot names stay zero.
__global__ void __launch_bounds__(kThreads) moe_experts_rows_kernel(const __grid_constant__ MoeExpertsBwdParams p) {
  const int64_t rows = p.tokens * p.top_k, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows) return;
  const int32_t slot = p.slots[i];
  if (slot < 0 || slot >= rows) return;
  p.token_of[slot] = static_cast<int32_t>(i / p.top_k);
  p.weight_of[slot] = p.weights[i];
}

__global__ void __launch_bounds__(kThreads) moe_experts_dweights_kernel(const __grid_constant__ MoeExpertsBwdParams p) {
  const int64_t rows = p.tokens * p.top_k, i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= rows) return;
  const int64_t slot = p.slots[i], parts = (p.hidden_cols + kMoeDotColsDevice - 1) / kMoeDotColsDevice;
  double total = 0.0;
  if (slot >= 0 && slot < rows)
    for (int64_t part = 0; part < parts; ++part) total += p.dots[slot * parts + part];
  p.dweights[i] = static_cast<float>(total);
}

// From g, one tile: dgate, dup, w hidden, and the tile's parts of g . hidden.
template <Activation kKind, typename T, typename Product>
GK_DEVICE void differentiate_tile(Product& product, const MoeExpertsBwdParams& p, int row, int row_end, int col) {
  constexpr int kTiles = kMoeDotColsDevice / 8;
  const int cols = static_cast<int>(p.hidden_cols), count = cols - col;
  const bool wide = cols % kVector<T> == 0;
  const int64_t parts = (cols + kMoeDotColsDevice - 1) / kMoeDotColsDevice;
  product.template each_row<kTiles>([&](int row_of_tile, int tile, const auto& x) {
    const int r = row + row_of_tile;
    const bool inside = r < row_end;
    const int64_t place = int64_t{r} * cols + col;
    const float weight = inside ? p.weight_of[r] : 0.0f;
    const auto first = [tile](int j) { return Product::first_col(tile + j); };
    float gate[kTiles][2], up[kTiles][2], hidden[kTiles][2];
    load_tile_row(static_cast<const T*>(p.gate) + place, inside, wide, count, first, gate);
    load_tile_row(static_cast<const T*>(p.up) + place, inside, wide, count, first, up);
    const auto g = [&x](int j, int c) { return x[2 * j + c]; };
    const float dot = differentiate_row<kKind>(g, weight, gate, up, hidden);
    if (inside && first(0) < count && (lane_id() & 3) == 0)
      p.dots[r * parts + (col + first(0)) / kMoeDotColsDevice] = dot;
    store_tile_row(static_cast<T*>(p.dgate) + place, inside, wide, count, first, gate);
    store_tile_row(static_cast<T*>(p.dup) + place, inside, wide, count, first, up);
    store_tile_row(static_cast<T*>(p.scaled_hidden) + place, inside, wide, count, first, hidden);
  });
}

template <typename T, Layout kDy, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    moe_experts_dhidden_kernel(const __grid_constant__ MoeExpertsBwdParams p, int rows, int across) {
  using Product = TileProduct<T, kDy, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int cols = static_cast<int>(p.hidden_cols), experts = static_cast<int>(p.experts);
  const StackStrides& s = p.experts_weights.down_strides;
  const GroupTiles<Product::kRows> tiles{p.offsets, experts, rows, across};
  GroupTile t;
  for (unsigned i = blockIdx.x; tiles.find(i, t); i += gridDim.x) {
    const Operand<T> dy{static_cast<const T*>(p.dy), p.dy_stride, 1, p.token_of};
    const Operand<T> projection{static_cast<const T*>(p.experts_weights.down) + t.group * s.stack, s.col, s.row};
    const int col = t.across * Product::kCols;
    Product product;
    product.clear();
    product.add(shared, dy, t.row, t.end, projection, col, cols, 0, static_cast<int>(p.cols));
    switch (p.activation) {
      case Activation::gelu_tanh:
        differentiate_tile<Activation::gelu_tanh, T>(product, p, t.row, t.end, col);
        break;
      case Activation::gelu:
        differentiate_tile<Activation::gelu, T>(product, p, t.row, t.end, col);
        break;
      case Activation::silu:
        differentiate_tile<Activation::silu, T>(product, p, t.row, t.end, col);
        break;
      case Activation::relu:
        differentiate_tile<Activation::relu, T>(product, p, t.row, t.end, col);
        break;
    }
  }
}

// dx_rows (M, C) = dgate gate_e + dup up_e, float32.
template <typename T, Layout kLeft, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    moe_experts_dx_kernel(const __grid_constant__ MoeExpertsBwdParams p, int rows, int across) {
  using Product = TileProduct<T, kLeft, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int cols = static_cast<int>(p.cols), experts = static_cast<int>(p.experts);
  const ExpertWeights& w = p.experts_weights;
  const GroupTiles<Product::kRows> tiles{p.offsets, experts, rows, across};
  const int depth = static_cast<int>(p.hidden_cols);
  GroupTile t;
  for (unsigned i = blockIdx.x; tiles.find(i, t); i += gridDim.x) {
    Product product;
    product.clear();
#pragma unroll 1
    for (int of_up = 0; of_up < 2; ++of_up) {
      // Along the outer dimension both have the same strides, the launcher sees to it: registers are short there.
      const StackStrides& s = kW == Layout::along_outer || !of_up ? w.gate_strides : w.up_strides;
      const Operand<T> left{static_cast<const T*>(of_up ? p.dup : p.dgate), p.hidden_cols, 1};
      const Operand<T> projection{static_cast<const T*>(of_up ? w.up : w.gate) + t.group * s.stack, s.col, s.row};
      product.add(shared, left, t.row, t.end, projection, t.across * Product::kCols, cols, 0, depth);
    }
    store_tile(product, p.dx_rows, t.row, t.end, t.across * Product::kCols, cols);
  }
}

// The three weight gradients, sums over the rows of an expert: tiles of each expert's dgate_proj, dup_proj, ddown_proj.
template <typename T, Layout kBoth>
__global__ void __launch_bounds__(kGemmThreads, 2)
    moe_experts_wgrad_kernel(const __grid_constant__ MoeExpertsBwdParams p, int rows, unsigned of_gate,
                             unsigned of_expert) {
  using Product = TileProduct<T, kBoth, kBoth>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int cols = static_cast<int>(p.cols), hidden_cols = static_cast<int>(p.hidden_cols);
  const auto tiles_of = [](int n, int size) { return static_cast<unsigned>((n + size - 1) / size); };
  for (unsigned i = blockIdx.x; i < static_cast<unsigned>(p.experts) * of_expert; i += gridDim.x) {
    const unsigned e = i / of_expert;
    unsigned tile = i - e * of_expert;
    const int which = tile < of_gate ? 0 : tile < 2 * of_gate ? 1 : 2;
    tile -= static_cast<unsigned>(which) * of_gate;
    const Operand<T> tokens{static_cast<const T*>(which == 2 ? p.dy : p.x), 1, which == 2 ? p.dy_stride : p.x_stride,
                            nullptr, p.token_of};
    const Operand<T> rows_of{static_cast<const T*>(which == 0   ? p.dgate
                                                   : which == 1 ? p.dup
                                                                : p.scaled_hidden),
                             1, p.hidden_cols};
    const int down = which == 2 ? cols : hidden_cols, right_cols = which == 2 ? hidden_cols : cols;
    const unsigned high = tiles_of(down, Product::kRows);
    const int row = static_cast<int>(tile % high) * Product::kRows,
              col = static_cast<int>(tile / high) * Product::kCols;
    T* out = static_cast<T*>(which == 0 ? p.dgate_proj : which == 1 ? p.dup_proj : p.ddown_proj);
    const Group group = group_of(p.offsets, e, rows);
    const Operand<T> left = which == 2 ? tokens : rows_of, right = which == 2 ? rows_of : tokens;
    Product product;
    product.clear();
    product.add(shared, left, row, down, right, col, right_cols, group.begin, group.end);
    store_tile(product, out + e * p.cols * p.hidden_cols, row, down, col, right_cols);
  }
}

template <typename T>
void backward(const MoeExpertsBwdParams& p, Stream stream) {
  const ExpertWeights& w = p.experts_weights;
  const int64_t rows = p.tokens * p.top_k, cols = p.cols, hidden_cols = p.hidden_cols;
  const Size3 per_row{static_cast<unsigned>(ceil_div(rows, kThreads))};
  zero_memory(p.token_of, static_cast<size_t>(rows) * sizeof(int32_t), stream);
  zero_memory(p.weight_of, static_cast<size_t>(rows) * sizeof(float), stream);
  launch(moe_experts_rows_kernel, {.grid = per_row, .block = {kThreads}}, stream, p);

  const auto run = [&](auto product, auto kernel, int64_t out_cols) {
    using Product = decltype(product);
    const int64_t across = ceil_div(out_cols, Product::kCols);
    const int64_t tiles = most_group_tiles(rows, p.experts, Product::kRows, across);
    launch(kernel,
           {.grid = {persistent_blocks(tiles, 2)}, .block = {kGemmThreads}, .shared_bytes = Product::kSharedBytes},
           stream, p, static_cast<int>(rows), static_cast<int>(across));
  };
  // A weight as the right operand of a product with its transpose.
  const auto projection = [](const void* data, int64_t outer, int64_t depth, const StackStrides& s) {
    return layout_of<T>(data, outer, depth, s.col, s.row, s.stack);
  };
  const Layout dy = layout_of<T>(p.dy, p.tokens, cols, p.dy_stride, 1);
  const Layout x = layout_of<T>(p.x, p.tokens, cols, p.x_stride, 1);
  const Layout hidden = layout_of<T>(p.dgate, rows, hidden_cols, hidden_cols, 1);
  const bool hopper = on_hopper();
  if (!hopper || !moe_experts_dhidden_sm90(p, stream))
    with_layouts(dy, projection(w.down, hidden_cols, cols, w.down_strides), [&]<Layout kDy, Layout kW>() {
      run(TileProduct<T, kDy, kW>{}, moe_experts_dhidden_kernel<T, kDy, kW>, hidden_cols);
    });
  const Layout gate = projection(w.gate, cols, hidden_cols, w.gate_strides);
  const bool alike = gate == projection(w.up, cols, hidden_cols, w.up_strides) && w.gate_strides == w.up_strides;
  if (!hopper || !moe_experts_dx_sm90(p, stream))
    with_layouts(hidden, alike ? gate : Layout::any, [&]<Layout kLeft, Layout kW>() {
      run(TileProduct<T, kLeft, kW>{}, moe_experts_dx_kernel<T, kLeft, kW>, cols);
    });
  combine<T>({p.tokens, p.top_k, cols, p.dx_rows, nullptr, p.slots, p.dx}, stream);
  launch(moe_experts_dweights_kernel, {.grid = per_row, .block = {kThreads}}, stream, p);

  const auto weight_gradients = [&]<Layout kBoth>() {
    using Product = TileProduct<T, kBoth, kBoth>;
    const auto tiles = [](int64_t down, int64_t across) {
      return ceil_div(down, Product::kRows) * ceil_div(across, Product::kCols);
    };
    const int64_t of_gate = tiles(hidden_cols, cols), of_expert = 2 * of_gate + tiles(cols, hidden_cols);
    launch(moe_experts_wgrad_kernel<T, kBoth>,
           {.grid = {persistent_blocks(p.experts * of_expert, 2)},
            .block = {kGemmThreads},
            .shared_bytes = Product::kSharedBytes},
           stream, p, static_cast<int>(rows), static_cast<unsigned>(of_gate), static_cast<unsigned>(of_expert));
  };
  if (hopper && moe_experts_wgrad_sm90(p, stream)) return;
  const bool dense = dy == Layout::along_depth && x == Layout::along_depth && hidden == Layout::along_depth;
  dense ? weight_gradients.template operator()<Layout::along_outer>()
        : weight_gradients.template operator()<Layout::any>();
}

}  // namespace

void moe_experts_bwd_cuda(const MoeExpertsBwdParams& p, Stream stream) {
  check_sizes("moe_experts", p.tokens * p.top_k, p.experts, p.cols, p.hidden_cols);
  GK_SWITCH_DTYPE(p.dtype, T, backward<T>(p, stream));
}

}  // namespace grokkernels
