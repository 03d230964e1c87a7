// The names of the vocabulary that need Hopper: see conformance.cu. Each runs in one block, which is a cluster of one:
// the PTX interpreter has no larger ones. What passes between the blocks of a cluster is judged on the emulated device
// alone (csrc/tests/emulated/test_hopper.cpp), its PTX by nvcc alone, and on a GPU by `make gpu`.
#include <device/async.cuh>
#include <device/cluster.cuh>
#include <device/convert.cuh>
#include <device/core.cuh>
#include <device/matrix.cuh>
#include <device/mbarrier.cuh>
#include <device/memory.cuh>
#include <device/tma.cuh>
#include <device/warp.cuh>
#include <device/warpgroup.cuh>
#include <device/wgmma.cuh>

#include "tests/device/harness.cuh"

namespace grokkernels {
using namespace device;

// ---- memory: one instruction here, two on older chips ----
KERNEL(memory_atomic_pair, {
  if (lane < 16) out[lane] = float_to_bits(static_cast<float>(lane));
  sync_threads();
  atomic_add_2(reinterpret_cast<float*>(out) + 2 * (lane % 8), small(in[lane]), small(in[lane + 32]));
})

// ---- matrix ----
KERNEL(matrix_store_x4, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t r[4] = {in[4 * lane], in[4 * lane + 1], in[4 * lane + 2], in[4 * lane + 3]};
  store_matrix_x4(base + 16 * static_cast<uint32_t>(lane ^ 5), r);
  sync_threads();
  store_16(out + 4 * lane, load_shared_16(base + 16 * static_cast<uint32_t>(lane)));
})
KERNEL(matrix_store_x4_trans, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t r[4] = {in[4 * lane], in[4 * lane + 1], in[4 * lane + 2], in[4 * lane + 3]};
  store_matrix_x4_trans(base + 16 * static_cast<uint32_t>(lane ^ 2), r);
  sync_threads();
  store_16(out + 4 * lane, load_shared_16(base + 16 * static_cast<uint32_t>(lane)));
})
KERNEL(matrix_mma_e4m3, {
  float d[4];
  uint32_t a[4], b[2];
  // Exponents of 4 to 11: products whose sums float holds exactly.
  for (int i = 0; i < 4; ++i) a[i] = (in[4 * lane + i] & 0x9F9F9F9F) | 0x20202020;
  for (int i = 0; i < 2; ++i) b[i] = (in[128 + 2 * lane + i] & 0x9F9F9F9F) | 0x20202020;
  for (int i = 0; i < 4; ++i) d[i] = small(in[192 + 4 * lane + i]);
  mma_m16n8k32_e4m3(d, a, b);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = float_to_bits(d[i]);
})

// ---- mbarrier, and runs of bytes to wait for ----
GK_DEVICE uint32_t new_barrier(uint32_t barrier, int lane, int arrivals) {
  if (lane == 0) mbarrier_init(barrier, arrivals);
  fence_mbarrier_init();
  sync_threads();
  return barrier;
}
GK_DEVICE void copy_out(uint32_t* out, uint32_t from, int lane, int threads, int words) {
  for (int i = lane; i < words; i += threads) out[i] = load_shared_4(from + 4 * static_cast<uint32_t>(i));
}
// Two warps hand 32 words to each other, twice: phases of both parities.
KERNEL_OF(mbarrier_phases, 64, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t full = new_barrier(base + 256, lane, 32);
  const uint32_t empty = new_barrier(base + 264, lane, 32);
  const uint32_t place = base + 4 * static_cast<uint32_t>(lane % 32);
  for (int step = 0; step < 4; ++step) {
    const uint32_t parity = static_cast<uint32_t>(step & 1);
    if (lane < 32) {
      mbarrier_wait(empty, parity ^ 1);
      store_shared_4(place, in[32 * step + lane]);
      mbarrier_arrive(full);
    } else {
      mbarrier_wait(full, parity);
      out[32 * step + lane - 32] = load_shared_4(base + 4 * static_cast<uint32_t>(63 - lane));
      mbarrier_arrive(empty);
    }
  }
})
KERNEL(mbarrier_expects, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t barrier = new_barrier(base + 1024, lane, 1);
  if (lane == 0) {
    mbarrier_arrive_expect(barrier, 256);
    bulk_load(base + 128, in + 4, 64, barrier);
    bulk_load(base, in + 32, 192 - 64, barrier);
    bulk_load(base + 192, in + 100, 64, barrier);
  }
  mbarrier_wait(barrier, 0);
  copy_out(out, base, lane, 32, 64);
  sync_threads();
  if (lane == 0) {
    mbarrier_expect(barrier, 96);
    bulk_load(base, in + 200, 96, barrier);
    mbarrier_arrive(barrier);
  }
  mbarrier_wait(barrier, 1);
  copy_out(out + 64, base, lane, 32, 64);
})
KERNEL(mbarrier_after_copies, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t barrier = new_barrier(base + 1024, lane, 32);
  copy_async_16(base + 16 * static_cast<uint32_t>(lane), in + 4 * (lane ^ 1));
  mbarrier_arrive_after_copies(barrier);
  mbarrier_wait(barrier, 0);
  copy_out(out, base, lane, 32, 128);
})

