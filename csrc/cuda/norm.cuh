// What the norm kernels share: a row of C columns dealt out to the threads of a block (common/norm_plan.h), its sums,
// and the gradients of weights, which are sums over rows.
//
// Blocks are (lanes, groups): each of `groups` rows has `lanes` threads, each thread 16 columns, which stay in
// registers between the sum over the row and what is made of it. Rows longer than that are cut into pieces.
#pragma once

#include <initializer_list>

#include "common/norm_plan.h"
#include "cuda/columns.cuh"
#include "cuda/reduce.cuh"

namespace grokkernels::device {

static_assert(kNormElements == kColumnsOfThread);

// The place of a block's piece: which part of which rows.
struct Piece {
  int64_t chunk, begin;
  int columns;

  GK_DEVICE Piece(const NormPlan& plan, int64_t cols) {
    const unsigned pieces = static_cast<unsigned>(plan.pieces), piece = blockIdx.x % pieces;
    chunk = blockIdx.x / pieces;
    begin = int64_t{piece} * plan.span;
    columns = cols - begin < plan.span ? static_cast<int>(cols - begin) : plan.span;
  }
};

// Sum over the threads of a row, in a fixed order; each of them gets it. `scratch`: 32 floats, free again after the
// next sync_threads.
GK_DEVICE float row_sum(float x, float* scratch) {
  const int lanes = static_cast<int>(blockDim.x), warps = lanes / 32;
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2)
    if (mask < lanes) x += shuffle_xor(x, mask);
  if (lanes <= 32) return x;
  if (lane_id() == 0) scratch[threadIdx.x / 32] = x;
  sync_threads();
  return warp_sum(lane_id() < warps ? scratch[lane_id()] : 0.0f);
}

// The sum over a whole row from those of its pieces.
GK_DEVICE float sum_of_pieces(const float* sums, int64_t pieces, float* scratch) {
  float x = 0.0f;
  for (int64_t piece = threadIdx.x; piece < pieces; piece += blockDim.x) x += sums[piece];
  return row_sum(x, scratch);
}

// The block's dynamic shared memory: 2 * 32 floats for sums, then what add_groups needs.
GK_DEVICE float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// Writes the sums of x over the block's groups of rows, of `cols` columns, to a row of floats.
template <typename T, bool kAligned>
GK_DEVICE void add_groups(const Columns<T, kAligned>& columns, float (&x)[kShare<T>][kVector<T>], int cols,
                          float* row) {
  if (blockDim.y > 1) {                  // short rows, never in pieces
    float* sums = shared_floats() + 64;  // (groups, columns)
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i)
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (columns.has(i, j)) sums[threadIdx.y * cols + columns.first + columns.offset(i, j)] = x[i][j];
    sync_threads();
    for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < cols; c += blockDim.x * blockDim.y) {
      float sum = 0.0f;
      for (unsigned group = 0; group < blockDim.y; ++group) sum += sums[group * cols + c];
      row[c] = sum;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) columns.store_floats(row, i, x[i]);
}

// dweight (C) = the sum of `partial` (chunks, C) over chunks, in a fixed order, in doubles. 32 columns to a block.
inline constexpr int kReduceRows = 16;

template <typename W>
__global__ void __launch_bounds__(32 * kReduceRows)
    norm_weight_gradient_kernel(const float* partial, int64_t chunks, int64_t cols, W* dweight) {
  double* sums = reinterpret_cast<double*>(dynamic_shared());  // (kReduceRows, 32)
  const int64_t col = int64_t{blockIdx.x} * 32 + threadIdx.x;
  double sum = 0.0;
  if (col < cols)
#pragma unroll 4
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kReduceRows) sum += partial[chunk * cols + col];
  sums[threadIdx.y * 32 + threadIdx.x] = sum;
  sync_threads();
  if (threadIdx.y != 0 || col >= cols) return;
  for (int row = 1; row < kReduceRows; ++row) sum += sums[row * 32 + threadIdx.x];
  dweight[col] = narrow<W>(static_cast<float>(sum));
}

inline void norm_weight_gradient(const float* partial, int64_t chunks, int64_t cols, DType dtype, void* dweight,
                                 Stream stream) {
  const LaunchShape shape{.grid = {static_cast<unsigned>((cols + 31) / 32)},
                          .block = {32, kReduceRows},
                          .shared_bytes = 32 * kReduceRows * sizeof(double)};
  GK_SWITCH_DTYPE(dtype, W, {
    launch(norm_weight_gradient_kernel<W>, shape, stream, partial, chunks, cols, static_cast<W*>(dweight));
  });
}

// Host: the blocks of a kernel in which each takes one piece of the rows of one of `chunks`; with `sums`, floats of
// shared memory for a row of each group.
inline LaunchShape norm_shape(const NormPlan& plan, int64_t chunks, int64_t sums = 0) {
  return {.grid = {static_cast<unsigned>(plan.pieces * chunks)},
          .block = {static_cast<unsigned>(plan.lanes), static_cast<unsigned>(plan.groups)},
          .shared_bytes = (2 * 32 + (plan.groups > 1 ? plan.groups * sums : 0)) * sizeof(float)};
}

// Host: f.template operator()<aligned>() for what is known at run time.
template <typename F>
void with_alignment(bool aligned, const F& f) {
  if (aligned)
    f.template operator()<true>();
  else
    f.template operator()<false>();
}

// Host: whether rows of `cols` columns of T can be moved in 16-byte vectors: all of these addresses and strides allow
// it.
template <typename T>
bool norm_aligned(int64_t cols, std::initializer_list<const void*> data, std::initializer_list<int64_t> strides) {
  bool aligned = cols % kVector<T> == 0;
  for (const void* p : data) aligned = aligned && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : strides) aligned = aligned && stride % kVector<T> == 0;
  return aligned;
}

}  // namespace grokkernels::device
