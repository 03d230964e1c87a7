// Rows of tokens gathered into the slots of WarpgroupGemm's ring by the copying warpgroup: cp.async, 16 bytes to a
// thread, into the swizzled tiles that the copy engine would have written. Its 128 threads and the one that asks the
// copy engine for the other operand fill a slot: Product::start(kGatherArrivals).
#pragma once

#include <device/async.cuh>

#include "cuda/gemm_sm90.cuh"

namespace grokkernels::device {

inline constexpr int kGatherArrivals = 128 + 1;
inline constexpr int kGatherRegisters = 56, kGatheredRegisters = 224;  // of a thread: 56 + 2 * 224 = 3 * 168

// When a slot's copies have landed, which is kBehind steps later, each thread makes its own visible to wgmma and
// arrives.
template <typename Product>
class LateArrival {
 public:
  using Ring = typename Product::Ring;

  GK_DEVICE explicit LateArrival(const Ring& ring) : behind_(ring) {}

  // All copies of a step have been issued.
  GK_DEVICE void commit() {
    copy_async_commit();
    if (under_way_ == kBehind) {
      copy_async_wait<kBehind>();
      arrive();
    } else {
      ++under_way_;
    }
  }

  GK_DEVICE void finish() {
    copy_async_wait<0>();
    for (; under_way_ > 0; --under_way_) arrive();
  }

 private:
  static constexpr int kBehind = 2;
  // Those who multiply hold two slots: the last one until the next is full.
  static_assert(kBehind + 2 <= Product::kSlots);

  GK_DEVICE void arrive() {
    fence_proxy_async();
    mbarrier_arrive(behind_.full());
    behind_.next();
  }

  Ring behind_;  // the slot whose copies are waited for next
  int under_way_ = 0;
};

// The chunk of a 128-byte row, and the first row, that this thread copies; the others follow 16 rows apart.
GK_DEVICE int gather_chunk() { return static_cast<int>(threadIdx.x) % 8; }
GK_DEVICE int gather_row() { return static_cast<int>(threadIdx.x) / 8; }

// The left operand, tokens as its rows: rows begin .. end of the order, 128 at most; others and what lies past `cols`
// are zero.
template <typename T, typename Product>
class TokenRows {
 public:
  GK_DEVICE TokenRows(const void* x, int64_t stride, int cols, const int32_t* token_of, int begin, int end)
      : x_(static_cast<const T*>(x) + gather_chunk() * 8), stride_(stride), cols_(cols) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = begin + gather_row() + i * 16;
      inside_ |= static_cast<unsigned>(row < end) << i;
      token_[i] = row < end ? token_of[row] : 0;
    }
  }

  GK_DEVICE void copy(uint32_t tile, int step) const {
    const int depth = step * Product::kStep;
    const bool deep = depth + gather_chunk() * 8 < cols_;
#pragma unroll
    for (int i = 0; i < kCopies; ++i)
      copy_async_16(swizzled(tile + static_cast<uint32_t>((gather_row() + i * 16) * 128 + gather_chunk() * 16),
                             Swizzle::bytes_128),
                    x_ + token_[i] * stride_ + depth, deep && (inside_ >> i & 1) != 0);
  }

 private:
  static constexpr int kCopies = Product::kRows / 16;

  const T* x_;
  int64_t stride_;
  int cols_, token_[kCopies];
  unsigned inside_ = 0;
};

// A transposed operand, tokens along the sum: columns `col` .. of rows begin .. end of the order, kSide columns to a
// tile; what lies outside is zero.
template <typename T, typename Product, int kSide>
class TokenColumns {
 public:
  GK_DEVICE TokenColumns(const void* x, int64_t stride, int cols, const int32_t* token_of, int begin, int end, int col)
      : x_(static_cast<const T*>(x) + col + gather_chunk() * 8),
        stride_(stride),
        left_(cols - col - gather_chunk() * 8),
        token_of_(token_of),
        begin_(begin),
        end_(end) {}

  GK_DEVICE void copy(uint32_t tile, int step) const {
#pragma unroll
    for (int i = 0; i < Product::kStep / 16; ++i) {
      const int row = begin_ + step * Product::kStep + gather_row() + i * 16;
      const bool inside = row < end_;
      const T* from = x_ + (inside ? token_of_[row] : 0) * stride_;
      const uint32_t to = swizzled(tile + static_cast<uint32_t>((gather_row() + i * 16) * 128 + gather_chunk() * 16),
                                   Swizzle::bytes_128);
#pragma unroll
      for (int panel = 0; panel < kSide / 64; ++panel)
        copy_async_16(to + panel * (Product::kStep * 128), from + panel * 64, inside && panel * 64 < left_);
    }
  }

 private:
  const T* x_;
  int64_t stride_;
  int left_;
  const int32_t* token_of_;
  int begin_, end_;
};

}  // namespace grokkernels::device
