// rms_norm: y = h * rsqrt(mean(h^2) + eps) * weight over the rows of (N, C), h = x + residual where there is one, and
// its gradient. Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
//
// A row is read once and kept in the registers of its threads. Forward: its sum of squares, then y. Backward, with
// g = dy * weight and xhat = x * rstd: dx = rstd * (g - xhat * mean(g * xhat)) + dh; a block takes several rows one
// after another and adds dy * xhat of each to a dweight of its own, still in registers; a second kernel adds those up.
// Rows too long for that (cuda/norm.cuh) are cut into pieces, whose sums a kernel before gathers: they are read twice.
#include "cuda/norm.cuh"
#include "rms_norm.h"

namespace grokkernels {
namespace {

using namespace device;

// What is normalised, and its sum of squares over this thread's columns. Writes h where it is a sum.
template <typename T, bool kAligned>
GK_DEVICE float load_row(const RmsNormFwdParams& p, int64_t row, int64_t begin, const Columns<T, kAligned>& columns,
                         Words4 (&x)[kShare<T>]) {
  constexpr int kCount = kVector<T>;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) x[i] = columns.load(static_cast<const T*>(p.x) + row * p.x_stride + begin, i);
  if (p.residual != nullptr) {
    Words4 residual[kShare<T>];
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i)
      residual[i] = columns.load(static_cast<const T*>(p.residual) + row * p.residual_stride + begin, i);
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float a[kCount], b[kCount];
      unpack(x[i], a, T{});
      unpack(residual[i], b, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) a[j] += b[j];
      x[i] = pack(a, T{});
      unpack(x[i], a, T{});
      columns.store(static_cast<T*>(p.h) + row * p.cols + begin, i, a);
    }
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) {
    float v[kCount], squares = 0.0f;
    unpack(x[i], v, T{});
#pragma unroll
    for (int j = 0; j < kCount; ++j) squares = fmaf(v[j], v[j], squares);
    sum += squares;
  }
  return sum;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 1)
    rms_norm_fwd_sums_kernel(const __grid_constant__ RmsNormFwdParams p, const __grid_constant__ NormPlan plan) {
  const Piece piece(plan, p.cols);
  const Columns<T, kAligned> columns(piece.columns);
  Words4 x[kShare<T>];
  const float sum = row_sum(load_row(p, piece.chunk, piece.begin, columns, x), shared_floats());
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 1)
    rms_norm_fwd_kernel(const __grid_constant__ RmsNormFwdParams p, const __grid_constant__ NormPlan plan) {
  constexpr int kCount = kVector<T>;
  const Piece piece(plan, p.cols);
  const int64_t row = piece.chunk * blockDim.y + threadIdx.y;
  const auto columns = Columns<T, kAligned>(piece.columns).where(row < p.rows);
  Words4 x[kShare<T>];
  float sum = load_row(p, row, piece.begin, columns, x);
  float scale[kShare<T>][kCount];
  columns.load_scale(p.weight, p.weight_dtype, piece.begin, p.zero_centered ? 1.0f : 0.0f, scale);
  sum = plan.pieces == 1 ? row_sum(sum, shared_floats())
                         : sum_of_pieces(p.sums + row * plan.pieces, plan.pieces, shared_floats());
  const float rstd = 1.0f / sqrtf(sum / static_cast<float>(p.cols) + p.eps);
  if (threadIdx.x == 0 && piece.begin == 0 && row < p.rows) p.rstd[row] = rstd;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) {
    float v[kCount];
    unpack(x[i], v, T{});
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = v[j] * rstd * scale[i][j];
    columns.store(static_cast<T*>(p.y) + row * p.cols + piece.begin, i, v);
  }
}

// x and dy of one row.
template <typename T>
struct Gradients {
  Words4 x[kShare<T>], dy[kShare<T>];
  float rstd;

