// moe_experts on the CPU: a counting sort of the (token, expert) pairs, then two grouped products whose packing gathers
// the tokens, so that no permuted copy of x exists; the activation is applied while a tile of gate and up is still in
// the cache. M = N * K rows in expert order.
//
//   hidden (M, F) = act(x gate_e^T) * (x up_e^T)          gate and up share the packed rows of x
//   down (M, C) = hidden down_e^T                         float32
//   y_n = sum over k of weights[n,k] * down[slots[n,k]]   in the order k = 0, 1, ...
//
// Backward, with g = dy_n down_e (the gradient of hidden before the weight w of its row):
//
//   dw = g . hidden, dup = w g act(gate), dgate = w g up act'(gate)      one pass, hidden computed again
//   dx_n = sum over k of (dgate gate_e + dup up_e)[slots[n,k]]
//   dgate_proj_e = dgate_e^T x_e, dup_proj_e = dup_e^T x_e, ddown_proj_e = dy_e^T (w hidden)_e
//
// Replaces moe_permute -> grouped_mm (twice) -> gated_activation -> grouped_mm -> moe_unpermute. Work is shared out
// tile by tile over all experts, so a single large group keeps every core busy, and one token's weights are streamed
// by all of them. Only experts that have tokens are read. Gathering in the load and the activation in the epilogue are
// what SonicMoE (Guo et al. 2025) does on GPUs.
#include "moe_experts.h"

#include "cpu/activation.h"
#include "cpu/expert_order.h"
#include "cpu/groups.h"
#include "cpu/launch.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

static_assert(Block<float>::kNarrow % kMoeDotCols == 0 && kMoeDotCols % kLanes == 0);

template <typename T>
Strided<T> matrix(const void* data, const StackStrides& strides, int64_t e) {
  return {static_cast<const T*>(data) + e * strides.stack, strides.row, strides.col};
}

// Dense rows of `cols` elements.
template <typename T>
Strided<T> rows_of(const void* data, int64_t cols) {
  return {static_cast<const T*>(data), cols, 1};
}

int64_t rows_used(const int32_t* offsets, int64_t experts, int64_t rows) {
  return experts == 0 ? 0 : group_of(offsets, experts - 1, rows).end;
}

// The rows of `tile` in a (M, F) tensor: from its first element, F elements apart.
template <typename T>
T* tile_rows(void* data, const Tile& t, int64_t cols) {
  return static_cast<T*>(data) + t.row * cols + t.col;
}

// hidden = act(gate) * up for one tile, gate and up kept when the backward pass will ask for them.
template <Activation kKind, typename T>
void activate_tile(const Tile& t, const float* gate, const float* up, const MoeExpertsFwdParams& p) {
  T* hidden = tile_rows<T>(p.hidden, t, p.hidden_cols);
  T* kept_gate = p.gate == nullptr ? nullptr : tile_rows<T>(p.gate, t, p.hidden_cols);
  T* kept_up = p.gate == nullptr ? nullptr : tile_rows<T>(p.up, t, p.hidden_cols);
  for (int64_t i = 0; i < t.rows; ++i) {
    for_vectors(0, t.cols, [&](int64_t c, auto n) {
      const vf g = load_n(gate + i * Block<T>::kStride + c, n), u = load_n(up + i * Block<T>::kStride + c, n);
      store_n(hidden + i * p.hidden_cols + c, value_and_slope<kKind>(g).value * u, n);
      if (kept_gate == nullptr) return;
      store_n(kept_gate + i * p.hidden_cols + c, g, n);
      store_n(kept_up + i * p.hidden_cols + c, u, n);
    });
  }
}