// ---- tma ----
GK_DEVICE void store_box(uint32_t to, const uint32_t* in, int lane, int words) {
  for (int i = lane; i < words; i += 32) store_shared_4(to + 4 * static_cast<uint32_t>(i), float_to_bits(small(in[i])));
  fence_proxy_async();
  sync_threads();
}
KERNEL(tma_bulk_stores, {
  const uint32_t base = shared_address(dynamic_shared());
  store_box(base, in, lane, 128);
  if (lane == 0) {
    bulk_store(out, base + 16, 64);
    bulk_commit();
    bulk_store(out + 32, base + 128, 256);
    bulk_commit();
    bulk_wait<0>();
    bulk_reduce_add(reinterpret_cast<float*>(out) + 8, base + 64, 32);
    bulk_commit();
    bulk_wait_read<0>();
  }
})
// The latest of two groups may still be under way: memory that the one before read is used again.
KERNEL(tma_bulk_groups, {
  const uint32_t base = shared_address(dynamic_shared());
  store_box(base, in, lane, 64);
  if (lane == 0) {
    bulk_store(out, base, 128);
    bulk_commit();
    bulk_store(out + 32, base + 128, 128);
    bulk_commit();
    bulk_wait_read<1>();
    store_shared_4(base + 4, 7);
    bulk_wait<1>();
    out[2] = 9;
    bulk_wait<0>();
  }
})

// Tensors of 2, 3 and 4 dimensions over the first words, all strides different, and boxes that stand out of them.
TensorTiles tiles_2(const void* data, Swizzle swizzle) {
  return {.dtype = DType::float32,
          .data = data,
          .rank = 2,
          .size = {44, 13},
          .stride = {1, 48},
          .box = {swizzle == Swizzle::none ? 12 : static_cast<int>(swizzle_bytes(swizzle)) / 4, 16},
          .swizzle = swizzle};
}
TensorTiles tiles_plain(const void* data) { return tiles_2(data, Swizzle::none); }
TensorTiles tiles_32(const void* data) { return tiles_2(data, Swizzle::bytes_32); }
TensorTiles tiles_64(const void* data) { return tiles_2(data, Swizzle::bytes_64); }
TensorTiles tiles_128(const void* data) { return tiles_2(data, Swizzle::bytes_128); }
TensorTiles tiles_3(const void* data) {
  return {.dtype = DType::float32,
          .data = data,
          .rank = 3,
          .size = {20, 5, 7},
          .stride = {1, 24, 128},
          .box = {8, 4, 3},
          .swizzle = Swizzle::none};
}
TensorTiles tiles_4(const void* data) {
  return {.dtype = DType::float32,
          .data = data,
          .rank = 4,
          .size = {12, 3, 4, 5},
          .stride = {1, 12, 40, 200},
          .box = {8, 2, 3, 2},
          .swizzle = Swizzle::none};
}
TensorTiles tiles_half(const void* data) {
  return {.dtype = DType::bfloat16,
          .data = data,
          .rank = 2,
          .size = {90, 13},
          .stride = {1, 96},
          .box = {64, 8},
          .swizzle = Swizzle::bytes_128};
}

