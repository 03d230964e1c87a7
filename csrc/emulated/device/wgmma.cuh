// wgmma, as csrc/cuda/device/wgmma.cuh has it. Every warp does its 16 of the 64 rows, in order, at a random time
// between the issue and the wait: operands are read then, from registers too. Until the wait the accumulators are NaN
// to all.
#pragma once

#include <device/convert.cuh>

#include "common/tensor_tiles.h"

namespace grokkernels::device {

// Eight elements of the matrix of this descriptor: (side, depth .. depth + 7), or (side .. side + 7, depth) when its
// side is dense; the first of the eight is a multiple of 8.
template <typename T>
GK_UNWATCHED inline const T* matrix_chunk(const emulated::Block& block, uint64_t descriptor, bool transposed, int side,
                                          int depth) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
  const auto s = static_cast<uint32_t>(side), k = static_cast<uint32_t>(depth);
  const int mode = static_cast<int>(descriptor >> 62);
  const Swizzle swizzle = mode == 0 ? Swizzle::none : static_cast<Swizzle>(4 - mode);
  const uint32_t width = swizzle_bytes(swizzle), in_row = width / 16, leading = field(16), stride = field(32);
  uint32_t address = field(0);
  if (!transposed)
    address += s / 8 * stride + s % 8 * width + k / 8 * (mode == 0 ? leading : 16);
  else if (mode == 0)
    address += s / 8 * stride + k % 8 * 16 + k / 8 * leading;
  else
    address += s / 8 % in_row * 16 + s / 8 / in_row * leading + k % 8 * width + k / 8 * stride;
  return reinterpret_cast<const T*>(emulated::memory_of(block, swizzled(address, swizzle), 16, 16, "wgmma"));
}

// The 16 rows of one warp.
template <typename T>
GK_UNWATCHED void multiply_rows(const emulated::MatrixOperation& op, float* d) {
  typedef float Lane8 __attribute__((vector_size(32)));
  float a[16][16];                   // row, depth
  alignas(32) float b[16][256 + 8];  // depth, column
  const emulated::Block& block = *op.block;
  for (int i = 0; i < 16; i += op.transposed_a ? 8 : 1)
    for (int k = 0; k < 16; k += op.transposed_a ? 1 : 8) {
      if (op.in_registers) break;
      const T* chunk = matrix_chunk<T>(block, op.a, op.transposed_a, 16 * op.quarter + i, k);
      for (int e = 0; e < 8; ++e) (op.transposed_a ? a[i + e][k] : a[i][k + e]) = to_float(chunk[e]);
    }
  if (op.in_registers)
    for (int lane = 0; lane < 32; ++lane)
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < 2; ++e)
          a[lane / 4 + r % 2 * 8][lane % 4 * 2 + r / 2 * 8 + e] =
              to_float(T{static_cast<uint16_t>(op.a_registers[lane][r] >> (16 * e))});
  if (op.transposed_b) {
    for (int k = 0; k < 16; ++k)
      for (int j = 0; j < op.cols; j += 8) {
        const T* chunk = matrix_chunk<T>(block, op.b, true, j, k);
        for (int e = 0; e < 8; ++e) b[k][j + e] = to_float(chunk[e]);
      }
  } else {
    for (int j = 0; j < op.cols; ++j)
      for (int k = 0; k < 16; k += 8) {
        const T* chunk = matrix_chunk<T>(block, op.b, false, j, k);
        for (int e = 0; e < 8; ++e) b[k + e][j] = to_float(chunk[e]);
      }
  }
  for (int j = 0; j < op.cols; j += 8)
    for (int i = 0; i < 16; i += 4) {
      Lane8 sum[4] = {};
      if (op.accumulate)
        for (int r = 0; r < 4; ++r) std::memcpy(&sum[r], d + (i + r) * op.cols + j, sizeof(Lane8));
      for (int k = 0; k < 16; ++k) {
        Lane8 right;
        std::memcpy(&right, &b[k][j], sizeof(Lane8));
        for (int r = 0; r < 4; ++r) sum[r] += a[i + r][k] * right;
      }
      for (int r = 0; r < 4; ++r) std::memcpy(d + (i + r) * op.cols + j, &sum[r], sizeof(Lane8));
    }
}

GK_DEVICE void wgmma_fence() {
  emulated::warp_collective(kAllLanes, "wgmma_fence", nullptr, [](void**, uint32_t) { emulated::fence_matrix(); });
}

