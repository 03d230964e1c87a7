// The rows that count, gathered: what forward and backward of linear_cross_entropy begin with.
#pragma once

#include "cuda/cross_entropy_row.cuh"
#include "cuda/gemm.cuh"
#include "cuda/groups.cuh"
#include "linear_cross_entropy.h"

namespace grokkernels::device {

inline constexpr int kCountThreads = 1024;

// By one block: the rows whose target is not ignore_index, in order, in index (N), and how many there are in index[N];
// f(row, counts) for every row. `scratch`: kCountThreads / 32 integers of shared memory.
template <typename F>
GK_DEVICE int count_rows(const Targets& targets, int64_t ignore_index, int rows, int32_t* index, int* scratch,
                         const F& f) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  int before = 0;
  for (int begin = 0; begin < rows; begin += kCountThreads) {
    const int row = begin + thread;
    const bool counts = row < rows && target_of(targets, row) != ignore_index;
    if (row < rows) f(row, counts);
    const uint32_t of_warp = ballot(counts);
    if (lane == 0) scratch[thread / 32] = count_bits(of_warp);
    sync_threads();
    int place = before + count_bits(of_warp & ((1u << lane) - 1));
#pragma unroll
    for (int warp = 0; warp < kCountThreads / 32; ++warp) {
      if (warp < thread / 32) place += scratch[warp];
      before += scratch[warp];
    }
    if (counts) index[place] = row;
    sync_threads();
  }
  if (thread == 0) index[rows] = before;
  return before;
}

// The column of the product's tile that number i of a row of it (each_row) belongs to.
template <typename Product>
GK_DEVICE int column_of(int i) {
  return Product::col_of(i / 2) + i % 2;
}

// The i for which column_of(i) is `column`, or -1.
template <typename Product>
GK_DEVICE int place_of_column(int64_t column) {
  const int64_t ahead = column - Product::col_of(0);
  const bool mine = ahead >= 0 && ahead < 8 * Product::kAcross && (ahead & 7) < 2;
  return mine ? static_cast<int>(ahead >> 3) * 2 + static_cast<int>(ahead & 1) : -1;
}

}  // namespace grokkernels::device