template <typename T>
void forward(const MoeExpertsFwdParams& p) {
  const int64_t rows = p.tokens * p.top_k, hidden_cols = p.hidden_cols;
  order_by_expert(p.indices, rows, p.experts, p.capacity, p.slots, p.offsets);
  for (int64_t i = 0; i < rows; ++i)
    if (p.slots[i] >= 0) p.token_of[p.slots[i]] = static_cast<int32_t>(i / p.top_k);
  const ExpertWeights& w = p.experts_weights;
  {
    const Strided<T> x{static_cast<const T*>(p.x), p.x_stride, 1, p.token_of};
    const GroupTiles<T> tiles(p.offsets, p.experts, rows, hidden_cols);
    parallel_tasks(tiles.count(), 2 * tile_cost(tiles.count(), rows, p.experts, p.cols, hidden_cols), [&](int64_t i) {
      const Tile t = tiles[i];
      float* gate = Block<T>::scratch(1);
      float* up = Block<T>::scratch(2);
      const Strided<T> projections[] = {matrix<T>(w.gate, w.gate_strides, t.group).transposed().from(0, t.col),
                                        matrix<T>(w.up, w.up_strides, t.group).transposed().from(0, t.col)};
      gemm_shared(t.rows, t.cols, p.cols, x.from(t.row, 0), projections, {gate, up}, Block<T>::kStride, false);
      with_activation(p.activation, [&]<Activation kKind>() { activate_tile<kKind, T>(t, gate, up, p); });
    });
  }
  {
    const Strided<T> hidden = rows_of<T>(p.hidden, hidden_cols);
    const GroupTiles<T> tiles(p.offsets, p.experts, rows, p.cols);
    parallel_tasks(tiles.count(), tile_cost(tiles.count(), rows, p.experts, p.cols, hidden_cols), [&](int64_t i) {
      const Tile t = tiles[i];
      const Strided<T> projection = matrix<T>(w.down, w.down_strides, t.group).transposed().from(0, t.col);
      float* down = Block<T>::scratch(1);
      gemm(t.rows, t.cols, hidden_cols, hidden.from(t.row, 0), projection, down, Block<T>::kStride, false);
      store_tile(down, Block<T>::kStride, t.rows, t.cols, p.down + t.row * p.cols + t.col, p.cols);
    });
  }
  weighted_sum<true>(p.tokens, p.top_k, p.cols, p.down, p.cols, p.weights, p.slots, static_cast<T*>(p.y));
  if (p.gate == nullptr) return;
  const int64_t used = rows_used(p.offsets, p.experts, rows);
  clear(static_cast<T*>(p.gate) + used * hidden_cols, (rows - used) * hidden_cols);
  clear(static_cast<T*>(p.up) + used * hidden_cols, (rows - used) * hidden_cols);
}

// From g, one tile: dgate, dup, scaled_hidden and the tile's parts of g . hidden.
template <Activation kKind, typename T>
void differentiate_tile(const Tile& t, const float* g_tile, const MoeExpertsBwdParams& p) {
  const int64_t hidden_cols = p.hidden_cols;
  const T* gate = static_cast<const T*>(p.gate) + t.row * hidden_cols + t.col;
  const T* up = static_cast<const T*>(p.up) + t.row * hidden_cols + t.col;
  T* dgate = tile_rows<T>(p.dgate, t, hidden_cols);
  T* dup = tile_rows<T>(p.dup, t, hidden_cols);
  T* scaled_hidden = tile_rows<T>(p.scaled_hidden, t, hidden_cols);
  const int64_t parts = ceil_div(hidden_cols, kMoeDotCols);
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t row = i * hidden_cols;
    const vf weight = set1(p.weight_of[t.row + i]);
    for (int64_t begin = 0; begin < t.cols; begin += kMoeDotCols) {
      vf dot = zero();
      for_vectors(0, t.cols - begin < kMoeDotCols ? t.cols - begin : kMoeDotCols, [&](int64_t offset, auto n) {
        const int64_t c = begin + offset;
        const vf u = load_n(up + row + c, n);
        const ValueAndSlope act = value_and_slope<kKind>(load_n(gate + row + c, n));
        const vf g = load_n(g_tile + i * Block<T>::kStride + c, n);
        const vf weighted = g * weight, hidden = act.value * u;
        dot = fma(g, hidden, dot);
        store_n(dgate + row + c, weighted * u * act.slope, n);
        store_n(dup + row + c, weighted * act.value, n);
        store_n(scaled_hidden + row + c, hidden * weight, n);
      });
      p.dots[(t.row + i) * parts + (t.col + begin) / kMoeDotCols] = reduce_add(dot);
    }
  }
}

// One of the three weight gradients: dw[e] (down, across) = left_e^T right_e, the sum over the rows of group e.
template <typename T>
struct WeightGradient {
  int64_t down, across;
  Strided<T> left, right;
  T* dw;
  int64_t tiles() const { return ceil_div(down, Block<T>::kRows) * ceil_div(across, Block<T>::kCols); }

  void tile(int64_t index, int64_t e, const Group& group) const {
    const int64_t tiles_across = ceil_div(across, Block<T>::kCols);
    const int64_t row = index / tiles_across * Block<T>::kRows, col = index % tiles_across * Block<T>::kCols;
    const int64_t rows = down - row < Block<T>::kRows ? down - row : Block<T>::kRows;
    const int64_t cols = across - col < Block<T>::kCols ? across - col : Block<T>::kCols;
    float* out = Block<T>::scratch(1);
    gemm(rows, cols, group.size(), left.transposed().from(row, group.begin), right.from(group.begin, col), out,
         Block<T>::kStride, false);
    store_tile(out, Block<T>::kStride, rows, cols, dw + (e * down + row) * across + col, across);
  }
};