  template <bool kAligned>
  GK_DEVICE Gradients(const RmsNormBwdParams& p, int64_t row, int64_t begin, const Columns<T, kAligned>& columns) {
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) x[i] = columns.load(static_cast<const T*>(p.x) + row * p.x_stride + begin, i);
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i)
      dy[i] = columns.load(static_cast<const T*>(p.dy) + row * p.dy_stride + begin, i);
    rstd = row < p.rows ? p.rstd[row] : 0.0f;
  }
};

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 1)
    rms_norm_bwd_sums_kernel(const __grid_constant__ RmsNormBwdParams p, const __grid_constant__ NormPlan plan) {
  constexpr int kCount = kVector<T>;
  const Piece piece(plan, p.cols);
  const Columns<T, kAligned> columns(piece.columns);
  const Gradients<T> row(p, piece.chunk, piece.begin, columns);
  float scale[kShare<T>][kCount];
  columns.load_scale(p.weight, p.weight_dtype, piece.begin, p.zero_centered ? 1.0f : 0.0f, scale);
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) {
    float x[kCount], dy[kCount], part = 0.0f;
    unpack(row.x[i], x, T{});
    unpack(row.dy[i], dy, T{});
#pragma unroll
    for (int j = 0; j < kCount; ++j) part = fmaf(dy[j] * scale[i][j], x[j] * row.rstd, part);
    dot += part;
  }
  dot = row_sum(dot, shared_floats());
  if (threadIdx.x == 0) p.sums[blockIdx.x] = dot;
}

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 1)
    rms_norm_bwd_kernel(const __grid_constant__ RmsNormBwdParams p, const __grid_constant__ NormPlan plan) {
  constexpr int kCount = kVector<T>;
  const Piece piece(plan, p.cols);
  const Columns<T, kAligned> all(piece.columns);
  float scale[kShare<T>][kCount], dweight[kShare<T>][kCount] = {};
  all.load_scale(p.weight, p.weight_dtype, piece.begin, p.zero_centered ? 1.0f : 0.0f, scale);
#pragma unroll 1
  for (int step = 0; step < plan.steps; ++step) {
    const int64_t row = (piece.chunk * plan.steps + step) * blockDim.y + threadIdx.y;
    const auto columns = all.where(row < p.rows);
    const Gradients<T> in(p, row, piece.begin, columns);
    Words4 dh[kShare<T>] = {};
    if (p.dh != nullptr) {
#pragma unroll
      for (int i = 0; i < kShare<T>; ++i)
        dh[i] = columns.load(static_cast<const T*>(p.dh) + row * p.dh_stride + piece.begin, i);
    }
    float dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float x[kCount], dy[kCount], part = 0.0f;
      unpack(in.x[i], x, T{});
      unpack(in.dy[i], dy, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float xhat = x[j] * in.rstd;
        dweight[i][j] = fmaf(dy[j], xhat, dweight[i][j]);
        part = fmaf(dy[j] * scale[i][j], xhat, part);
      }
      dot += part;
    }
    float* scratch = shared_floats() + step % 2 * 32;
    const float* sums = p.sums + (row < p.rows ? row : 0) * plan.pieces;
    dot = plan.pieces == 1 ? row_sum(dot, scratch) : sum_of_pieces(sums, plan.pieces, scratch);
    const float mean = dot / static_cast<float>(p.cols);
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float x[kCount], dx[kCount], also[kCount];
      unpack(in.x[i], x, T{});
      unpack(in.dy[i], dx, T{});
      unpack(dh[i], also, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) dx[j] = fmaf(in.rstd, fmaf(-x[j] * in.rstd, mean, dx[j] * scale[i][j]), also[j]);
      columns.store(static_cast<T*>(p.dx) + row * p.cols + piece.begin, i, dx);
    }
  }
  add_groups(all, dweight, piece.columns, p.partial + piece.chunk * p.cols + piece.begin);
}

template <typename T>
void forward(const RmsNormFwdParams& params, Stream stream) {
  RmsNormFwdParams p = params;
  const NormPlan plan = norm_plan(p.rows, p.cols);
  with_alignment(norm_aligned<T>(p.cols, {p.x, p.residual, p.weight, p.y, p.h}, {p.x_stride, p.residual_stride}),
                 [&]<bool kAligned>() {
                   if (plan.pieces > 1) {
                     launch(rms_norm_fwd_sums_kernel<T, kAligned>, norm_shape(plan, p.rows), stream, p, plan);
                     if (p.residual != nullptr) p.x = p.h, p.x_stride = p.cols, p.residual = nullptr;
                   }
                   launch(rms_norm_fwd_kernel<T, kAligned>, norm_shape(plan, (p.rows + plan.groups - 1) / plan.groups),
                          stream, p, plan);
                 });
}

template <typename T>
void backward(const RmsNormBwdParams& p, Stream stream) {
  const NormPlan plan = norm_plan(p.rows, p.cols);
  with_alignment(
      norm_aligned<T>(p.cols, {p.dy, p.dh, p.x, p.weight, p.dx, p.partial}, {p.dy_stride, p.dh_stride, p.x_stride}),
      [&]<bool kAligned>() {
        if (plan.pieces > 1) launch(rms_norm_bwd_sums_kernel<T, kAligned>, norm_shape(plan, p.rows), stream, p, plan);
        launch(rms_norm_bwd_kernel<T, kAligned>, norm_shape(plan, plan.chunks, p.cols), stream, p, plan);
      });
  norm_weight_gradient(p.partial, plan.chunks, p.cols, p.weight_dtype, p.dweight, stream);
}

}  // namespace

void rms_norm_fwd_cuda(const RmsNormFwdParams& p, Stream stream) { GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p, stream)); }

void rms_norm_bwd_cuda(const RmsNormBwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, backward<T>(p, stream));
}

}  // namespace grokkernels
