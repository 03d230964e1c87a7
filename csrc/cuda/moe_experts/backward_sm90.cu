// moe_experts backward on Hopper: its three kinds of matrix products, for bfloat16 and float16; see gemm_sm90.cuh for
// the product and backward.cu for what is computed and for every other case.
//
//   dhidden   g = dy_n down_e, tokens gathered as rows of the left operand, and in the epilogue dgate, dup, w hidden
//   and
//             the parts of g . hidden
//   dx        dgate gate_e + dup up_e: one sum over 2 F, whose first half reads dgate and gate_e, the second dup and
//   up_e wgrad     dgate_e^T x_e and dup_e^T x_e with x gathered along the sum as the right operand, dy_e^T (w
//   hidden)_e with
//             dy gathered as the left one
#include "cuda/activation.cuh"
#include "cuda/groups.cuh"
#include "cuda/moe_experts/backward_sm90.h"
#include "cuda/moe_experts/differentiate.cuh"
#include "cuda/moe_experts/gather_sm90.cuh"

namespace grokkernels {
namespace {

using namespace device;

// Calls fn(tile, its first row of this block) for the tiles of this block.
template <typename Product, typename Fn>
GK_DEVICE void for_each_tile(const MoeExpertsBwdParams& p, int cols, int rank, Fn fn) {
  const GroupTiles<Product::kRows * Product::kCluster> tiles{p.offsets, static_cast<int>(p.experts),
                                                             static_cast<int>(p.tokens * p.top_k),
                                                             (cols + Product::kCols - 1) / Product::kCols};
  GroupTile t;
  for (unsigned i = blockIdx.x / Product::kCluster; tiles.find(i, t); i += gridDim.x / Product::kCluster)
    fn(t, t.row + rank * Product::kRows);
}

// From g, one tile of a warpgroup: dgate, dup, w hidden, and the tile's parts of g . hidden.
template <Activation kKind, typename T, typename Product>
GK_DEVICE void differentiate_tile(float (&sum)[Product::kCols / 2], const MoeExpertsBwdParams& p, int row, int row_end,
                                  int col) {
  constexpr int kTiles = kMoeDotColsDevice / 8;  // of 8 columns in a part: those of one dot
  const int cols = static_cast<int>(p.hidden_cols);
  const bool wide = cols % 8 == 0;
  const int64_t dots = (cols + kMoeDotColsDevice - 1) / kMoeDotColsDevice;  // of a row
  const auto first_col = [](int j) { return j * 8; };
  in_parts<Product::kCols / 8 / kTiles, 4 * kTiles>(sum, [&](int part) {
    const int first = col + part * kTiles * 8, count = cols - first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + Product::row_of(half);
      const bool inside = r < row_end;
      const int64_t place = int64_t{r} * cols + first;
      const float weight = inside ? p.weight_of[r] : 0.0f;
      float gate[kTiles][2], up[kTiles][2], hidden[kTiles][2];
      load_tile_row(static_cast<const T*>(p.gate) + place, inside, wide, count, first_col, gate);
      load_tile_row(static_cast<const T*>(p.up) + place, inside, wide, count, first_col, up);
      const auto g = [&sum, half](int j, int c) { return sum[4 * j + 2 * half + c]; };
      const float dot = differentiate_row<kKind>(g, weight, gate, up, hidden);
      if (inside && count > 0 && lane_id() % 4 == 0) p.dots[r * dots + first / kMoeDotColsDevice] = dot;
      store_tile_row(static_cast<T*>(p.dgate) + place, inside, wide, count, first_col, gate);
      store_tile_row(static_cast<T*>(p.dup) + place, inside, wide, count, first_col, up);
      store_tile_row(static_cast<T*>(p.scaled_hidden) + place, inside, wide, count, first_col, hidden);
    }
  });
}

template <typename T, int kCluster>
using Dhidden = WarpgroupGemm<T, false, true, 128, kCluster>;

template <typename T, int kCluster>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    moe_experts_dhidden_sm90_kernel(const __grid_constant__ MoeExpertsBwdParams p,
                                    const __grid_constant__ TensorMap down) {
  using Product = Dhidden<T, kCluster>;
  const int depth = static_cast<int>(p.cols), cols = static_cast<int>(p.hidden_cols);
  const int steps = (depth + Product::kStep - 1) / Product::kStep;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  auto ring = Product::start(kGatherArrivals);
  if (warpgroup_id() == 0) {
    registers_give<kGatherRegisters>();
    LateArrival<Product> arrival(ring);
    for_each_tile<Product>(p, cols, rank, [&](const GroupTile& t, int row) {
      const TokenRows<T, Product> tokens(p.dy, p.dy_stride, depth, p.token_of, row, t.end);
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(ring.empty(), ring.parity ^ 1);
        if (threadIdx.x < 32 && elect_one()) {
          mbarrier_arrive_expect(ring.full(), Product::Right::kBytes);
          Product::load_right(ring, down, t.across * Product::kCols, step * Product::kStep, t.group);
        }
        tokens.copy(ring.left().base, step);
        arrival.commit();
        ring.next();
      }
    });
    arrival.finish();
  } else {
    registers_take<kGatheredRegisters>();
    for_each_tile<Product>(p, cols, rank, [&](const GroupTile& t, int row) {
      const int col = t.across * Product::kCols;
      float sum[Product::kCols / 2];
      Product::multiply(ring, steps, row + (warpgroup_id() - 1) * 64 < t.end, sum);
      switch (p.activation) {
        case Activation::gelu_tanh:
          differentiate_tile<Activation::gelu_tanh, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::gelu:
          differentiate_tile<Activation::gelu, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::silu:
          differentiate_tile<Activation::silu, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::relu:
          differentiate_tile<Activation::relu, T, Product>(sum, p, row, t.end, col);
          break;
      }
    });
  }
  Product::finish();
}