// Loads a box of `words` at coordinates inside the tensor and at some across its edges.
template <typename Load>
GK_DEVICE void load_boxes(uint32_t* out, int lane, int words, Load load) {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t barrier = new_barrier(base + 16 * 1024, lane, 1);
  for (int i = 0; i < 2; ++i) {
    if (lane == 0) {
      mbarrier_arrive_expect(barrier, 4 * static_cast<uint32_t>(words));
      load(base, barrier, i);
    }
    mbarrier_wait(barrier, static_cast<uint32_t>(i));
    copy_out(out + i * words, base, lane, 32, words);
    sync_threads();
  }
}
GK_DEVICE void load_2(const TensorMap& map, uint32_t* out, int lane, int words) {
  load_boxes(out, lane, words, [&](uint32_t to, uint32_t barrier, int i) {
    tma_prefetch(map);
    tma_load(to, map, barrier, i == 0 ? 4 : 21, i == 0 ? 2 : -3);
  });
}
KERNEL_TILES(tma_load_2, tiles_plain, { load_2(in_map, out, lane, 12 * 16); })
KERNEL_TILES(tma_load_2_swizzle_32, tiles_32, { load_2(in_map, out, lane, 8 * 16); })
KERNEL_TILES(tma_load_2_swizzle_64, tiles_64, { load_2(in_map, out, lane, 16 * 16); })
KERNEL_TILES(tma_load_2_swizzle_128, tiles_128, { load_2(in_map, out, lane, 32 * 16); })
KERNEL_TILES(tma_load_2_of_halves, tiles_half, { load_2(in_map, out, lane, 32 * 8); })
KERNEL_TILES(tma_load_3, tiles_3, {
  load_boxes(out, lane, 96, [&](uint32_t to, uint32_t barrier, int i) {
    tma_load(to, in_map, barrier, i == 0 ? 1 : 15, i == 0 ? 0 : 3, i == 0 ? 2 : -1);
  });
})
KERNEL_TILES(tma_load_4, tiles_4, {
  load_boxes(out, lane, 96, [&](uint32_t to, uint32_t barrier, int i) {
    tma_load(to, in_map, barrier, i == 0 ? 3 : 7, i == 0 ? 1 : 2, i == 0 ? 0 : 3, i == 0 ? 2 : 4);
  });
})
KERNEL_TILES(tma_multicast_2, tiles_plain, {
  load_boxes(out, lane, 192, [&](uint32_t to, uint32_t barrier, int i) {
    tma_load_multicast(to, in_map, barrier, 1, 4 + 20 * i, 2 - i);
  });
})
KERNEL_TILES(tma_multicast_3, tiles_3, {
  load_boxes(out, lane, 96, [&](uint32_t to, uint32_t barrier, int i) {
    tma_load_multicast(to, in_map, barrier, 1, 1 + 2 * i, i, 2 + 3 * i);
  });
})

// Stores a box, then adds it a little further on, where part of it lies beyond the edge; `out` starts as no number.
template <typename Store, typename Add>
GK_DEVICE void store_boxes(const uint32_t* in, uint32_t* out, int lane, int words, Store store, Add add) {
  const uint32_t base = shared_address(dynamic_shared());
  for (int i = lane; i < 1024; i += 32) out[i] = float_to_bits(static_cast<float>(i));
  sync_threads();
  store_box(base, in, lane, words);
  if (lane == 0) {
    store(base);
    bulk_commit();
    bulk_wait<0>();
    add(base);
    bulk_commit();
    bulk_wait_read<0>();
  }
}
GK_DEVICE void store_2(const TensorMap& map, const uint32_t* in, uint32_t* out, int lane, int words) {
  store_boxes(
      in, out, lane, words, [&](uint32_t from) { tma_store(map, from, 4, -2); },
      [&](uint32_t from) { tma_reduce_add(map, from, 21, 1); });
}
KERNEL_TILES(tma_store_2, tiles_plain, { store_2(out_map, in, out, lane, 12 * 16); })
KERNEL_TILES(tma_store_2_swizzle_32, tiles_32, { store_2(out_map, in, out, lane, 8 * 16); })
KERNEL_TILES(tma_store_2_swizzle_64, tiles_64, { store_2(out_map, in, out, lane, 16 * 16); })
KERNEL_TILES(tma_store_2_swizzle_128, tiles_128, { store_2(out_map, in, out, lane, 32 * 16); })
KERNEL_TILES(tma_store_3, tiles_3, {
  store_boxes(
      in, out, lane, 96, [&](uint32_t from) { tma_store(out_map, from, 1, 0, 2); },
      [&](uint32_t from) { tma_reduce_add(out_map, from, 4, 3, -1); });
})
KERNEL_TILES(tma_store_4, tiles_4, {
  store_boxes(
      in, out, lane, 96, [&](uint32_t from) { tma_store(out_map, from, 3, 1, 0, 2); },
      [&](uint32_t from) { tma_reduce_add(out_map, from, 1, 2, 3, 4); });
})

