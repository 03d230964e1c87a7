// grouped_mm on Hopper: y[r] (N) = x[r] (K) times w[e] (K, N) for the rows r of group e, and dw[e] (K, N) = x_e^T dy_e,
// for bfloat16 and float16. See gemm_sm90.cuh for the product and grouped_mm.cu for every other case.
//
// Groups end anywhere, and the copy engine takes boxes of 128 rows: rows of the next group are multiplied too and not
// stored (a product's rows do not see each other). In the gradient of w rows are summed over: there those past the end
// of the group are set to zero in shared memory, so that not even a NaN of another group comes through.
//
// Large groups take tiles of 128 x 256 and clusters of two, small ones 128 x 128 and more blocks.
#include "cuda/gemm.cuh"
#include "cuda/gemm_sm90.cuh"
#include "cuda/grouped_mm/grouped_mm_sm90.h"
#include "cuda/groups.cuh"

namespace grokkernels {
namespace {

using namespace device;

template <typename T, typename Y, bool kRightTransposed, int kCols, int kCluster>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    grouped_mm_sm90_kernel(const __grid_constant__ GroupedMmParams p, const __grid_constant__ TensorMap x,
                           const __grid_constant__ TensorMap w) {
  using Gemm = WarpgroupGemm<T, false, kRightTransposed, kCols, kCluster>;
  const int rows = static_cast<int>(p.rows), cols = static_cast<int>(p.cols), groups = static_cast<int>(p.groups);
  const int steps = (static_cast<int>(p.depth) + Gemm::kStep - 1) / Gemm::kStep;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  // Calls fn(tile, its first row of this block) for the tiles of this block.
  const auto for_each_tile = [&](auto fn) {
    const GroupTiles<Gemm::kRows * kCluster> tiles{p.offsets, groups, rows, (cols + kCols - 1) / kCols};
    GroupTile t;
    for (unsigned i = blockIdx.x / kCluster; tiles.find(i, t); i += gridDim.x / kCluster)
      fn(t, t.row + rank * Gemm::kRows);
  };
  auto ring = Gemm::start();
  if (warpgroup_id() == 0) {
    registers_give<kCopyRegisters>();
    if (threadIdx.x < 32)
      for_each_tile([&](const GroupTile& t, int row) {
        Gemm::copy(ring, steps, [&](const auto& slot, int step) {
          slot.left().load(x, slot.full(), row, step * Gemm::kStep);
          Gemm::load_right(slot, w, t.across * kCols, step * Gemm::kStep, t.group);
        });
      });
  } else {
    registers_take<kMultiplyRegisters>();
    for_each_tile([&](const GroupTile& t, int row) {
      float sum[kCols / 2];
      Gemm::multiply(ring, steps, row + (warpgroup_id() - 1) * 64 < t.end, sum);
      store_sums<Gemm>(sum, static_cast<Y*>(p.y), row, t.end, t.across * kCols, cols);
    });
    for (int row = rows_used(p.offsets, groups, rows) + static_cast<int>(blockIdx.x); row < rows; row += gridDim.x)
      for (int c = static_cast<int>(threadIdx.x) - 128; c < cols; c += 256)
        static_cast<Y*>(p.y)[int64_t{row} * cols + c] = narrow<Y>(0.0f);
  }
  Gemm::finish();
}

template <typename T, int kCols, int kCluster>
__global__ void __launch_bounds__(kWarpgroupGemmThreads, 1)
    grouped_mm_wgrad_sm90_kernel(const __grid_constant__ GroupedMmWgradParams p, const __grid_constant__ TensorMap x,
                                 const __grid_constant__ TensorMap dy) {
  using Gemm = WarpgroupGemm<T, true, true, kCols, kCluster>;
  constexpr int kClusterRows = Gemm::kRows * kCluster;
  const int rows = static_cast<int>(p.rows), depth = static_cast<int>(p.depth), cols = static_cast<int>(p.cols);
  const unsigned down = static_cast<unsigned>((depth + kClusterRows - 1) / kClusterRows);
  const unsigned of_group = down * static_cast<unsigned>((cols + kCols - 1) / kCols);
  const unsigned tiles = static_cast<unsigned>(p.groups) * of_group, clusters = gridDim.x / kCluster;
  const int rank = kCluster > 1 ? cluster_rank() : 0;
  // Calls fn(group number, its rows, steps, first row and column of the tile) for this block's tiles.
  const auto for_each_tile = [&](auto fn) {
    for (unsigned i = blockIdx.x / kCluster; i < tiles; i += clusters) {
      const unsigned e = i / of_group, local = i % of_group;
      const Group group = group_of(p.offsets, e, rows);
      fn(static_cast<int>(e), group, (group.end - group.begin + Gemm::kStep - 1) / Gemm::kStep,
         static_cast<int>(local % down) * kClusterRows + rank * Gemm::kRows, static_cast<int>(local / down) * kCols);
    }
  };
  auto ring = Gemm::start();
  if (warpgroup_id() == 0) {
    registers_give<kCopyRegisters>();
    if (threadIdx.x < 32)
      for_each_tile([&](int, Group group, int steps, int row, int col) {
        Gemm::copy(ring, steps, [&](const auto& slot, int step) {
          slot.left().load(x, slot.full(), row, group.begin + step * Gemm::kStep);
          Gemm::load_right(slot, dy, col, group.begin + step * Gemm::kStep);
        });
      });
  } else {
    registers_take<kMultiplyRegisters>();
    for_each_tile([&](int e, Group group, int steps, int row, int col) {
      float sum[kCols / 2];
      Gemm::multiply(ring, steps, row + (warpgroup_id() - 1) * 64 < depth, sum, [&](const auto& slot, int step) {
        const int left = group.end - group.begin - step * Gemm::kStep;
        if (left >= Gemm::kStep) return;
        clear_rows(slot.left(), left);
        clear_rows(slot.right(), left);
        rows_cleared();
      });
      store_sums<Gemm>(sum, static_cast<T*>(p.dw) + int64_t{e} * depth * cols, row, depth, col, cols);
    });
  }
  Gemm::finish();
}

template <typename T, typename Y, bool kRightTransposed, int kCols, int kCluster>
bool launch_forward(const GroupedMmParams& p, Stream stream) {
  using Gemm = WarpgroupGemm<T, false, kRightTransposed, kCols, kCluster>;
  const StackStrides &xs = p.x_strides, &ws = p.w_strides;
  const TensorTiles x = matrix_tiles(p.dtype, p.x, p.depth, p.rows, 0, xs.row, 0, Gemm::Left::kBox);
  const TensorTiles w =
      kRightTransposed ? matrix_tiles(p.dtype, p.w, p.cols, p.depth, p.groups, ws.row, ws.stack, Gemm::RightPart::kBox)
                       : matrix_tiles(p.dtype, p.w, p.depth, p.cols, p.groups, ws.col, ws.stack, Gemm::RightPart::kBox);
  if (tensor_tiles_refusal(x) || tensor_tiles_refusal(w)) return false;
  const int64_t across = (p.cols + kCols - 1) / kCols;
  // At least one block, for the rows past the last group.
  const unsigned blocks =
      persistent_clusters(most_group_tiles(p.rows, p.groups, Gemm::kRows * kCluster, across), kCluster);
  launch(grouped_mm_sm90_kernel<T, Y, kRightTransposed, kCols, kCluster>,
         {.grid = {blocks}, .block = {kWarpgroupGemmThreads}, .shared_bytes = Gemm::kSharedBytes, .cluster = kCluster},
         stream, p, make_tensor_map(x), make_tensor_map(w));
  return true;
}

template <typename T, typename Y, bool kRightTransposed>
bool forward(const GroupedMmParams& p, Stream stream) {
  return p.rows >= kLargeGroup * p.groups ? launch_forward<T, Y, kRightTransposed, 256, 2>(p, stream)
                                          : launch_forward<T, Y, kRightTransposed, 128, 1>(p, stream);
}

template <typename T, int kCols, int kCluster>
bool launch_wgrad(const GroupedMmWgradParams& p, Stream stream) {
  using Gemm = WarpgroupGemm<T, true, true, kCols, kCluster>;
  const StackStrides &xs = p.x_strides, &dys = p.dy_strides;
  const TensorTiles x = matrix_tiles(p.dtype, p.x, p.depth, p.rows, 0, xs.row, 0, Gemm::Left::kBox);
  const TensorTiles dy = matrix_tiles(p.dtype, p.dy, p.cols, p.rows, 0, dys.row, 0, Gemm::RightPart::kBox);
  if (tensor_tiles_refusal(x) || tensor_tiles_refusal(dy)) return false;
  const int64_t down = (p.depth + Gemm::kRows * kCluster - 1) / (Gemm::kRows * kCluster);
  const unsigned blocks = persistent_clusters(p.groups * down * ((p.cols + kCols - 1) / kCols), kCluster);
  launch(grouped_mm_wgrad_sm90_kernel<T, kCols, kCluster>,
         {.grid = {blocks}, .block = {kWarpgroupGemmThreads}, .shared_bytes = Gemm::kSharedBytes, .cluster = kCluster},
         stream, p, make_tensor_map(x), make_tensor_map(dy));
  return true;
}

template <typename T>
bool weight_gradient(const GroupedMmWgradParams& p, Stream stream) {
  return p.depth >= 256 && p.cols >= 256 ? launch_wgrad<T, 256, 2>(p, stream) : launch_wgrad<T, 128, 1>(p, stream);
}

}  // namespace

bool grouped_mm_sm90(const GroupedMmParams& p, Stream stream) {
  if (p.x_strides.col != 1) return false;
  const bool transposed = p.w_strides.col == 1;
  if (!transposed && p.w_strides.row != 1) return false;
  if (p.dtype == DType::bfloat16)
    return transposed ? forward<bfloat16, bfloat16, true>(p, stream) : forward<bfloat16, bfloat16, false>(p, stream);
  if (p.dtype == DType::float16)
    return transposed ? forward<float16, float16, true>(p, stream) : forward<float16, float16, false>(p, stream);
  return false;
}

bool grouped_mm_float_sm90(const GroupedMmParams& p, Stream stream) {
  if (p.x_strides.col != 1 || p.w_strides.row != 1) return false;
  if (p.dtype == DType::bfloat16) return forward<bfloat16, float, false>(p, stream);
  if (p.dtype == DType::float16) return forward<float16, float, false>(p, stream);
  return false;
}

bool grouped_mm_wgrad_sm90(const GroupedMmWgradParams& p, Stream stream) {
  if (p.x_strides.col != 1 || p.dy_strides.col != 1) return false;
  if (p.dtype == DType::bfloat16) return weight_gradient<bfloat16>(p, stream);
  if (p.dtype == DType::float16) return weight_gradient<float16>(p, stream);
  return false;
}

}  // namespace grokkernels
