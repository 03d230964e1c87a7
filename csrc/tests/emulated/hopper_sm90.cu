// Kernels that use each of Hopper's instructions in the vocabulary: see hopper.h.
#include <device/async.cuh>
#include <device/cluster.cuh>
#include <device/convert.cuh>
#include <device/matrix.cuh>
#include <device/mbarrier.cuh>
#include <device/tma.cuh>
#include <device/warpgroup.cuh>
#include <device/wgmma.cuh>

#include "cuda/matrix_tile.cuh"
#include "tests/emulated/hopper.h"

namespace grokkernels::tests {
namespace {

using namespace device;

template <typename T, int kCols, bool kTransposedA, bool kTransposedB, Swizzle kSwizzle, bool kRegisters,
          Mistake kMistake = Mistake::none>
__global__ __launch_bounds__(128) void product_kernel(const __grid_constant__ TensorMap a_map,
                                                      const __grid_constant__ TensorMap b_map, bool accumulate,
                                                      float* d) {
  using TileA = MatrixTile<T, kProductRows, kProductDepth, kTransposedA, kSwizzle>;
  using TileB = MatrixTile<T, kCols, kProductDepth, kTransposedB, kSwizzle>;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const uint32_t base = shared_address(dynamic_shared());
  const TileA a{base + (kMistake == Mistake::misaligned ? 128 : 0)};
  const TileB b{base + TileA::kBytes};
  const uint32_t barrier = base + TileA::kBytes + TileB::kBytes;
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  sync_threads();
  if (warp == 0 && elect_one()) {
    tma_prefetch(a_map);
    mbarrier_arrive_expect(barrier, TileA::kBytes + TileB::kBytes + (kMistake == Mistake::expects_more_bytes ? 16 : 0));
    a.load(a_map, barrier, 0, 0);
    b.load(b_map, barrier, 0, 0);
  }
  mbarrier_wait(barrier, 0);

  float acc[kCols / 2];
  float* mine = d + (16 * warp + g) * kCols + 2 * t;  // the row 8 below follows 8 * kCols on
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) acc[i] = mine[i % 4 / 2 * 8 * kCols + i / 4 * 8 + i % 2];
  uint32_t left[kProductDepth / 16][4];
  if constexpr (kRegisters) {
    // A 128-byte swizzle, not transposed: the chunk of row r and 8 columns from 8 c on is at r * 128 + c * 16.
#pragma unroll
    for (int k = 0; k < kProductDepth / 16; ++k)
      load_matrix_x4(left[k], swizzled(a.base + (16 * warp + lane % 16) * 128 + (2 * k + lane / 16) * 16, kSwizzle));
  }
  if constexpr (kMistake != Mistake::no_fence) wgmma_fence();
#pragma unroll
  for (int k = 0; k < kProductDepth / 16; ++k) {
    uint64_t b_part = b.descriptor(k);
    if (kMistake == Mistake::lanes_differ && lane == 7) b_part = b.descriptor(0);
    if (kMistake == Mistake::warps_differ && warp == 2) b_part = b.descriptor(0);
    if constexpr (kRegisters)
      wgmma<T, kCols, kTransposedB>(acc, left[k], b_part, accumulate || k > 0);
    else
      wgmma<T, kCols, kTransposedA, kTransposedB>(acc, a.descriptor(k), b_part, accumulate || k > 0);
  }
  wgmma_commit();
  if constexpr (kMistake == Mistake::returns_early) return;
  if constexpr (kMistake != Mistake::reads_early) wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCols / 2; ++i) mine[i % 4 / 2 * 8 * kCols + i / 4 * 8 + i % 2] = acc[i];
  if constexpr (kMistake == Mistake::reads_early) wgmma_wait<0>();
}

