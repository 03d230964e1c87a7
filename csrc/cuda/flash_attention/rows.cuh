// Rows of q, k, v and dout into tiles of shared memory by cp.async, and results out of a tile.
//
// Every row starts at a multiple of 16 bytes and is padded with zeros to whole chunks of 16 (csrc/torch sees to it), so
// a chunk is copied whole or not at all: what is not there becomes zero, at no cost (cp.async can fill).
#pragma once

#include <device/async.cuh>
#include <device/warp.cuh>

#include "cuda/flash_attention/problem.cuh"
#include "cuda/tile.cuh"
#include "cuda/vector.cuh"

namespace grokkernels::attention {

using namespace device;

// How kThreads threads share the chunks of a tile: kLanes neighbours take turns along a row, so that a row is read in
// whole lines and a thread's place in the swizzle never changes.
template <typename Tile, int kRows, int kThreads>
struct Share {
  static constexpr int kLanes = Tile::kChunks % 8 == 0 ? 8 : 4;
  static constexpr int kPieces = Tile::kChunks / kLanes;  // of a row, per thread
  static constexpr int kStep = kThreads / kLanes;         // rows from one pass to the next
  static constexpr int kPasses = kRows / kStep;
  static_assert(Tile::kChunks % kLanes == 0 && kStep % 8 == 0 && kRows % kStep == 0);

  int row, chunk;   // of the first pass and piece
  uint32_t offset;  // in the tile

  GK_DEVICE explicit Share(unsigned thread)
      : row(static_cast<int>(thread / kLanes)),
        chunk(static_cast<int>(thread % kLanes)),
        offset(Tile::offset(row, chunk)) {}

  // Where this thread reads first, in rows that begin `stride` bytes apart from `first` on.
  GK_DEVICE const char* from(const void* first, int stride) const {
    return static_cast<const char*>(first) + static_cast<int64_t>(stride) * row + chunk * 16;
  }

  GK_DEVICE uint32_t address(const Tile& tile, int pass, int piece) const {
    return tile.base + offset + static_cast<uint32_t>((pass * kStep * Tile::kPitch + piece * kLanes) * 16);
  }
};

// Copies kRows rows into the tile, this thread from share.from(...); those outside `valid` become zero and are not
// read, nor are chunks from `chunks` on.
template <bool kChecked, typename Tile, int kRows, int kThreads>
GK_DEVICE void copy_rows(const Tile& tile, const Share<Tile, kRows, kThreads>& share, const char* from, int stride,
                         KeyRange valid, int chunks) {
  using S = Share<Tile, kRows, kThreads>;
#pragma unroll
  for (int pass = 0; pass < S::kPasses; ++pass) {
    const int row = share.row + pass * S::kStep;
    const bool inside = !kChecked || (row >= valid.begin && row < valid.end);
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece)
      copy_async_16(share.address(tile, pass, piece), from + piece * S::kLanes * 16,
                    inside && share.chunk + piece * S::kLanes < chunks);
    from += static_cast<int64_t>(stride) * S::kStep;
  }
}

// The same of folded rows first_row + i, of which there are `count`.
template <typename T, typename Tile, int kRows, int kThreads>
GK_DEVICE void copy_folded(const Tile& tile, const Share<Tile, kRows, kThreads>& share, const AttentionTensor& x,
                           const Sequence& s, int kv_head, int group, int first_row, int count, int chunks) {
  using S = Share<Tile, kRows, kThreads>;
  const T* head = row_of<T>(x, s, s.first_query, kv_head * group);
#pragma unroll
  for (int pass = 0; pass < S::kPasses; ++pass) {
    const int i = share.row + pass * S::kStep;
    const unsigned row = static_cast<unsigned>(first_row + (i < count ? i : 0)), g = static_cast<unsigned>(group);
    const T* from = head + (row / g) * x.row_stride + (row % g) * x.head_stride;
#pragma unroll
    for (int piece = 0; piece < S::kPieces; ++piece) {
      const int chunk = share.chunk + piece * S::kLanes;
      copy_async_16(share.address(tile, pass, piece), from + chunk * kVector<T>, i < count && chunk < chunks);
    }
  }
}

// Whether all rows of a dense tensor with `cols` columns begin at multiples of 16 bytes.
template <typename T>
GK_DEVICE bool whole_chunks(const void* data, int64_t cols) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && cols % kVector<T> == 0;
}

// Two neighbouring columns of a row, into shared memory.
template <typename T>
GK_DEVICE void store_pair(uint32_t address, float x, float y) {
  if constexpr (sizeof(T) == 2)
    store_shared_4(address, narrow_pair<T>(x, y));
  else
    store_shared_8(address, {{float_to_bits(x), float_to_bits(y)}});
}

// 16 rows of accumulators times factor[0] (rows g) and factor[1] (rows g + 8), through the tile's rows from `row` on,
// which are this warp's own, to the rows of a tensor: `to(i)` is where the i-th of `count` rows begins, `cols` its
// length. `vectors`: all of them begin at multiples of 16 bytes.
template <typename T, int kBlocks, typename Tile, typename Pointer>
GK_DEVICE void store_rows(const float (&x)[kBlocks][4], const float (&factor)[2], const Tile& tile, int row, int count,
                          int cols, bool vectors, Pointer to) {
  const int lane = lane_id(), g = lane / 4, t = lane % 4;
  sync_warp();
#pragma unroll
  for (int n = 0; n < kBlocks; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      store_pair<T>(tile.at(row + g + 8 * r, 8 * n + 2 * t), x[n][2 * r] * factor[r], x[n][2 * r + 1] * factor[r]);
  sync_warp();
  const int chunks = (cols + kVector<T> - 1) / kVector<T>;
  for (int i = lane / 4; i < least(count, 16); i += 8) {
    T* out = to(i);
    for (int chunk = lane % 4; chunk < chunks; chunk += 4) {
      const Words4 words = load_shared_16(tile.chunk(row + i, chunk));
      if (vectors) {
        store_16(out + chunk * kVector<T>, words);
      } else {
        float values[kVector<T>];
        unpack(words, values, T{});
        store_elements(out + chunk * kVector<T>, cols - chunk * kVector<T>, values);
      }
    }
  }
}

}  // namespace grokkernels::attention