// dx_rows (M, C), float32. A sum of 2 F, its halves rounded up to whole steps.
template <typename T, int kCols, int kCluster>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    moe_experts_dx_sm90_kernel(const __grid_constant__ MoeExpertsBwdParams p, const __grid_constant__ TensorMap dgate,
                               const __grid_constant__ TensorMap dup, const __grid_constant__ TensorMap gate,
                               const __grid_constant__ TensorMap up) {
  using Product = WarpgroupGemm<T, false, true, kCols, kCluster>;
  const int cols = static_cast<int>(p.cols);
  const int half = (static_cast<int>(p.hidden_cols) + Product::kStep - 1) / Product::kStep;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  auto ring = Product::start();
  if (warpgroup_id() == 0) {
    registers_give<kCopyRegisters>();
    if (threadIdx.x < 32)
      for_each_tile<Product>(p, cols, rank, [&](const GroupTile& t, int row) {
        Product::copy(ring, 2 * half, [&](const auto& slot, int step) {
          const bool of_up = step >= half;
          const int depth = (of_up ? step - half : step) * Product::kStep;
          slot.left().load(of_up ? dup : dgate, slot.full(), row, depth);
          Product::load_right(slot, of_up ? up : gate, t.across * kCols, depth, t.group);
        });
      });
  } else {
    registers_take<kMultiplyRegisters>();
    for_each_tile<Product>(p, cols, rank, [&](const GroupTile& t, int row) {
      float sum[kCols / 2];
      Product::multiply(ring, 2 * half, row + (warpgroup_id() - 1) * 64 < t.end, sum);
      store_sums<Product>(sum, p.dx_rows, row, t.end, t.across * kCols, cols);
    });
  }
  Product::finish();
}