template <typename Tile>
TensorMap map_of(const void* data, int side, int depth, bool transposed, DType dtype, Swizzle swizzle) {
  return make_tensor_map({.dtype = dtype,
                          .data = data,
                          .rank = 2,
                          .size = {transposed ? side : depth, transposed ? depth : side},
                          .stride = {1, transposed ? side : depth},
                          .box = {Tile::kBox[0], Tile::kBox[1]},
                          .swizzle = swizzle});
}

template <typename T, int kCols, bool kTransposedA, bool kTransposedB, Swizzle kSwizzle, bool kRegisters,
          Mistake kMistake = Mistake::none>
void launch_product(const ProductParams& p, Stream stream) {
  using TileA = MatrixTile<T, kProductRows, kProductDepth, kTransposedA, kSwizzle>;
  using TileB = MatrixTile<T, kCols, kProductDepth, kTransposedB, kSwizzle>;
  launch(product_kernel<T, kCols, kTransposedA, kTransposedB, kSwizzle, kRegisters, kMistake>,
         {.grid = {1}, .block = {128}, .shared_bytes = TileA::kBytes + TileB::kBytes + 8}, stream,
         map_of<TileA>(p.a, kProductRows, kProductDepth, kTransposedA, p.dtype, kSwizzle),
         map_of<TileB>(p.b, kCols, kProductDepth, kTransposedB, p.dtype, kSwizzle), p.accumulate, p.d);
}

template <typename T, int kCols, Swizzle kSwizzle>
void choose_layout(const ProductParams& p, Stream stream) {
  if (p.a_in_registers)
    p.b_transposed ? launch_product<T, kCols, false, true, kSwizzle, true>(p, stream)
                   : launch_product<T, kCols, false, false, kSwizzle, true>(p, stream);
  else if (p.a_transposed)
    p.b_transposed ? launch_product<T, kCols, true, true, kSwizzle, false>(p, stream)
                   : launch_product<T, kCols, true, false, kSwizzle, false>(p, stream);
  else
    p.b_transposed ? launch_product<T, kCols, false, true, kSwizzle, false>(p, stream)
                   : launch_product<T, kCols, false, false, kSwizzle, false>(p, stream);
}

// registers_take of more than there are.
__global__ __launch_bounds__(384, 1) void registers_kernel() {
  if (warpgroup_id() == 0)
    registers_give<40>();
  else
    registers_take<240>();
}

