// moe_experts on Hopper, first half: hidden (M, F) = act(x gate_e^T) * (x up_e^T) for the M = N * K rows in expert
// order, for bfloat16 and float16; see gemm_sm90.cuh for the product and forward.cu for every other case. The second
// half, down (M, C) = hidden down_e^T, is grouped_mm's product.
//
// A tile is 128 rows and 128 columns of gate beside the same 128 of up, one wgmma of 256 columns; a thread gets both
// numbers of a place, and the activation is applied before they leave its registers. The copy engine brings gate and
// up; rows of x are gathered by the copying warpgroup with cp.async into the same swizzled slots, so that no permuted
// copy of x exists: the idea of SonicMoE (Guo et al. 2025). In a cluster of two blocks one brings gate and the other
// up, for both.
#include "cuda/activation.cuh"
#include "cuda/gemm.cuh"
#include "cuda/groups.cuh"
#include "cuda/moe_experts/forward_sm90.h"
#include "cuda/moe_experts/gather_sm90.cuh"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kHalf = 128;  // columns of gate in a tile, and of up

template <typename T, int kCluster>
using Gemm = WarpgroupGemm<T, false, false, 2 * kHalf, kCluster>;

// One tile of a warpgroup: hidden, and gate and up where the backward pass will ask for them.
template <Activation kKind, typename T, typename Product>
GK_DEVICE void activate_tile(float (&sum)[kHalf], const MoeExpertsFwdParams& p, int row, int row_end, int col) {
  constexpr int kTiles = 4, kOfUp = kHalf / 2;  // tiles of 8 columns in a part; the first sum of up
  const int cols = static_cast<int>(p.hidden_cols);
  const bool wide = cols % 8 == 0;
  const auto first_col = [](int j) { return j * 8; };
  in_parts<kHalf / 8 / kTiles, 4 * kTiles>(sum, [&](int part) {
    const int first = col + part * kTiles * 8, count = cols - first;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + Product::row_of(half);
      const bool inside = r < row_end;
      const int64_t place = int64_t{r} * cols + first;
      float gate[kTiles][2], up[kTiles][2], hidden[kTiles][2];
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          gate[j][c] = sum[4 * j + 2 * half + c];
          up[j][c] = sum[kOfUp + 4 * j + 2 * half + c];
          hidden[j][c] = activate<kKind>(gate[j][c]) * up[j][c];
        }
      store_tile_row(static_cast<T*>(p.hidden) + place, inside, wide, count, first_col, hidden);
      if (p.gate == nullptr) continue;
      store_tile_row(static_cast<T*>(p.gate) + place, inside, wide, count, first_col, gate);
      store_tile_row(static_cast<T*>(p.up) + place, inside, wide, count, first_col, up);
    }
  });
}