// One operand of a product over the rows of an expert comes through the copy engine, the other is gathered.
// kTokensLeft: out[e] (C, F) = dy_e^T scaled_hidden_e. Else out[e] (F, C) = dgate_e^T x_e, then the same of dup.
template <typename T, bool kTokensLeft>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    moe_experts_wgrad_sm90_kernel(const __grid_constant__ MoeExpertsBwdParams p,
                                  const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second) {
  using Product = WarpgroupGemm<T, true, true, 256, 1>;
  using Tokens = TokenColumns<T, Product, kTokensLeft ? Product::kRows : Product::kCols>;
  constexpr unsigned kOutputs = kTokensLeft ? 1 : 2;
  const int rows = static_cast<int>(p.tokens * p.top_k), token_cols = static_cast<int>(p.cols);
  const int depth = static_cast<int>(kTokensLeft ? p.cols : p.hidden_cols);
  const int cols = static_cast<int>(kTokensLeft ? p.hidden_cols : p.cols);
  const unsigned down = static_cast<unsigned>((depth + Product::kRows - 1) / Product::kRows);
  const unsigned of_output = down * static_cast<unsigned>((cols + Product::kCols - 1) / Product::kCols);
  // Calls fn(expert, which output, its rows, steps, first row and column of the tile) for this block's tiles.
  const auto for_each = [&](auto fn) {
    for (unsigned i = blockIdx.x; i < static_cast<unsigned>(p.experts) * kOutputs * of_output; i += gridDim.x) {
      const unsigned output = i / of_output, local = i % of_output;
      const Group group = group_of(p.offsets, output / kOutputs, rows);
      fn(output / kOutputs, output % kOutputs, group, (group.end - group.begin + Product::kStep - 1) / Product::kStep,
         static_cast<int>(local % down) * Product::kRows, static_cast<int>(local / down) * Product::kCols);
    }
  };
  auto ring = Product::start(kGatherArrivals);
  if (warpgroup_id() == 0) {
    registers_give<kGatherRegisters>();
    LateArrival<Product> arrival(ring);
    for_each([&](unsigned, unsigned which, Group group, int steps, int row, int col) {
      const Tokens tokens(kTokensLeft ? p.dy : p.x, kTokensLeft ? p.dy_stride : p.x_stride, token_cols, p.token_of,
                          group.begin, group.end, kTokensLeft ? row : col);
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(ring.empty(), ring.parity ^ 1);
        if (threadIdx.x < 32 && elect_one()) {
          const int begin = group.begin + step * Product::kStep;
          const TensorMap& map = which == 0 ? first : second;
          mbarrier_arrive_expect(ring.full(), kTokensLeft ? Product::Right::kBytes : Product::Left::kBytes);
          if constexpr (kTokensLeft)
            ring.right().load(map, ring.full(), col, begin);
          else
            ring.left().load(map, ring.full(), row, begin);
        }
        tokens.copy(kTokensLeft ? ring.left().base : ring.right().base, step);
        arrival.commit();
        ring.next();
      }
    });
    arrival.finish();
  } else {
    registers_take<kGatheredRegisters>();
    for_each([&](unsigned e, unsigned which, Group group, int steps, int row, int col) {
      float sum[Product::kCols / 2];
      Product::multiply(ring, steps, row + (warpgroup_id() - 1) * 64 < depth, sum, [&](const auto& slot, int step) {
        const int left = group.end - group.begin - step * Product::kStep;
        if (left >= Product::kStep) return;
        if constexpr (kTokensLeft)
          clear_rows(slot.right(), left);
        else
          clear_rows(slot.left(), left);
        rows_cleared();
      });
      void* out = kTokensLeft ? p.ddown_proj : which == 0 ? p.dgate_proj : p.dup_proj;
      store_sums<Product>(sum, static_cast<T*>(out) + int64_t{e} * depth * cols, row, depth, col, cols);
    });
  }
  Product::finish();
}

// Host.
bool gatherable(const void* data, int64_t stride, int64_t cols) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0 && cols % 8 == 0;
}

bool large(const MoeExpertsBwdParams& p) { return p.tokens * p.top_k >= kLargeGroup * p.experts; }

template <typename Product>
LaunchShape shape_of(const MoeExpertsBwdParams& p, int64_t cols) {
  const int64_t tiles = most_group_tiles(p.tokens * p.top_k, p.experts, Product::kRows * Product::kCluster,
                                         ceil_div(cols, Product::kCols));
  return {.grid = {persistent_clusters(tiles, Product::kCluster)},
          .block = {kWarpgroupGemmThreads},
          .shared_bytes = Product::kSharedBytes,
          .cluster = Product::kCluster};
}

template <typename T, int kCluster>
bool dhidden(const MoeExpertsBwdParams& p, Stream stream) {
  using Product = Dhidden<T, kCluster>;
  const ExpertWeights& w = p.experts_weights;
  const TensorTiles down = matrix_tiles(p.dtype, w.down, p.hidden_cols, p.cols, p.experts, w.down_strides.row,
                                        w.down_strides.stack, Product::RightPart::kBox);
  if (w.down_strides.col != 1 || tensor_tiles_refusal(down)) return false;
  launch(moe_experts_dhidden_sm90_kernel<T, kCluster>, shape_of<Product>(p, p.hidden_cols), stream, p,
         make_tensor_map(down));
  return true;
}

