// gated_activation: y = act(gate) * up over matrices (rows, cols) whose rows may lie apart (the halves of a fused
// projection), and both gradients. Shazeer, "GLU Variants Improve Transformer" (2020).
//
// One pass over memory in each direction. A thread takes two 16-byte vectors of each matrix, all of its reads before
// the first use; the gradient takes the activation and its slope from one exponential. Matrices without gaps are one
// row.
#include "cuda/activation.cuh"
#include "cuda/vector.cuh"
#include "gated_activation.h"

namespace grokkernels {
namespace {

using namespace device;

constexpr int kThreads = 256, kShare = 2;  // vectors of a thread

template <typename T>
constexpr int kBlockCols = kThreads * kShare * kVector<T>;

// The columns of this thread: vector i starts at column first + i * kThreads * kVector<T> of its row. Without alignment
// its elements lie kThreads columns apart, so that the reads of neighbours are neighbours.
template <typename T, bool kAligned>
struct Part {
  int64_t row, begin;  // of the block
  int left;            // columns of the block from this thread's first

  GK_DEVICE Part(int64_t cols, unsigned blocks_per_row) {
    const unsigned block = blockIdx.x % blocks_per_row;
    row = blockIdx.x / blocks_per_row;
    begin = int64_t{block} * kBlockCols<T> + threadIdx.x * (kAligned ? kVector<T> : 1);
    const int64_t rest = cols - begin;
    left = rest < kBlockCols<T> ? static_cast<int>(rest) : kBlockCols<T>;
  }

  GK_DEVICE static int offset(int i, int j = 0) { return i * (kThreads * kVector<T>)+j * (kAligned ? 1 : kThreads); }

  GK_DEVICE void load(const void* matrix, int64_t stride, Words4 (&x)[kShare]) const {
    const T* p = static_cast<const T*>(matrix) + row * stride + begin;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if constexpr (kAligned) {
        x[i] = offset(i) < left ? load_16_streaming(p + offset(i)) : Words4{};
      } else {
        float v[kVector<T>];
#pragma unroll
        for (int j = 0; j < kVector<T>; ++j) v[j] = offset(i, j) < left ? widen(p[offset(i, j)]) : 0.0f;
        x[i] = pack(v, T{});
      }
    }
  }

  GK_DEVICE void store(void* matrix, int64_t cols, int i, const float (&x)[kVector<T>]) const {
    T* p = static_cast<T*>(matrix) + row * cols + begin;
    if constexpr (kAligned) {
      if (offset(i) < left) store_vector(p + offset(i), x);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j)
        if (offset(i, j) < left) p[offset(i, j)] = narrow<T>(x[j]);
    }
  }
};

template <typename T, Activation kKind, bool kAligned>
__global__ void __launch_bounds__(kThreads, 4)
    gated_activation_fwd_kernel(const __grid_constant__ GatedActivationFwdParams p, unsigned blocks_per_row) {
  const Part<T, kAligned> part(p.cols, blocks_per_row);
  Words4 gates[kShare], ups[kShare];
  part.load(p.gate, p.gate_stride, gates);
  part.load(p.up, p.up_stride, ups);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    float gate[kVector<T>], y[kVector<T>];
    unpack(gates[i], gate, T{});
    unpack(ups[i], y, T{});
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) y[j] *= activate<kKind>(gate[j]);
    part.store(p.y, p.cols, i, y);
  }
}

template <typename T, Activation kKind, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3)
    gated_activation_bwd_kernel(const __grid_constant__ GatedActivationBwdParams p, unsigned blocks_per_row) {
  const Part<T, kAligned> part(p.cols, blocks_per_row);
  Words4 dys[kShare], gates[kShare], ups[kShare];
  part.load(p.dy, p.dy_stride, dys);
  part.load(p.gate, p.gate_stride, gates);
  part.load(p.up, p.up_stride, ups);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    float dy[kVector<T>], gate[kVector<T>], up[kVector<T>];
    unpack(dys[i], dy, T{});
    unpack(gates[i], gate, T{});
    unpack(ups[i], up, T{});
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) {
      const ValueAndSlope act = value_and_slope<kKind>(gate[j]);
      gate[j] = dy[j] * up[j] * act.slope;
      up[j] = dy[j] * act.value;
    }
    part.store(p.dgate, p.cols, i, gate);
    part.store(p.dup, p.cols, i, up);
  }
}

template <typename T>
bool aligned(int64_t cols, std::initializer_list<const void*> data, std::initializer_list<int64_t> strides) {
  bool all = cols % kVector<T> == 0;
  for (const void* p : data) all = all && vectorizable<T>(p, cols);
  for (int64_t stride : strides) all = all && stride % kVector<T> == 0;
  return all;
}

// f.template operator()<T, kind, aligned>(blocks of a row, shape).
template <typename T, typename F>
void with_part(int64_t rows, int64_t cols, Activation kind, bool aligned, const F& f) {
  const int64_t blocks = (cols + kBlockCols<T> - 1) / kBlockCols<T>;
  const LaunchShape shape{.grid = {static_cast<unsigned>(rows * blocks)}, .block = {kThreads}};
  with_activation(kind, [&]<Activation kKind>() {
    if (aligned)
      f.template operator()<kKind, true>(static_cast<unsigned>(blocks), shape);
    else
      f.template operator()<kKind, false>(static_cast<unsigned>(blocks), shape);
  });
}

}  // namespace

void gated_activation_fwd_cuda(const GatedActivationFwdParams& params, Stream stream) {
  GatedActivationFwdParams p = params;
  if (p.gate_stride == p.cols && p.up_stride == p.cols) {
    p.cols = p.gate_stride = p.up_stride = p.rows * p.cols;
    p.rows = 1;
  }
  GK_SWITCH_DTYPE(p.dtype, T, {
    with_part<T>(p.rows, p.cols, p.kind, aligned<T>(p.cols, {p.gate, p.up, p.y}, {p.gate_stride, p.up_stride}),
                 [&]<Activation kKind, bool kAligned>(unsigned blocks, const LaunchShape& shape) {
                   launch(gated_activation_fwd_kernel<T, kKind, kAligned>, shape, stream, p, blocks);
                 });
  });
}

void gated_activation_bwd_cuda(const GatedActivationBwdParams& params, Stream stream) {
  GatedActivationBwdParams p = params;
  if (p.dy_stride == p.cols && p.gate_stride == p.cols && p.up_stride == p.cols) {
    p.cols = p.dy_stride = p.gate_stride = p.up_stride = p.rows * p.cols;
    p.rows = 1;
  }
  GK_SWITCH_DTYPE(p.dtype, T, {
    with_part<T>(p.rows, p.cols, p.kind,
                 aligned<T>(p.cols, {p.dy, p.gate, p.up, p.dgate, p.dup}, {p.dy_stride, p.gate_stride, p.up_stride}),
                 [&]<Activation kKind, bool kAligned>(unsigned blocks, const LaunchShape& shape) {
                   launch(gated_activation_bwd_kernel<T, kKind, kAligned>, shape, stream, p, blocks);
                 });
  });
}

}  // namespace grokkernels
