// moe_experts forward: y_n (C) = sum over k of weights[n,k] * down_e(act(gate_e x_n) * up_e x_n), e = indices[n,k].
// With M = N * K rows in expert order:
//
//   slots, offsets, token_of                              the order by expert (expert_order.cu)
//   hidden (M, F) = act(x gate_e^T) * (x up_e^T)          one kernel: a tile of gate and the same of up in registers
//   down (M, C) = hidden down_e^T                         float32
//   y_n = sum over k of weights[n,k] * down[slots[n,k]]   in the order k = 0, 1, ...: bitwise repeatable, no atomics
//
// The tokens are gathered as they are copied to shared memory, so that no permuted copy of x exists, and the activation
// is applied before gate and up leave the registers: what SonicMoE (Guo et al. 2025) does. 6 M F C operations.
#include "common/expert_order.h"
#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"
#include "cuda/grouped_mm/grouped_mm_sm90.h"
#include "cuda/groups.cuh"
#include "cuda/moe_experts/combine.cuh"
#include "cuda/moe_experts/forward_sm90.h"
#include "moe_experts.h"

namespace grokkernels {
namespace {

using namespace device;

// One tile: hidden, and gate and up where the backward pass will ask for them.
template <Activation kKind, typename T, typename Product>
GK_DEVICE void activate_tile(Product& product, const MoeExpertsFwdParams& p, int row, int row_end, int col) {
  constexpr int kTiles = Product::kAcross / 2;  // of gate; the others are of up
  const int cols = static_cast<int>(p.hidden_cols), count = cols - col;
  const bool wide = cols % kVector<T> == 0;
  product.each_row([&](int row_of_tile, int, const auto& x) {
    const int r = row + row_of_tile;
    const bool inside = r < row_end;
    const int64_t place = int64_t{r} * cols + col;
    float gate[kTiles][2], up[kTiles][2], hidden[kTiles][2];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        gate[j][c] = x[2 * j + c];
        up[j][c] = x[2 * (j + kTiles) + c];
        hidden[j][c] = activate<kKind>(gate[j][c]) * up[j][c];
      }
    store_tile_row(static_cast<T*>(p.hidden) + place, inside, wide, count, Product::first_col, hidden);
    if (p.gate == nullptr) return;
    store_tile_row(static_cast<T*>(p.gate) + place, inside, wide, count, Product::first_col, gate);
    store_tile_row(static_cast<T*>(p.up) + place, inside, wide, count, Product::first_col, up);
  });
}

template <typename T, Layout kX, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    moe_experts_gate_up_kernel(const __grid_constant__ MoeExpertsFwdParams p, int rows, int across) {
  using Product = TileProduct<T, kX, kW, true>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int cols = static_cast<int>(p.hidden_cols), experts = static_cast<int>(p.experts);
  const ExpertWeights& w = p.experts_weights;
  const GroupTiles<Product::kRows> tiles{p.offsets, experts, rows, across};
  GroupTile t;
  for (unsigned i = blockIdx.x; tiles.find(i, t); i += gridDim.x) {
    const Operand<T> x{static_cast<const T*>(p.x), p.x_stride, 1, p.token_of};
    const auto projection = [&](const void* data, const StackStrides& s) {
      return Operand<T>{static_cast<const T*>(data) + t.group * s.stack, s.row, s.col};
    };
    const int col = t.across * Product::kCols;
    Product product;
    product.clear();
    product.add(shared, x, t.row, t.end, projection(w.gate, w.gate_strides), projection(w.up, w.up_strides), col, cols,
                0, static_cast<int>(p.cols));
    switch (p.activation) {
      case Activation::gelu_tanh:
        activate_tile<Activation::gelu_tanh, T>(product, p, t.row, t.end, col);
        break;
      case Activation::gelu:
        activate_tile<Activation::gelu, T>(product, p, t.row, t.end, col);
        break;
      case Activation::silu:
        activate_tile<Activation::silu, T>(product, p, t.row, t.end, col);
        break;
      case Activation::relu:
        activate_tile<Activation::relu, T>(product, p, t.row, t.end, col);
        break;
    }
  }
  if (p.gate == nullptr) return;
  for (int row = rows_used(p.offsets, experts, rows) + static_cast<int>(blockIdx.x); row < rows; row += gridDim.x)
    for (int c = threadIdx.x; c < cols; c += kGemmThreads) {
      static_cast<T*>(p.gate)[int64_t{row} * cols + c] = narrow<T>(0.0f);
      static_cast<T*>(p.up)[int64_t{row} * cols + c] = narrow<T>(0.0f);
    }
}

template <typename T, Layout kHidden, Layout kW>
__global__ void __launch_bounds__(kGemmThreads, 2)
    moe_experts_down_kernel(const __grid_constant__ MoeExpertsFwdParams p, int rows, int across) {
  using Product = TileProduct<T, kHidden, kW>;
  const uint32_t shared = shared_address(dynamic_shared());
  const int cols = static_cast<int>(p.cols), experts = static_cast<int>(p.experts);
  const StackStrides& s = p.experts_weights.down_strides;
  const GroupTiles<Product::kRows> tiles{p.offsets, experts, rows, across};
  GroupTile t;
  for (unsigned i = blockIdx.x; tiles.find(i, t); i += gridDim.x) {
    const Operand<T> hidden{static_cast<const T*>(p.hidden), p.hidden_cols, 1};
    const Operand<T> projection{static_cast<const T*>(p.experts_weights.down) + t.group * s.stack, s.row, s.col};
    const int col = t.across * Product::kCols;
    Product product;
    product.clear();
    product.add(shared, hidden, t.row, t.end, projection, col, cols, 0, static_cast<int>(p.hidden_cols));
    store_tile(product, p.down, t.row, t.end, col, cols);
  }
}

template <typename T>
void forward(const MoeExpertsFwdParams& p, Stream stream) {
  const ExpertWeights& w = p.experts_weights;
  const int64_t rows = p.tokens * p.top_k, cols = p.cols, hidden_cols = p.hidden_cols;
  order_by_expert_cuda({.tokens = p.tokens,
                        .top_k = p.top_k,
                        .experts = p.experts,
                        .capacity = p.capacity,
                        .indices = p.indices,
                        .slots = p.slots,
                        .offsets = p.offsets,
                        .token_of = p.token_of,
                        .counts = p.counts},
                       stream);
  const auto projection = [](const void* data, int64_t outer, int64_t depth, const StackStrides& s) {
    return layout_of<T>(data, outer, depth, s.row, s.col, s.stack);
  };
  const bool hopper = on_hopper();
  const auto run = [&](auto product, auto kernel, int64_t out_cols) {
    using Product = decltype(product);
    const int64_t across = ceil_div(out_cols, Product::kCols);
    const int64_t tiles = most_group_tiles(rows, p.experts, Product::kRows, across);
    launch(kernel,
           {.grid = {persistent_blocks(tiles, 2)}, .block = {kGemmThreads}, .shared_bytes = Product::kSharedBytes},
           stream, p, static_cast<int>(rows), static_cast<int>(across));
  };
  if (!hopper || !moe_experts_gate_up_sm90(p, stream)) {
    const Layout gate = projection(w.gate, hidden_cols, cols, w.gate_strides);
    const Layout up = projection(w.up, hidden_cols, cols, w.up_strides);
    with_layouts(layout_of<T>(p.x, p.tokens, cols, p.x_stride, 1), gate == up ? gate : Layout::any,
                 [&]<Layout kX, Layout kW>() {
                   run(TileProduct<T, kX, kW, true>{}, moe_experts_gate_up_kernel<T, kX, kW>, hidden_cols);
                 });
  }
  const GroupedMmParams down{.dtype = p.dtype,
                             .rows = rows,
                             .depth = hidden_cols,
                             .cols = cols,
                             .groups = p.experts,
                             .x = p.hidden,
                             .w = w.down,
                             .offsets = p.offsets,
                             .y = p.down,
                             .x_strides = {0, hidden_cols, 1},
                             .w_strides = {w.down_strides.stack, w.down_strides.col, w.down_strides.row}};
  if (!hopper || !grouped_mm_float_sm90(down, stream)) {
    with_layouts(layout_of<T>(p.hidden, rows, hidden_cols, hidden_cols, 1),
                 projection(w.down, cols, hidden_cols, w.down_strides), [&]<Layout kHidden, Layout kW>() {
                   run(TileProduct<T, kHidden, kW>{}, moe_experts_down_kernel<T, kHidden, kW>, cols);
                 });
  }
  combine<T>({p.tokens, p.top_k, cols, p.down, p.weights, p.slots, p.y}, stream);
}

}  // namespace

void moe_experts_fwd_cuda(const MoeExpertsFwdParams& p, Stream stream) {
  check_sizes("moe_experts", p.tokens * p.top_k, p.experts, p.cols, p.hidden_cols);
  GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p, stream));
}

}  // namespace grokkernels