// ---- wgmma: the operands are whatever stands in shared memory, so that every layout is a matter of addresses ----
template <typename T>
GK_DEVICE uint32_t fill_operands(const uint32_t* in, int lane) {
  const uint32_t base = shared_address(dynamic_shared());
  for (int i = lane; i < 4096; i += 128)
    store_shared_4(base + 4 * static_cast<uint32_t>(i), small_pair<T>(in[i] + static_cast<uint32_t>(i) * 0x10003u));
  fence_proxy_async();
  sync_threads();
  return base;
}
// All accumulators in one word.
template <int kCount>
GK_DEVICE uint32_t mixed(const float (&d)[kCount]) {
  uint32_t h = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) h = h * 31 + float_to_bits(d[i]);
  return h;
}
template <int kCount>
GK_DEVICE void start_accumulators(float (&d)[kCount], const uint32_t* in, int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) d[i] = small(in[i % 16 * 128 + lane] + static_cast<uint32_t>(i));
}
template <typename T>
GK_DEVICE void load_left(uint32_t (&a)[4], const uint32_t* in, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = small_pair<T>(in[4 * lane + i]);
}
template <typename T, int kN, bool kRegisters>
GK_DEVICE void width(const uint32_t* in, uint32_t*& out, uint32_t base, int lane) {
  float d[kN / 2];
  uint32_t a[4];
  start_accumulators(d, in, lane);
  load_left<T>(a, in, lane);
  const uint64_t b = matrix_descriptor(base + 2048, Swizzle::none, 128, 256);
  wgmma_fence();
  if constexpr (kRegisters)
    wgmma<T, kN>(d, a, b, kN % 32 == 0);
  else
    wgmma<T, kN>(d, matrix_descriptor(base, Swizzle::none, 128, 256), b, kN % 32 == 0);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_settle(d);
  out[lane] = mixed(d);
  out += 128;
}
template <typename T, bool kRegisters, int... kWidths>
GK_DEVICE void widths(const uint32_t* in, uint32_t* out, int lane) {
  const uint32_t base = fill_operands<T>(in, lane);
  (width<T, kWidths, kRegisters>(in, out, base, lane), ...);
}
#define ALL_WIDTHS 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240, 256
KERNEL_OF(wgmma_shared_bfloat16, 128, { widths<bfloat16, false, ALL_WIDTHS>(in, out, lane); })
KERNEL_OF(wgmma_shared_float16, 128, { widths<float16, false, ALL_WIDTHS>(in, out, lane); })
KERNEL_OF(wgmma_registers_bfloat16, 128, { widths<bfloat16, true, ALL_WIDTHS>(in, out, lane); })
KERNEL_OF(wgmma_registers_float16, 128, { widths<float16, true, ALL_WIDTHS>(in, out, lane); })