template <Mistake kMistake>
__global__ __launch_bounds__(128) void exchange_kernel(const float* x, float* y) {
  const int rank = cluster_rank(), thread = static_cast<int>(threadIdx.x);
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t own = base, passed = base + 256, first = base + 512, barrier = base + 768, landed = base + 776;
  if (thread == 0) {
    mbarrier_init(barrier, cluster_size());
    mbarrier_init(landed, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(landed, 256);
  }
  if (thread < 64) store_shared_4(own + thread * 4, float_to_bits(x[rank * 64 + thread]));
  cluster_sync();
  // To the block before: the row of this one, in 16-byte pieces.
  const int before = (rank + cluster_size() - 1) % cluster_size();
  if (thread < 16)
    store_cluster_16(map_shared_rank(passed, before) + thread * 16,
                     load_cluster_16(map_shared_rank(own, rank) + thread * 16));
  if (thread == 0) {
    if (rank == 0)  // has written nothing that rank 0 reads
      mbarrier_arrive_cluster(map_shared_rank(barrier, 0));
    else
      mbarrier_arrive_cluster_release(map_shared_rank(barrier, 0));
  }
  if (rank == 0 && thread == 0) bulk_load(first, x, 256, landed);
  if (rank != 0 && thread < 64)
    store_cluster_4(map_shared_rank(first, rank) + thread * 4, load_cluster_4(map_shared_rank(own, 0) + thread * 4));
  if constexpr (kMistake == Mistake::cluster_returns_early)
    if (rank == 1) return;
  cluster_arrive();
  if (rank == 0) {
    mbarrier_wait_cluster(barrier, 0);
    mbarrier_wait(landed, 0);
  } else {
    if (thread == 0) bulk_load(landed + 8, x, 256, landed);
    mbarrier_wait(landed, 0);
  }
  cluster_wait();
  if constexpr (kMistake == Mistake::cluster_returns_early) load_cluster_4(map_shared_rank(own, 1));
  if constexpr (kMistake == Mistake::plain_load_from_cluster) load_shared_4(map_shared_rank(own, 1));
  if constexpr (kMistake == Mistake::no_proxy_fence)  // of what the block after has written here
    if (thread == 0) bulk_store(y, passed, 256);
  if (thread < 64)
    y[rank * 64 + thread] = bits_to_float(load_shared_4(own + thread * 4)) +
                            bits_to_float(load_shared_4(passed + thread * 4)) +
                            bits_to_float(load_shared_4(first + thread * 4)) + (rank == 0 ? 4.0f : 0.0f);
}

// Every block copies one box of 8 x 32 floats.
__global__ __launch_bounds__(32) void copy_boxes_kernel(const __grid_constant__ TensorMap x,
                                                        const __grid_constant__ TensorMap y,
                                                        const __grid_constant__ TensorMap sum, float* twice) {
  const uint32_t box = shared_address(dynamic_shared()), barrier = box + 1024, run = box + 1040;
  const int c0 = static_cast<int>(blockIdx.x) * 32, c1 = static_cast<int>(blockIdx.y) * 8;
  if (elect_one()) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(barrier, 1024);
    tma_load(box, x, barrier, c0, c1);
    mbarrier_wait(barrier, 0);
    tma_store(y, box, c0, c1);
    bulk_commit();
    tma_reduce_add(sum, box, c0, c1, 0);
    bulk_commit();
    bulk_wait_read<0>();
  }
  sync_warp();
  // Runs of bytes: the box is added to 1024 bytes of its own, that start as the same box.
  float* mine = twice + (blockIdx.y * gridDim.x + blockIdx.x) * 256;
  for (int i = lane_id(); i < 64; i += 32) store_shared_16(run + i * 16, load_shared_16(box + i * 16));
  fence_proxy_async();
  sync_warp();
  if (elect_one()) {
    bulk_store(mine, run, 1024);
    bulk_commit();
    bulk_wait<0>();
    bulk_reduce_add(mine, run, 1024);
    bulk_commit();
    bulk_wait<1>();
    bulk_wait_read<0>();
  }
}

// A multicast of one box to the 2 blocks of a cluster, each of which stores it as its own.
__global__ __launch_bounds__(32) void multicast_kernel(const __grid_constant__ TensorMap x,
                                                       const __grid_constant__ TensorMap sum) {
  const uint32_t box = shared_address(dynamic_shared()), barrier = box + 1024;
  if (elect_one()) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_expect(barrier, 1024);
    mbarrier_arrive(barrier);
  }
  cluster_sync();
  if (elect_one()) {
    if (cluster_rank() == 0) tma_load_multicast(box, x, barrier, 3, 0, 0);
    mbarrier_wait(barrier, 0);
    tma_reduce_add(sum, box, 0, 0, 0);
    bulk_commit();
    bulk_wait_read<0>();
  }
  cluster_sync();
}

__global__ __launch_bounds__(256) void ring_kernel(const float* x, float* y, int n) {
  const uint32_t slots = shared_address(dynamic_shared()), full = slots + 1024, empty = full + 16;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(full + 8 * i, 128);
      mbarrier_init(empty + 8 * i, 128);
    }
    fence_mbarrier_init();
  }
  sync_threads();
  const int thread = static_cast<int>(threadIdx.x) % 128;
  for (int step = 0; step < n / 128; ++step) {
    const int slot = step % 2, parity = step / 2 % 2;
    const uint32_t place = slots + slot * 512 + thread * 4;
    if (warpgroup_id() == 0) {
      mbarrier_wait(empty + 8 * slot, parity ^ 1);
      copy_async_4(place, x + step * 128 + thread);
      mbarrier_arrive_after_copies(full + 8 * slot);
    } else {
      mbarrier_wait(full + 8 * slot, parity);
      y[step * 128 + thread] = bits_to_float(load_shared_4(slots + slot * 512 + (127 - thread) * 4));
      mbarrier_arrive(empty + 8 * slot);
    }
  }
}

}  // namespace