GK_DEVICE void wgmma_commit() {
  emulated::warp_collective(kAllLanes, "wgmma_commit", nullptr, [](void**, uint32_t) { emulated::commit_matrix(); });
}

template <int kGroupsLeft>
GK_DEVICE void wgmma_wait() {
  emulated::warp_collective(kAllLanes, "wgmma_wait", nullptr,
                            [](void**, uint32_t) { emulated::wait_matrix(kGroupsLeft); });
  // For the race checker: each lane knows now that the others' share of the matrices has been read.
  emulated::acquire(&emulated::current().warp->matrix_groups);
}

template <int kCount>
GK_DEVICE void wgmma_settle(float (&)[kCount]) {}

// Whether the asynchronous proxy sees what this warp's share of a wgmma reads: its 16 rows of A, all of B.
template <typename T>
GK_UNWATCHED void check_operands(const emulated::MatrixOperation& op, const emulated::Fiber& self) {
  const emulated::Block& block = *self.block;
  const uint32_t fenced = emulated::fenced_by_warp();
  if (emulated::all_seen(block, fenced)) return;
  const auto check = [&](uint64_t descriptor, bool transposed, int first, int count) {
    for (int side = first; side < first + count; side += transposed ? 8 : 1)
      for (int depth = 0; depth < 16; depth += transposed ? 1 : 8)
        emulated::asynchronous_read(block, matrix_chunk<T>(block, descriptor, transposed, side, depth), 16, fenced,
                                    "wgmma");
  };
  if (!op.in_registers) check(op.a, op.transposed_a, self.index / 32 % 4 * 16, 16);
  check(op.b, op.transposed_b, 0, op.cols);
}

struct WgmmaArgument {
  uint64_t a, b;
  bool accumulate;
  const uint32_t* a_registers;
  float* d;
};

template <typename T, int kN, bool kTransposedA, bool kTransposedB>
GK_DEVICE void start_wgmma(WgmmaArgument mine) {
  static_assert(sizeof(T) == 2 && kN % 16 == 0 && kN >= 16 && kN <= 256);
#if defined(__SANITIZE_THREAD__)  // read now for the race checker, which does not watch the operation itself
  const emulated::Fiber& self = emulated::current();
  for (int i = self.lane; i < kN; i += 32)
    for (int k = 0; k < (kTransposedB ? 16 : 2); ++k)
      if (!kTransposedB || i % 8 == 0)
        emulated::read(matrix_chunk<T>(*self.block, mine.b, kTransposedB, i, kTransposedB ? k : 8 * k), 16);
  if (mine.a_registers == nullptr && self.lane < 16)
    for (int k = 0; k < (kTransposedA ? 16 : 2); ++k)
      if (!kTransposedA || self.lane % 8 == 0)
        emulated::read(matrix_chunk<T>(*self.block, mine.a, kTransposedA, self.index / 32 % 4 * 16 + self.lane,
                                       kTransposedA ? k : 8 * k),
                       16);
  emulated::release(&self.warp->matrix_groups);
#endif
  emulated::warp_collective(kAllLanes, "wgmma", &mine, [](void** all, uint32_t) {
    const auto lane = [&](int i) { return static_cast<const WgmmaArgument*>(all[i]); };
    emulated::MatrixOperation op{};
    op.run = multiply_rows<T>;
    op.a = lane(0)->a;
    op.b = lane(0)->b;
    op.cols = kN;
    op.in_registers = lane(0)->a_registers != nullptr;
    op.transposed_a = kTransposedA;
    op.transposed_b = kTransposedB;
    op.accumulate = lane(0)->accumulate;
    for (int i = 0; i < 32; ++i) {
      if (lane(i)->a != op.a || lane(i)->b != op.b || lane(i)->accumulate != op.accumulate)
        emulated::fail("wgmma: the lanes of a warp do not agree on the matrices");
      op.a_registers[i] = lane(i)->a_registers;
      op.d[i] = lane(i)->d;
    }
    check_operands<T>(op, emulated::current());
    emulated::start_matrix(op);
  });
}

template <typename T, int kN, bool kTransposedA = false, bool kTransposedB = false>
GK_DEVICE void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  start_wgmma<T, kN, kTransposedA, kTransposedB>({a, b, accumulate, nullptr, d});
}

template <typename T, int kN, bool kTransposedB = false>
GK_DEVICE void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  start_wgmma<T, kN, false, kTransposedB>({0, b, accumulate, a, d});
}

}  // namespace grokkernels::device
