// Tiles as Hopper's copy engine and tensor cores see them: a tensor in global memory with a box to copy, and a matrix
// in shared memory.
//
// Swizzle. A tile's rows are 32, 64 or 128 bytes; within them the 16-byte chunks are exchanged by the bits above, so
// that both a row and a column of chunks lie in different banks (PTX ISA, "Swizzling modes"): bits 4.. of the shared
// address are xor-ed with as many bits from bit 7. The pattern repeats every 256, 512 or 1024 bytes, and tiles start at
// a multiple of that; it depends on the address alone, so a tile's columns begin at its start + their offset.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/dtypes.h"

namespace grokkernels {

enum class Swizzle : int { none, bytes_32, bytes_64, bytes_128 };

// Bytes of a tile's row; 16 without a swizzle, where a row of a core matrix is one chunk.
GK_ALWAYS_INLINE constexpr uint32_t swizzle_bytes(Swizzle swizzle) { return 16u << static_cast<int>(swizzle); }

// Where the chunk (or any byte of it) that would stand at this shared address stands.
GK_ALWAYS_INLINE constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  return address ^ ((address >> 7 & (swizzle_bytes(swizzle) / 16 - 1)) << 4);
}

// The shared addresses that a tile may start at are the multiples of this.
GK_ALWAYS_INLINE constexpr uint32_t tile_alignment(Swizzle swizzle) {
  return swizzle == Swizzle::none ? 128 : 8 * swizzle_bytes(swizzle);
}

// A tensor in global memory and the box of it that one copy takes: dimension 0 is the dense one. In shared memory the
// box is dense, dimension 0 fastest. What lies outside the tensor is read as zero and not written.
struct TensorTiles {
  DType dtype;
  const void* data;
  int rank;           // 1 to 5
  int64_t size[5];    // elements of each dimension
  int64_t stride[5];  // elements from one to the next; stride[0] is 1
  int box[5];         // elements of the box; with a swizzle, box[0] fills its bytes
  Swizzle swizzle = Swizzle::none;
};

// The library's last refusal below, for who asks why Hopper's kernels did not run; null: none.
inline std::atomic<const char*>& last_tiles_refusal() {
  static std::atomic<const char*> why{nullptr};
  return why;
}

// What speaks against such tiles; null: nothing.
inline const char* tensor_tiles_fault(const TensorTiles& t) {
  const int64_t element = size_of(t.dtype);
  if (t.rank < 1 || t.rank > 5) return "a tensor map has 1 to 5 dimensions";
  if (reinterpret_cast<uintptr_t>(t.data) % 16 != 0) return "the tensor does not start at a multiple of 16 bytes";
  if (t.stride[0] != 1 && t.size[0] != 1) return "the first dimension of a tensor map is dense";
  for (int i = 0; i < t.rank; ++i) {
    if (t.size[i] < 1 || t.size[i] > int64_t{1} << 32) return "a tensor map's sizes are 1 to 2^32";
    if (t.box[i] < 1 || t.box[i] > 256) return "a box has 1 to 256 elements in every dimension";
    if (i == 0 || t.size[i] == 1) continue;
    if (t.stride[i] * element % 16 != 0) return "the tensor's strides are not multiples of 16 bytes";
    if (t.stride[i] <= 0 || t.stride[i] * element >= int64_t{1} << 40)
      return "a tensor map's strides are above 0 and below 2^40 bytes";
  }
  if (t.box[0] * element % 16 != 0) return "a box's rows are not multiples of 16 bytes";
  if (t.swizzle != Swizzle::none && t.box[0] * element != swizzle_bytes(t.swizzle))
    return "a box's rows are not as long as its swizzle";
  return nullptr;
}

// Why the hardware cannot copy such tiles, or null when it can (CUDA driver API, cuTensorMapEncodeTiled).
inline const char* tensor_tiles_refusal(const TensorTiles& t) {
  const char* why = tensor_tiles_fault(t);
  if (why != nullptr) last_tiles_refusal() = why;
  return why;
}

// A matrix of 16-bit elements in shared memory, as wgmma takes it: A (64 x 16) or B^T (N x 16), here "side" x "depth".
// It starts at `address`, a multiple of 16; chunks are 16 bytes, 8 elements. Where its chunks stand (PTX ISA,
// "Asynchronous Warpgroup Level Canonical Layouts"; W = swizzle_bytes), before the swizzle:
//   depth is dense (K-major, not transposed):  chunk (side s, depth 8 c) at
//     W = 16   s / 8 * stride + s % 8 * 16 + c * leading
//     else     s / 8 * stride + s % 8 * W + c * 16              (leading is not used)
//   side is dense (MN-major, transposed):      chunk (side 8 c, depth k) at
//     W = 16   c * stride + k % 8 * 16 + k / 8 * leading
//     else     c % (W / 16) * 16 + c / (W / 16) * leading + k % 8 * W + k / 8 * stride
// So a tile copied with a 128-byte swizzle has stride 1024. To go on along the depth, add to the address: 32 bytes
// where depth is dense (within the 128), 16 rows of 128 bytes where side is.
GK_ALWAYS_INLINE constexpr uint64_t matrix_descriptor(uint32_t address, Swizzle swizzle, uint32_t leading,
                                                      uint32_t stride) {
  const uint64_t mode = swizzle == Swizzle::none ? 0 : 4 - static_cast<uint64_t>(swizzle);
  return uint64_t{(address & 0x3FFFF) >> 4} | uint64_t{leading >> 4 & 0x3FFF} << 16 |
         uint64_t{stride >> 4 & 0x3FFF} << 32 | mode << 62;
}

}  // namespace grokkernels