template <typename T>
void backward(const MoeExpertsBwdParams& p) {
  const int64_t rows = p.tokens * p.top_k, hidden_cols = p.hidden_cols;
  for (int64_t i = 0; i < rows; ++i) {
    p.token_of[i] = 0;
    p.weight_of[i] = 0.0f;
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t slot = p.slots[i];
    if (slot < 0 || slot >= rows) continue;
    p.token_of[slot] = static_cast<int32_t>(i / p.top_k);
    p.weight_of[slot] = p.weights[i];
  }
  const ExpertWeights& w = p.experts_weights;
  const Strided<T> x{static_cast<const T*>(p.x), p.x_stride, 1, p.token_of};
  const Strided<T> dy{static_cast<const T*>(p.dy), p.dy_stride, 1, p.token_of};
  const Strided<T> dgate = rows_of<T>(p.dgate, hidden_cols), dup = rows_of<T>(p.dup, hidden_cols);
  {
    const GroupTiles<T> tiles(p.offsets, p.experts, rows, hidden_cols);
    parallel_tasks(tiles.count(), tile_cost(tiles.count(), rows, p.experts, p.cols, hidden_cols), [&](int64_t i) {
      const Tile t = tiles[i];
      float* g = Block<T>::scratch(1);
      gemm(t.rows, t.cols, p.cols, dy.from(t.row, 0), matrix<T>(w.down, w.down_strides, t.group).from(0, t.col), g,
           Block<T>::kStride, false);
      with_activation(p.activation, [&]<Activation kKind>() { differentiate_tile<kKind, T>(t, g, p); });
    });
  }
  {
    const GroupTiles<T> tiles(p.offsets, p.experts, rows, p.cols);
    parallel_tasks(tiles.count(), 2 * tile_cost(tiles.count(), rows, p.experts, p.cols, hidden_cols), [&](int64_t i) {
      const Tile t = tiles[i];
      float* out = Block<T>::scratch(1);
      gemm(t.rows, t.cols, hidden_cols, dgate.from(t.row, 0), matrix<T>(w.gate, w.gate_strides, t.group).from(0, t.col),
           out, Block<T>::kStride, false);
      gemm(t.rows, t.cols, hidden_cols, dup.from(t.row, 0), matrix<T>(w.up, w.up_strides, t.group).from(0, t.col), out,
           Block<T>::kStride, true);
      store_tile(out, Block<T>::kStride, t.rows, t.cols, p.dx_rows + t.row * p.cols + t.col, p.cols);
    });
  }
  weighted_sum<false>(p.tokens, p.top_k, p.cols, p.dx_rows, p.cols, nullptr, p.slots, static_cast<T*>(p.dx));

  const int64_t parts = ceil_div(hidden_cols, kMoeDotCols);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t slot = p.slots[i];
    double total = 0.0;
    if (slot >= 0 && slot < rows)
      for (int64_t part = 0; part < parts; ++part) total += p.dots[slot * parts + part];
    p.dweights[i] = static_cast<float>(total);
  }

  const WeightGradient<T> gradients[] = {
      {hidden_cols, p.cols, dgate, x, static_cast<T*>(p.dgate_proj)},
      {hidden_cols, p.cols, dup, x, static_cast<T*>(p.dup_proj)},
      {p.cols, hidden_cols, dy, rows_of<T>(p.scaled_hidden, hidden_cols), static_cast<T*>(p.ddown_proj)}};
  const int64_t per_expert = gradients[0].tiles() + gradients[1].tiles() + gradients[2].tiles();
  const int64_t tasks = p.experts * per_expert;
  parallel_tasks(tasks, 3 * tile_cost(tasks, rows, p.experts, p.cols, hidden_cols), [&](int64_t task) {
    const int64_t e = task / per_expert;
    int64_t tile = task % per_expert;
    const WeightGradient<T>* gradient = gradients;
    for (; tile >= gradient->tiles(); ++gradient) tile -= gradient->tiles();
    gradient->tile(tile, e, group_of(p.offsets, e, rows));
  });
}

}  // namespace

void moe_experts_fwd(const MoeExpertsFwdParams& p) { GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p)); }

void moe_experts_bwd(const MoeExpertsBwdParams& p) { GK_SWITCH_DTYPE(p.dtype, T, backward<T>(p)); }

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(moe_experts_fwd, MoeExpertsFwdParams);
GK_CPU_LAUNCHER(moe_experts_bwd, MoeExpertsBwdParams);
