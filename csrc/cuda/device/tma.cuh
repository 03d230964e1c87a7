// The copy engine (TMA, sm_90): one thread asks for a box of a tensor, or for a run of bytes, to be moved between
// global and shared memory (PTX ISA, "cp.async.bulk.tensor", "cp.async.bulk", "cp.reduce.async.bulk").
//
// Loads end at an mbarrier: they take their bytes off what mbarrier_arrive_expect announced, zero-filled ones included.
// Stores are committed in groups and waited for by the thread that issued them. The engine is a proxy of its own:
// shared memory that threads wrote is stored after fence_proxy_async by the writers and a barrier; memory it has read
// or written is used again after the wait.
//
// A kernel takes a map as `const __grid_constant__ TensorMap map`. Coordinates are elements, dimension 0 first, and may
// lie outside the tensor.
#pragma once

#include <cuda.h>

#include <device/core.cuh>

#include "common/tensor_tiles.h"

namespace grokkernels::device {

struct TensorMap {
  CUtensorMap map;
};
static_assert(sizeof(TensorMap) == 128);

// Host: the map of these tiles. Throws std::runtime_error where the hardware cannot have it: see tensor_tiles_refusal.
inline TensorMap make_tensor_map(const TensorTiles& t) {
  if (const char* why = tensor_tiles_refusal(t)) throw std::runtime_error(std::string("grokkernels: ") + why);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result),
               "the driver was not asked for cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || found == nullptr)
      throw std::runtime_error("grokkernels: this driver has no cuTensorMapEncodeTiled; it is older than CUDA 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  const auto type = t.dtype == DType::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : t.dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
  const cuuint64_t element = static_cast<cuuint64_t>(size_of(t.dtype));
  cuuint64_t size[5], stride[5];
  cuuint32_t box[5], step[5];
  cuuint64_t dense = element;
  for (int i = 0; i < t.rank; ++i) {
    size[i] = static_cast<cuuint64_t>(t.size[i]);
    // A dimension of one element is never stepped along, but its stride must be a legal one.
    stride[i] = t.size[i] == 1 ? (dense + 15) / 16 * 16 : static_cast<cuuint64_t>(t.stride[i]) * element;
    dense = stride[i] * size[i];
    box[i] = static_cast<cuuint32_t>(t.box[i]);
    step[i] = 1;
  }
  TensorMap made;
  const CUresult status =
      encode(&made.map, type, static_cast<cuuint32_t>(t.rank), const_cast<void*>(t.data), size, stride + 1, box, step,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(t.swizzle)], CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("grokkernels: the driver refused a tensor map, error " +
                             std::to_string(static_cast<int>(status)));
  return made;
}

// What threads wrote to shared memory before is seen by the copy engine and by wgmma after.
GK_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

GK_DEVICE void tma_prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// A box to the shared address `to`, a multiple of tile_alignment. By one thread.
GK_DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}

GK_DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

GK_DEVICE void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// The same box to the same place in every block of the cluster whose bit is set in `blocks`; each one's barrier at that
// address counts the bytes.
GK_DEVICE void tma_load_multicast(uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c0,
                                  int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1)
      : "memory");
}

GK_DEVICE void tma_load_multicast(uint32_t to, const TensorMap& map, uint32_t barrier, uint16_t blocks, int c0, int c1,
                                  int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
      "l"(&map), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

GK_DEVICE void tma_store(const TensorMap& map, uint32_t from, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(from), "r"(c0), "r"(c1)
               : "memory");
}

GK_DEVICE void tma_store(const TensorMap& map, uint32_t from, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

GK_DEVICE void tma_store(const TensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

// Adds the box to what stands in the tensor (float32), element by element, in no order.
GK_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t from, int c0, int c1) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
      "r"(from), "r"(c0), "r"(c1)
      : "memory");
}

GK_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t from, int c0, int c1, int c2) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

GK_DEVICE void tma_reduce_add(const TensorMap& map, uint32_t from, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.4d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
      "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Runs of bytes: addresses and length are multiples of 16.
GK_DEVICE void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

GK_DEVICE void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
               : "memory");
}

GK_DEVICE void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}

// The stores that this thread has issued since the last commit become a group.
GK_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kGroupsLeft groups still write (bulk_wait) or still read shared memory (bulk_wait_read: enough
// before that memory is used again or the thread returns).
template <int kGroupsLeft>
GK_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

template <int kGroupsLeft>
GK_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
}

}  // namespace grokkernels::device