template <typename T, int kCluster>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    moe_experts_gate_up_sm90_kernel(const __grid_constant__ MoeExpertsFwdParams p,
                                    const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up) {
  using Product = Gemm<T, kCluster>;
  const int rows = static_cast<int>(p.tokens * p.top_k), cols = static_cast<int>(p.hidden_cols);
  const int experts = static_cast<int>(p.experts), depth = static_cast<int>(p.cols);
  const int steps = (depth + Product::kStep - 1) / Product::kStep;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  // Calls fn(tile, its first row of this block) for the tiles of this block.
  const auto for_each_tile = [&](auto fn) {
    const GroupTiles<Product::kRows * kCluster> tiles{p.offsets, experts, rows, (cols + kHalf - 1) / kHalf};
    GroupTile t;
    for (unsigned i = blockIdx.x / kCluster; tiles.find(i, t); i += gridDim.x / kCluster)
      fn(t, t.row + rank * Product::kRows);
  };
  auto ring = Product::start(kGatherArrivals);
  if (warpgroup_id() == 0) {
    registers_give<kGatherRegisters>();
    LateArrival<Product> arrival(ring);
    for_each_tile([&](const GroupTile& t, int row) {
      const TokenRows<T, Product> tokens(p.x, p.x_stride, depth, p.token_of, row, t.end);
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(ring.empty(), ring.parity ^ 1);
        if (threadIdx.x < 32 && elect_one()) {
          mbarrier_arrive_expect(ring.full(), Product::Right::kBytes);
          const auto half = [&](int which) {
            const MatrixTile<T, kHalf, Product::kStep, false> to{ring.right().base +
                                                                 which * Product::Right::kBytes / 2};
            const TensorMap& map = which == 0 ? gate : up;
            if constexpr (kCluster == 1)
              to.load(map, ring.full(), t.across * kHalf, step * Product::kStep, t.group);
            else
              to.load_multicast(map, ring.full(), 3, t.across * kHalf, step * Product::kStep, t.group);
          };
          if (kCluster == 1 || rank == 0) half(0);
          if (kCluster == 1 || rank == 1) half(1);
        }
        tokens.copy(ring.left().base, step);
        arrival.commit();
        ring.next();
      }
    });
    arrival.finish();
  } else {
    registers_take<kGatheredRegisters>();
    for_each_tile([&](const GroupTile& t, int row) {
      const int col = t.across * kHalf;
      float sum[kHalf];
      Product::multiply(ring, steps, row + (warpgroup_id() - 1) * 64 < t.end, sum);
      switch (p.activation) {
        case Activation::gelu_tanh:
          activate_tile<Activation::gelu_tanh, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::gelu:
          activate_tile<Activation::gelu, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::silu:
          activate_tile<Activation::silu, T, Product>(sum, p, row, t.end, col);
          break;
        case Activation::relu:
          activate_tile<Activation::relu, T, Product>(sum, p, row, t.end, col);
          break;
      }
    });
    if (p.gate != nullptr)
      for (int row = rows_used(p.offsets, experts, rows) + static_cast<int>(blockIdx.x); row < rows; row += gridDim.x)
        for (int c = static_cast<int>(threadIdx.x) - 128; c < cols; c += 256) {
          static_cast<T*>(p.gate)[int64_t{row} * cols + c] = narrow<T>(0.0f);
          static_cast<T*>(p.up)[int64_t{row} * cols + c] = narrow<T>(0.0f);
        }
  }
  Product::finish();
}

template <typename T, int kCluster>
bool launch_gate_up(const MoeExpertsFwdParams& p, Stream stream) {
  using Product = Gemm<T, kCluster>;
  const ExpertWeights& w = p.experts_weights;
  const auto tiles = [&](const void* data, const StackStrides& s) {
    return matrix_tiles(p.dtype, data, p.cols, p.hidden_cols, p.experts, s.row, s.stack,
                        MatrixTile<T, kHalf, Product::kStep, false>::kBox);
  };
  const TensorTiles gate = tiles(w.gate, w.gate_strides), up = tiles(w.up, w.up_strides);
  if (tensor_tiles_refusal(gate) || tensor_tiles_refusal(up)) return false;
  const int64_t across = (p.hidden_cols + kHalf - 1) / kHalf;
  const int64_t most = most_group_tiles(p.tokens * p.top_k, p.experts, Product::kRows * kCluster, across);
  launch(moe_experts_gate_up_sm90_kernel<T, kCluster>,
         {.grid = {persistent_clusters(most, kCluster)},
          .block = {kWarpgroupGemmThreads},
          .shared_bytes = Product::kSharedBytes,
          .cluster = kCluster},
         stream, p, make_tensor_map(gate), make_tensor_map(up));
  return true;
}

template <typename T>
bool gate_up(const MoeExpertsFwdParams& p, Stream stream) {
  return p.tokens * p.top_k >= kLargeGroup * p.experts ? launch_gate_up<T, 2>(p, stream)
                                                       : launch_gate_up<T, 1>(p, stream);
}

}  // namespace

bool moe_experts_gate_up_sm90(const MoeExpertsFwdParams& p, Stream stream) {
  const ExpertWeights& w = p.experts_weights;
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride % 8 == 0 && p.cols % 8 == 0;
  if (!aligned || w.gate_strides.col != 1 || w.up_strides.col != 1) return false;
  if (p.dtype == DType::bfloat16) return gate_up<bfloat16>(p, stream);
  if (p.dtype == DType::float16) return gate_up<float16>(p, stream);
  return false;
}

}  // namespace grokkernels