void product(const ProductParams& p, Stream stream) {
  const auto with = [&]<typename T>(T) {
    if (p.swizzle == Swizzle::bytes_128)
      p.cols == 64 ? choose_layout<T, 64, Swizzle::bytes_128>(p, stream)
                   : choose_layout<T, 128, Swizzle::bytes_128>(p, stream);
    else if (p.swizzle == Swizzle::bytes_64)
      launch_product<T, 64, false, true, Swizzle::bytes_64, false>(p, stream);
    else if (p.swizzle == Swizzle::bytes_32)
      launch_product<T, 64, true, false, Swizzle::bytes_32, false>(p, stream);
    else
      launch_product<T, 64, false, true, Swizzle::none, false>(p, stream);
  };
  p.dtype == DType::bfloat16 ? with(bfloat16{}) : with(float16{});
}

void mistake(Mistake which, const ProductParams& p, Stream stream) {
  constexpr auto kSwizzle = Swizzle::bytes_128;
  const LaunchShape cluster{.grid = {2}, .block = {128}, .shared_bytes = 1280, .cluster = 2};
  float* x = p.d;
  switch (which) {
#define GK_PRODUCT(name) \
  case Mistake::name:    \
    return launch_product<bfloat16, 64, false, false, kSwizzle, false, Mistake::name>(p, stream);
    GK_PRODUCT(none)
    GK_PRODUCT(expects_more_bytes)
    GK_PRODUCT(reads_early)
    GK_PRODUCT(no_fence)
    GK_PRODUCT(lanes_differ)
    GK_PRODUCT(warps_differ)
    GK_PRODUCT(returns_early)
    GK_PRODUCT(misaligned)
#undef GK_PRODUCT
    case Mistake::no_registers:
      return launch(registers_kernel, {.grid = {1}, .block = {384}}, stream);
    case Mistake::cluster_returns_early:
      return launch(exchange_kernel<Mistake::cluster_returns_early>, cluster, stream, x, x);
    case Mistake::plain_load_from_cluster:
      return launch(exchange_kernel<Mistake::plain_load_from_cluster>, cluster, stream, x, x);
    case Mistake::no_proxy_fence:
      return launch(exchange_kernel<Mistake::no_proxy_fence>, cluster, stream, x, x);
  }
}

void exchange(const float* x, float* y, Stream stream) {
  launch(exchange_kernel<Mistake::none>, {.grid = {4}, .block = {128}, .shared_bytes = 1280, .cluster = 4}, stream, x,
         y);
}

void copy_boxes(const CopyParams& p, Stream stream) {
  const auto map = [&](const float* data, int rank) {
    return make_tensor_map({.dtype = DType::float32,
                            .data = data,
                            .rank = rank,
                            .size = {p.cols, p.rows, 1},
                            .stride = {1, p.cols, 0},
                            .box = {32, 8, 1},
                            .swizzle = Swizzle::bytes_128});
  };
  const Size3 grid{static_cast<unsigned>(p.cols + 31) / 32, static_cast<unsigned>(p.rows + 7) / 8};
  launch(copy_boxes_kernel, {.grid = grid, .block = {32}, .shared_bytes = 1040 + 1024}, stream, map(p.x, 2),
         map(p.y, 2), map(p.sum, 3), p.twice);
  launch(multicast_kernel, {.grid = {2}, .block = {32}, .shared_bytes = 1032, .cluster = 2}, stream, map(p.x, 2),
         map(p.sum, 3));
}

void ring(const float* x, float* y, int n, Stream stream) {
  launch(ring_kernel, {.grid = {1}, .block = {256}, .shared_bytes = 1024 + 32}, stream, x, y, n);
}

}  // namespace grokkernels::tests
