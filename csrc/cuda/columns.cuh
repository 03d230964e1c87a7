// Rows in the registers of a few threads each: which columns are whose, and how they are read and written, in 16-byte
// vectors or, where these cannot be had, one by one.
#pragma once

#include "common/dtypes.h"
#include "cuda/vector.cuh"

namespace grokkernels::device {

inline constexpr int kColumnsOfThread = 16;

// Vectors of a row that a thread holds.
template <typename T>
inline constexpr int kShare = kColumnsOfThread / kVector<T>;

// The columns of one thread within a row, or within the piece of one that its block works on. Eight threads have 128
// columns side by side: their vectors i are one line of 128 bytes or, without alignment, their elements j neighbours.
template <typename T, bool kAligned>
struct Columns {
  static constexpr int kCount = kVector<T>;  // columns in a vector
  int first, left;                           // the first of them, and how many columns follow from there

  GK_DEVICE explicit Columns(int columns) {
    const int thread = static_cast<int>(threadIdx.x);
    first = thread / 8 * (8 * kColumnsOfThread) + thread % 8 * (kAligned ? kCount : 1);
    left = columns - first;
  }

  // The same, or nothing where there is no row.
  GK_DEVICE Columns where(bool there) const {
    Columns columns = *this;
    if (!there) columns.left = 0;
    return columns;
  }

  GK_DEVICE static int offset(int i, int j = 0) { return i * (8 * kCount) + j * (kAligned ? 1 : 8); }
  GK_DEVICE bool has(int i, int j = 0) const { return offset(i, j) < left; }

  // Vector i of a row of T as it is in memory; zeros beyond the end. Only what is `kept` goes through the L1 cache.
  template <bool kKept = false>
  GK_DEVICE Words4 load(const T* row, int i) const {
    if constexpr (kAligned) {
      if (!has(i)) return {};
      return kKept ? load_16_readonly(row + first + offset(i)) : load_16_streaming(row + first + offset(i));
    } else {
      float x[kCount];
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = has(i, j) ? widen((row + first)[offset(i, j)]) : 0.0f;
      return pack(x, T{});
    }
  }

  GK_DEVICE void store(T* row, int i, const float (&x)[kCount]) const {
    if constexpr (kAligned) {
      if (has(i)) store_vector(row + first + offset(i), x);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (has(i, j)) (row + first)[offset(i, j)] = narrow<T>(x[j]);
    }
  }

  // Vector i of a row of floats.
  GK_DEVICE void load_floats(const float* row, int i, float (&x)[kCount]) const {
    if constexpr (kAligned) {
#pragma unroll
      for (int j = 0; j < kCount; j += 4) {
        const Words4 words = has(i) ? load_16_readonly(row + first + offset(i, j)) : Words4{};
#pragma unroll
        for (int k = 0; k < 4; ++k) x[j + k] = bits_to_float(words.word[k]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = has(i, j) ? (row + first)[offset(i, j)] : 0.0f;
    }
  }

  GK_DEVICE void store_floats(float* row, int i, const float (&x)[kCount]) const {
    if constexpr (kAligned) {
      if (!has(i)) return;
#pragma unroll
      for (int j = 0; j < kCount; j += 4)
        store_16(row + first + offset(i, j), pack({x[j], x[j + 1], x[j + 2], x[j + 3]}, float{}));
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (has(i, j)) (row + first)[offset(i, j)] = x[j];
    }
  }

  // What columns are scaled by: a weight of float or T, from column `begin` on, plus `offset`.
  GK_DEVICE void load_scale(const void* weight, DType dtype, int64_t begin, float offset,
                            float (&scale)[kShare<T>][kCount]) const {
    if (sizeof(T) == sizeof(float) || dtype == DType::float32) {
#pragma unroll
      for (int i = 0; i < kShare<T>; ++i) load_floats(static_cast<const float*>(weight) + begin, i, scale[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kShare<T>; ++i) unpack(load<true>(static_cast<const T*>(weight) + begin, i), scale[i], T{});
    }
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i)
#pragma unroll
      for (int j = 0; j < kCount; ++j) scale[i][j] += offset;
  }
};

}  // namespace grokkernels::device