template <typename T, Swizzle kSwizzle, bool kTransposedA, bool kTransposedB>
GK_DEVICE void layout(const uint32_t* in, uint32_t*& out, uint32_t base, int lane) {
  float d[32];
  uint32_t a[4];
  start_accumulators(d, in, lane);
  load_left<T>(a, in, lane);
  const uint64_t left = matrix_descriptor(base + 32, kSwizzle, 1024, 1024);
  const uint64_t right = matrix_descriptor(base + 4096, kSwizzle, 2048, 1024);
  wgmma_fence();
  wgmma<T, 64, kTransposedA, kTransposedB>(d, left, right, true);
  if constexpr (!kTransposedA) wgmma<T, 64, kTransposedB>(d, a, right, true);
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_settle(d);
  out[lane] = mixed(d);
  out += 128;
}
template <typename T, Swizzle kSwizzle>
GK_DEVICE void layouts(const uint32_t* in, uint32_t* out, int lane) {
  const uint32_t base = fill_operands<T>(in, lane);
  layout<T, kSwizzle, false, false>(in, out, base, lane);
  layout<T, kSwizzle, false, true>(in, out, base, lane);
  layout<T, kSwizzle, true, false>(in, out, base, lane);
  layout<T, kSwizzle, true, true>(in, out, base, lane);
}
KERNEL_OF(wgmma_layout_plain, 128, { layouts<bfloat16, Swizzle::none>(in, out, lane); })
KERNEL_OF(wgmma_layout_32, 128, { layouts<float16, Swizzle::bytes_32>(in, out, lane); })
KERNEL_OF(wgmma_layout_64, 128, { layouts<float16, Swizzle::bytes_64>(in, out, lane); })
KERNEL_OF(wgmma_layout_128, 128, { layouts<bfloat16, Swizzle::bytes_128>(in, out, lane); })
// Two groups; the first is read, and shared memory that it alone used overwritten, while the second is under way.
KERNEL_OF(wgmma_groups, 128, {
  const uint32_t base = fill_operands<bfloat16>(in, lane);
  float first[8];
  float second[8];
  start_accumulators(first, in, lane);
  start_accumulators(second, in + 1, lane);
  wgmma_fence();
  wgmma<bfloat16, 16>(first, matrix_descriptor(base, Swizzle::none, 128, 256),
                      matrix_descriptor(base + 2048, Swizzle::none, 128, 256), true);
  wgmma_commit();
  wgmma<bfloat16, 16>(second, matrix_descriptor(base + 4096, Swizzle::none, 128, 256),
                      matrix_descriptor(base + 8192, Swizzle::none, 128, 256), true);
  wgmma_commit();
  wgmma_wait<1>();
  out[lane] = mixed(first);
  sync_threads();
  for (int i = lane; i < 1024; i += 128) store_shared_4(base + 4 * static_cast<uint32_t>(i), 0);
  wgmma_wait<0>();
  out[128 + lane] = mixed(second);
})

// ---- warpgroup ----
KERNEL_OF(warpgroup_registers, 256, {
  if (warpgroup_id() == 0)
    registers_give<40>();
  else
    registers_take<248>();
  out[lane] = in[lane] + static_cast<uint32_t>(warpgroup_id());
})
KERNEL(warpgroup_elect, {
  const uint32_t elected = ballot(elect_one());
  out[lane] = static_cast<uint32_t>(count_bits(elected));
  if (lane % 2 == 0) {
    const uint32_t of_some = ballot(elect_one(0x55555555u), 0x55555555u);
    out[32 + lane] = static_cast<uint32_t>(count_bits(of_some) + 2 * count_bits(of_some & 0x55555555u));
  }
})
KERNEL(warpgroup_scheduling_fence, {
  const float made[4] = {bits_to_float(in[lane]), bits_to_float(in[32 + lane]), bits_to_float(in[64 + lane]),
                         bits_to_float(in[96 + lane])};
  scheduling_fence(static_cast<uint32_t>(lane));
  scheduling_fence(static_cast<uint32_t>(lane), made);
  for (int i = 0; i < 4; ++i) out[32 * i + lane] = float_to_bits(made[i]);
})

// ---- cluster, of one block ----
KERNEL_OF(cluster_of_one, 64, {
  const uint32_t base = shared_address(dynamic_shared());
  const uint32_t barrier = new_barrier(base + 4096, lane, 64);
  const uint32_t mapped = map_shared_rank(base, 0);
  out[lane] = static_cast<uint32_t>(cluster_rank() + 16 * cluster_size());
  store_cluster_16(mapped + 16 * static_cast<uint32_t>(lane), load_16(in + 4 * lane));
  store_cluster_4(mapped + 1024 + 4 * static_cast<uint32_t>(lane), in[256 + lane]);
  cluster_arrive();
  cluster_wait();
  const Words4 four = load_cluster_16(mapped + 16 * static_cast<uint32_t>(63 - lane));
  store_16(out + 64 + 4 * lane, four);
  out[320 + lane] = load_cluster_4(mapped + 1024 + 4 * static_cast<uint32_t>(lane ^ 33));
  cluster_sync();
  store_shared_4(base + 4 * static_cast<uint32_t>(lane), in[512 + lane]);
  mbarrier_arrive_cluster_release(map_shared_rank(barrier, 0));
  mbarrier_wait_cluster(barrier, 0);
  out[384 + lane] = load_shared_4(base + 4 * static_cast<uint32_t>(63 - lane));
  mbarrier_arrive_cluster(map_shared_rank(barrier, 0));
  mbarrier_wait(barrier, 1);
})

}  // namespace grokkernels

RUN_BY_NAME()
