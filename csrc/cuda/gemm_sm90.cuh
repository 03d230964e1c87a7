// A block's part of a matrix product on Hopper: one warp keeps the copy engine busy, two warpgroups multiply. What
// grouped_mm and moe_experts are made of on sm_90 for 16-bit types; cuda/gemm.cuh is the same for every other case.
//
//   left (rows, depth), right (depth, columns); a tile is 128 rows by kCols, a step 64 deep. 384 threads: warpgroup 0
//   copies and has few registers, warpgroups 1 and 2 have 64 rows each and their sums in registers.
//
// The steps of all of a block's tiles go through one ring of slots in shared memory, each with an mbarrier that says
// "full" (its bytes have landed) and one that says "empty" (all eight warps have read it): so the next tile's first
// steps are on their way while this one is stored. With kCluster = 2 two neighbouring blocks work on the same columns
// of two tiles: each copies half of the right operand for both (multicast), a third less to read from the L2 cache,
// whose bandwidth would be the bound. The form is that of CUTLASS's warp-specialised persistent kernels and DeepGEMM.
#pragma once

#include <device/barrier.cuh>
#include <device/cluster.cuh>
#include <device/warpgroup.cuh>

#include "cuda/gemm.cuh"
#include "cuda/matrix_tile.cuh"

namespace grokkernels::device {

inline constexpr int kWarpgroupGemmThreads = 384;
inline constexpr int kCopyRegisters = 40, kMultiplyRegisters = 232;  // of a thread; 168 at launch

template <typename T, bool kLeftTransposed, bool kRightTransposed, int kTileCols, int kClusterBlocks>
struct WarpgroupGemm {
  static constexpr int kRows = 128, kCols = kTileCols, kStep = 64, kCluster = kClusterBlocks;
  using Left = MatrixTile<T, kRows, kStep, kLeftTransposed>;
  using Right = MatrixTile<T, kCols, kStep, kRightTransposed>;
  // What one block of the cluster brings: they follow each other to make a Right.
  using RightPart = MatrixTile<T, kCols / kCluster, kStep, kRightTransposed>;
  static constexpr uint32_t kSlotBytes = Left::kBytes + Right::kBytes;
  static constexpr int kSlots = 192 * 1024 / static_cast<int>(kSlotBytes);
  static constexpr int kSharedBytes = kSlots * (static_cast<int>(kSlotBytes) + 16);

  // A place in the ring; those who copy and those who multiply each go round by themselves.
  struct Ring {
    uint32_t shared;
    int slot = 0;
    uint32_t parity = 0;

    GK_DEVICE Left left() const { return {shared + slot * kSlotBytes}; }
    GK_DEVICE Right right() const { return {shared + slot * kSlotBytes + Left::kBytes}; }
    GK_DEVICE RightPart right_part(int rank) const { return {right().base + rank * RightPart::kBytes}; }
    GK_DEVICE uint32_t full() const { return shared + kSlots * kSlotBytes + slot * 16; }
    GK_DEVICE uint32_t empty() const { return full() + 8; }

    GK_DEVICE void next() {
      if (++slot == kSlots) {
        slot = 0;
        parity ^= 1;
      }
    }
  };

  // By all threads of the block, before anything else; `arrivals` fill a slot.
  static GK_DEVICE Ring start(int arrivals = 1) {
    Ring ring{shared_address(dynamic_shared())};
    if (threadIdx.x == 0) {
      for (; ring.parity == 0; ring.next()) {
        mbarrier_init(ring.full(), arrivals);
        mbarrier_init(ring.empty(), kCluster * 8);
      }
      fence_mbarrier_init();
    }
    if constexpr (kCluster > 1)
      cluster_sync();
    else
      sync_threads();
    return {ring.shared};
  }

  // By all threads at the end: other blocks may still tell this one that a slot is empty.
  static GK_DEVICE void finish() {
    if constexpr (kCluster > 1) cluster_sync();
  }

  // By the copying warp: `steps` times, once the slot is empty, one lane calls load(ring, step), which copies
  // kSlotBytes between all blocks of the cluster to each.
  template <typename Load>
  static GK_DEVICE void copy(Ring& ring, int steps, Load load) {
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(ring.empty(), ring.parity ^ 1);
      if (elect_one()) {
        mbarrier_arrive_expect(ring.full(), kSlotBytes);
        load(ring, step);
      }
      sync_warp();
      ring.next();
    }
  }

  // This block's part of the right operand, to all of its cluster.
  template <typename... Rest>
  static GK_DEVICE void load_right(const Ring& ring, const TensorMap& map, int col, int depth, Rest... rest) {
    if constexpr (kCluster == 1) {
      ring.right().load(map, ring.full(), col, depth, rest...);
    } else {
      const int rank = cluster_rank();
      ring.right_part(rank).load_multicast(map, ring.full(), (1 << kCluster) - 1, col + rank * (kCols / kCluster),
                                           depth, rest...);
    }
  }

