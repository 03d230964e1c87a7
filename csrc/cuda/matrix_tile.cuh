// Operands of wgmma as tiles that the copy engine brings into shared memory.
//
// A tile of kSide x kDepth 16-bit elements (kSide: rows of A or columns of B; kDepth: the inner dimension) lies in
// panels: each is one box of a tensor map, whose rows are as long as the swizzle. Where the inner dimension is the
// dense one in global memory a panel is kSide rows of kInRow of it; otherwise (kTransposed) kDepth rows of kInRow of
// the side.
#pragma once

#include <device/mbarrier.cuh>
#include <device/tma.cuh>
#include <device/wgmma.cuh>

namespace grokkernels::device {

template <typename T, int kSide, int kDepth, bool kTransposed, Swizzle kSwizzle = Swizzle::bytes_128>
struct MatrixTile {
  static_assert(sizeof(T) == 2 && kDepth % 16 == 0 && kSide % 8 == 0);
  static constexpr uint32_t kWidth = swizzle_bytes(kSwizzle);
  static constexpr int kInRow = static_cast<int>(kWidth) / 2;
  static constexpr int kPanels = (kTransposed ? kSide : kDepth) / kInRow;
  static constexpr int kPanelRows = kTransposed ? kDepth : kSide;
  static constexpr uint32_t kPanelBytes = kPanelRows * kWidth;
  static constexpr uint32_t kBytes = kPanels * kPanelBytes;
  static_assert(kPanels * kInRow == (kTransposed ? kSide : kDepth) && kPanelRows <= 256);

  uint32_t base;  // shared address, a multiple of tile_alignment

  // The box of one panel, for the tensor map whose first two dimensions are the matrix.
  static constexpr int kBox[2] = {kInRow, kPanelRows};

  // By one thread: the tile at (side, depth) of the matrix, and `rest` in the map's further dimensions. kBytes land at
  // the barrier.
  template <typename... Rest>
  GK_DEVICE void load(const TensorMap& map, uint32_t barrier, int side, int depth, Rest... rest) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint32_t to = base + panel * kPanelBytes;
      if constexpr (kTransposed)
        tma_load(to, map, barrier, side + panel * kInRow, depth, rest...);
      else
        tma_load(to, map, barrier, depth + panel * kInRow, side, rest...);
    }
  }

  // The same into the blocks of the cluster whose bits are set.
  template <typename... Rest>
  GK_DEVICE void load_multicast(const TensorMap& map, uint32_t barrier, uint16_t blocks, int side, int depth,
                                Rest... rest) const {
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      const uint32_t to = base + panel * kPanelBytes;
      if constexpr (kTransposed)
        tma_load_multicast(to, map, barrier, blocks, side + panel * kInRow, depth, rest...);
      else
        tma_load_multicast(to, map, barrier, blocks, depth + panel * kInRow, side, rest...);
    }
  }

  // The part wgmma number `step` takes along the depth (16 elements), from `side` on: a multiple of 8, or of kInRow
  // when transposed.
  GK_DEVICE uint64_t descriptor(int step, int side = 0) const {
    constexpr bool kPlain = kSwizzle == Swizzle::none;
    const uint32_t depth = static_cast<uint32_t>(step) * 32, first = static_cast<uint32_t>(side);
    if constexpr (kTransposed)
      return matrix_descriptor(base + depth / 2 * kWidth + first / kInRow * kPanelBytes, kSwizzle,
                               kPlain ? 8 * kWidth : kPanelBytes, kPlain ? kPanelBytes : 8 * kWidth);
    return matrix_descriptor(base + depth / kWidth * kPanelBytes + depth % kWidth + first * kWidth, kSwizzle,
                             kPanelBytes, 8 * kWidth);
  }
};

}  // namespace grokkernels::device