template <typename T, int kCols, int kCluster>
bool dx(const MoeExpertsBwdParams& p, Stream stream) {
  using Product = WarpgroupGemm<T, false, true, kCols, kCluster>;
  const ExpertWeights& w = p.experts_weights;
  const auto left = [&](const void* data) {
    return matrix_tiles(p.dtype, data, p.hidden_cols, p.tokens * p.top_k, 0, p.hidden_cols, 0, Product::Left::kBox);
  };
  const auto right = [&](const void* data, const StackStrides& s) {
    return matrix_tiles(p.dtype, data, p.cols, p.hidden_cols, p.experts, s.row, s.stack, Product::RightPart::kBox);
  };
  const TensorTiles all[] = {left(p.dgate), left(p.dup), right(w.gate, w.gate_strides), right(w.up, w.up_strides)};
  if (w.gate_strides.col != 1 || w.up_strides.col != 1) return false;
  for (const TensorTiles& tiles : all)
    if (tensor_tiles_refusal(tiles)) return false;
  launch(moe_experts_dx_sm90_kernel<T, kCols, kCluster>, shape_of<Product>(p, p.cols), stream, p,
         make_tensor_map(all[0]), make_tensor_map(all[1]), make_tensor_map(all[2]), make_tensor_map(all[3]));
  return true;
}

template <typename T>
bool wgrad(const MoeExpertsBwdParams& p, Stream stream) {
  using Product = WarpgroupGemm<T, true, true, 256, 1>;
  const auto tiles = [&](const void* data, const int(&box)[2]) {
    return matrix_tiles(p.dtype, data, p.hidden_cols, p.tokens * p.top_k, 0, p.hidden_cols, 0, box);
  };
  const TensorTiles dgate = tiles(p.dgate, Product::Left::kBox), dup = tiles(p.dup, Product::Left::kBox);
  const TensorTiles hidden = tiles(p.scaled_hidden, Product::Right::kBox);
  if (tensor_tiles_refusal(dgate) || tensor_tiles_refusal(dup) || tensor_tiles_refusal(hidden)) return false;
  const auto shape = [&](int64_t depth, int64_t cols, int64_t outputs) -> LaunchShape {
    const int64_t count = p.experts * outputs * ceil_div(depth, Product::kRows) * ceil_div(cols, Product::kCols);
    return {.grid = {persistent_clusters(count, 1)},
            .block = {kWarpgroupGemmThreads},
            .shared_bytes = Product::kSharedBytes};
  };
  launch(moe_experts_wgrad_sm90_kernel<T, false>, shape(p.hidden_cols, p.cols, 2), stream, p, make_tensor_map(dgate),
         make_tensor_map(dup));
  launch(moe_experts_wgrad_sm90_kernel<T, true>, shape(p.cols, p.hidden_cols, 1), stream, p, make_tensor_map(hidden),
         make_tensor_map(hidden));
  return true;
}

// f.template operator()<T>() for the types that wgmma takes; false for others.
template <typename F>
bool with_type(DType dtype, const F& f) {
  if (dtype == DType::bfloat16) return f.template operator()<bfloat16>();
  if (dtype == DType::float16) return f.template operator()<float16>();
  return false;
}

}  // namespace

bool moe_experts_dhidden_sm90(const MoeExpertsBwdParams& p, Stream stream) {
  if (!gatherable(p.dy, p.dy_stride, p.cols)) return false;
  return with_type(p.dtype,
                   [&]<typename T>() { return large(p) ? dhidden<T, 2>(p, stream) : dhidden<T, 1>(p, stream); });
}

bool moe_experts_dx_sm90(const MoeExpertsBwdParams& p, Stream stream) {
  return with_type(p.dtype,
                   [&]<typename T>() { return large(p) ? dx<T, 256, 2>(p, stream) : dx<T, 128, 1>(p, stream); });
}

bool moe_experts_wgrad_sm90(const MoeExpertsBwdParams& p, Stream stream) {
  if (!gatherable(p.dy, p.dy_stride, p.cols) || !gatherable(p.x, p.x_stride, p.cols)) return false;
  return with_type(p.dtype, [&]<typename T>() { return wgrad<T>(p, stream); });
}

}  // namespace grokkernels