  // By one warpgroup: the sums over `steps` steps. When not `busy` its rows are of no interest. fix(ring, step) is
  // called by all threads of both warpgroups when a slot has landed and before it is multiplied.
  template <typename Fix>
  static GK_DEVICE void multiply(Ring& ring, int steps, bool busy, float (&sum)[kCols / 2], Fix fix) {
#pragma unroll
    for (int i = 0; i < kCols / 2; ++i) sum[i] = 0.0f;
    if (!busy) {
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(ring.full(), ring.parity);
        fix(ring, step);
        sync_warp();  // no lane may run ahead, say that the slot is empty and leave another to miss a phase of "full"
        release(ring.empty());
        ring.next();
      }
      return;
    }
    const int side = (warpgroup_id() - 1) * 64;
    uint32_t before = 0;  // "empty" of the slot whose products are still under way
    for (int step = 0; step < steps; ++step) {
      mbarrier_wait(ring.full(), ring.parity);
      fix(ring, step);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kStep / 16; ++k)
        wgmma<T, kCols, kLeftTransposed, kRightTransposed>(sum, ring.left().descriptor(k, side),
                                                           ring.right().descriptor(k), true);
      wgmma_commit();
      wgmma_wait<1>();
      if (step > 0) release(before);
      before = ring.empty();
      ring.next();
    }
    wgmma_wait<0>();
    wgmma_settle(sum);
    if (steps > 0) release(before);
  }

  static GK_DEVICE void multiply(Ring& ring, int steps, bool busy, float (&sum)[kCols / 2]) {
    multiply(ring, steps, busy, sum, [](const Ring&, int) {});
  }

  // The row of the tile that sum[4 j + 2 half] and its neighbour belong to; their columns are 8 j + lane % 4 * 2 and
  // the next.
  static GK_DEVICE int row_of(int half) {
    return static_cast<int>(threadIdx.x) / 32 * 16 - 64 + half * 8 + lane_id() / 4;
  }

 private:
  // One lane of each warp tells every block of the cluster that it has read a slot.
  static GK_DEVICE void release(uint32_t empty) {
    if constexpr (kCluster == 1) {
      if (lane_id() == 0) mbarrier_arrive(empty);
    } else {
      if (lane_id() < kCluster) mbarrier_arrive_cluster(map_shared_rank(empty, lane_id()));
    }
  }
};

// Long epilogues pass the columns of a tile through one copy of their code, kParts times: fn(part) finds the part's
// sums from sum[0] on; then all move down by kStep.
template <int kParts, int kStep, int kCount, typename Fn>
GK_DEVICE void in_parts(float (&sum)[kCount], Fn fn) {
#pragma unroll 1
  for (int part = 0; part < kParts; ++part) {
    fn(part);
#pragma unroll
    for (int i = 0; i + kStep < kCount; ++i) sum[i] = sum[i + kStep];
  }
}

// Sets the rows of a landed transposed tile from `left` on to zero, those of the sum past its end. By both multiplying
// warpgroups, and then rows_cleared.
template <typename Tile>
GK_DEVICE void clear_rows(const Tile& tile, int left) {
  static_assert(Tile::kWidth == 128 && Tile::kPanelRows == 64);
  const int count = (Tile::kPanelRows - left) * 8;
#pragma unroll 1
  for (int panel = 0; panel < Tile::kPanels; ++panel)
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) - 128; i < count; i += 256)
      store_shared_16(tile.base + panel * Tile::kPanelBytes + static_cast<uint32_t>(left * 128 + i * 16),
                      {{0, 0, 0, 0}});
}

GK_DEVICE void rows_cleared() {
  fence_proxy_async();
  named_barrier_sync(1, 256);
}

// Writes the sums of a warpgroup to dense rows of `cols`: the tile's rows from `row` on, its columns from `col` on.
template <typename Gemm, typename Y>
GK_DEVICE void store_sums(const float (&sum)[Gemm::kCols / 2], Y* to, int row, int row_end, int col, int cols) {
  constexpr int kTiles = Gemm::kCols / 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + Gemm::row_of(half);
    float x[kTiles][2];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) x[j][c] = sum[4 * j + 2 * half + c];
    store_tile_row(
        to + int64_t{r} * cols + col, r < row_end, cols % kVector<Y> == 0, cols - col, [](int j) { return j * 8; }, x);
  }
}

// Host: rows of a group from which on two blocks share the columns of its tiles.
inline constexpr int64_t kLargeGroup = 256;

// Host: the tiles of a matrix, or of a stack of them, in rows of `dense` numbers.
inline TensorTiles matrix_tiles(DType dtype, const void* data, int64_t dense, int64_t rows, int64_t stack,
                                int64_t row_stride, int64_t stack_stride, const int (&box)[2]) {
  return {.dtype = dtype,
          .data = data,
          .rank = stack > 0 ? 3 : 2,
          .size = {dense, rows, stack},
          .stride = {1, row_stride, stack_stride},
          .box = {box[0], box[1], 1},
          .swizzle = Swizzle::bytes_128};
}

// Host: the blocks of a persistent grid, one to a multiprocessor, when a cluster works on one of `tiles` at a time.
inline unsigned persistent_clusters(int64_t tiles, int cluster) {
  const int64_t most = device_multiprocessors() > cluster ? device_multiprocessors() / cluster : 1;
  return static_cast<unsigned>((tiles < most ? tiles : most) * cluster);
}

}  // namespace grokkernels::device
