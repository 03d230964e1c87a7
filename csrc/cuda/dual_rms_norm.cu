// dual_rms_norm: the seam of a sandwich-normed block over the rows of (N, C): h = residual + rms_norm(x, post_weight),
// y = rms_norm(h, pre_weight), and all four gradients.
//
// One pass over memory in each direction: a row stays in the registers of its block through both of its sums
// (cuda/norm.cuh). Backward, with g = dy * pre_weight: the gradient of h is d = pre_rstd * (g - hhat * mean(g * hhat))
// + dh, rounded only where it is written as dresidual; that of x is post_rstd * (e - xhat * mean(e * xhat)), e = d *
// post_weight. Both weight gradients gather in registers over the rows of a block.
// Rows too long for registers go through the kernels of rms_norm, the gradient of h through memory.
#include "cuda/norm.cuh"
#include "dual_rms_norm.h"
#include "rms_norm.h"

namespace grokkernels {
namespace {

using namespace device;

template <typename T>
GK_DEVICE float sum_of_squares(const Words4 (&x)[kShare<T>]) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) {
    float v[kVector<T>], squares = 0.0f;
    unpack(x[i], v, T{});
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) squares = fmaf(v[j], v[j], squares);
    sum += squares;
  }
  return sum;
}

// Of rows in pieces: the sum of squares of one piece of x.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 1)
    dual_rms_norm_fwd_sums_kernel(const __grid_constant__ DualRmsNormFwdParams p,
                                  const __grid_constant__ NormPlan plan) {
  const Piece piece(plan, p.cols);
  const Columns<T, kAligned> columns(piece.columns);
  Words4 x[kShare<T>];
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i)
    x[i] = columns.load(static_cast<const T*>(p.x) + piece.chunk * p.x_stride + piece.begin, i);
  const float sum = row_sum(sum_of_squares<T>(x), shared_floats());
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

// h and, of rows in one piece, y.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kNormThreads, 1)
    dual_rms_norm_fwd_kernel(const __grid_constant__ DualRmsNormFwdParams p, const __grid_constant__ NormPlan plan) {
  constexpr int kCount = kVector<T>;
  const Piece piece(plan, p.cols);
  const int64_t row = piece.chunk * blockDim.y + threadIdx.y;
  const bool writes_rstd = threadIdx.x == 0 && piece.begin == 0 && row < p.rows;
  const auto columns = Columns<T, kAligned>(piece.columns).where(row < p.rows);
  const float offset = p.zero_centered ? 1.0f : 0.0f, cols = static_cast<float>(p.cols);
  Words4 x[kShare<T>], h[kShare<T>];
  float scale[kShare<T>][kCount];
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i)
    x[i] = columns.load(static_cast<const T*>(p.x) + row * p.x_stride + piece.begin, i);
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i)
    h[i] = columns.load(static_cast<const T*>(p.residual) + row * p.residual_stride + piece.begin, i);
  columns.load_scale(p.post_weight, p.weight_dtype, piece.begin, offset, scale);

  const float squares = plan.pieces == 1 ? row_sum(sum_of_squares<T>(x), shared_floats())
                                         : sum_of_pieces(p.sums + row * plan.pieces, plan.pieces, shared_floats());
  const float post_rstd = 1.0f / sqrtf(squares / cols + p.eps);
  if (writes_rstd) p.post_rstd[row] = post_rstd;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) {
    float v[kCount], sum[kCount];
    unpack(x[i], v, T{});
    unpack(h[i], sum, T{});
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum[j] = fmaf(v[j] * post_rstd, scale[i][j], sum[j]);
    columns.store(static_cast<T*>(p.h) + row * p.cols + piece.begin, i, sum);
    h[i] = pack(sum, T{});
  }
  if (plan.pieces > 1) return;

  columns.load_scale(p.pre_weight, p.weight_dtype, 0, offset, scale);
  const float pre_rstd = 1.0f / sqrtf(row_sum(sum_of_squares<T>(h), shared_floats() + 32) / cols + p.eps);
  if (writes_rstd) p.pre_rstd[row] = pre_rstd;
#pragma unroll
  for (int i = 0; i < kShare<T>; ++i) {
    float v[kCount];
    unpack(h[i], v, T{});
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = v[j] * pre_rstd * scale[i][j];
    columns.store(static_cast<T*>(p.y) + row * p.cols, i, v);
  }
}

// Threads of a block that find registers enough for a row's gradients.
template <typename T>
constexpr int kBackwardThreads = sizeof(T) == sizeof(float) ? 384 : kNormThreads;

// Of rows in one piece.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kBackwardThreads<T>, 1)
    dual_rms_norm_bwd_kernel(const __grid_constant__ DualRmsNormBwdParams p, const __grid_constant__ NormPlan plan) {
  constexpr int kCount = kVector<T>;
  const Columns<T, kAligned> all(static_cast<int>(p.cols));
  const float offset = p.zero_centered ? 1.0f : 0.0f, cols = static_cast<float>(p.cols);
  float dpost[kShare<T>][kCount] = {}, dpre[kShare<T>][kCount] = {};
#pragma unroll 1
  for (int step = 0; step < plan.steps; ++step) {
    const int64_t row = (blockIdx.x * plan.steps + step) * blockDim.y + threadIdx.y;
    const auto columns = all.where(row < p.rows);
    Words4 dy[kShare<T>], h[kShare<T>], x[kShare<T>];
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) h[i] = columns.load(static_cast<const T*>(p.h) + row * p.h_stride, i);
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) dy[i] = columns.load(static_cast<const T*>(p.dy) + row * p.dy_stride, i);
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) x[i] = columns.load(static_cast<const T*>(p.x) + row * p.x_stride, i);
    const float pre_rstd = row < p.rows ? p.pre_rstd[row] : 0.0f, post_rstd = row < p.rows ? p.post_rstd[row] : 0.0f;
    float scale[kShare<T>][kCount], dot = 0.0f;
    float dh[kShare<T>][kCount];  // all that reaches h

    columns.load_scale(p.pre_weight, p.weight_dtype, 0, offset, scale);
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float v[kCount], d[kCount], part = 0.0f;
      unpack(h[i], v, T{});
      unpack(dy[i], d, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float hhat = v[j] * pre_rstd;
        dpre[i][j] = fmaf(d[j], hhat, dpre[i][j]);
        dh[i][j] = d[j] * scale[i][j];
        part = fmaf(dh[i][j], hhat, part);
      }
      dot += part;
    }
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i)  // dh, in the place of dy, which is not needed any more
      dy[i] = p.dh != nullptr ? columns.load(static_cast<const T*>(p.dh) + row * p.dh_stride, i) : Words4{};
    const float pre_mean = row_sum(dot, shared_floats()) / cols;

#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float v[kCount], also[kCount];
      unpack(h[i], v, T{});
      unpack(dy[i], also, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) dh[i][j] = fmaf(pre_rstd, fmaf(-v[j] * pre_rstd, pre_mean, dh[i][j]), also[j]);
      columns.store(static_cast<T*>(p.dresidual) + row * p.cols, i, dh[i]);
    }

    columns.load_scale(p.post_weight, p.weight_dtype, 0, offset, scale);
    dot = 0.0f;
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float v[kCount], part = 0.0f;
      unpack(x[i], v, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float xhat = v[j] * post_rstd;
        dpost[i][j] = fmaf(dh[i][j], xhat, dpost[i][j]);
        dh[i][j] *= scale[i][j];
        part = fmaf(dh[i][j], xhat, part);
      }
      dot += part;
    }
    const float post_mean = row_sum(dot, shared_floats() + 32) / cols;
#pragma unroll
    for (int i = 0; i < kShare<T>; ++i) {
      float v[kCount], dx[kCount];
      unpack(x[i], v, T{});
#pragma unroll
      for (int j = 0; j < kCount; ++j) dx[j] = post_rstd * fmaf(-v[j] * post_rstd, post_mean, dh[i][j]);
      columns.store(static_cast<T*>(p.dx) + row * p.cols, i, dx);
    }
  }
  add_groups(all, dpost, static_cast<int>(p.cols), p.partial + blockIdx.x * p.cols);
  sync_threads();  // the shared memory of those sums is used again
  add_groups(all, dpre, static_cast<int>(p.cols), p.partial + (plan.chunks + blockIdx.x) * p.cols);
}

template <typename T>
void forward(const DualRmsNormFwdParams& p, Stream stream) {
  const NormPlan plan = norm_plan(p.rows, p.cols);
  with_alignment(norm_aligned<T>(p.cols, {p.x, p.residual, p.post_weight, p.pre_weight, p.y, p.h},
                                 {p.x_stride, p.residual_stride}),
                 [&]<bool kAligned>() {
                   if (plan.pieces > 1)
                     launch(dual_rms_norm_fwd_sums_kernel<T, kAligned>, norm_shape(plan, p.rows), stream, p, plan);
                   launch(dual_rms_norm_fwd_kernel<T, kAligned>,
                          norm_shape(plan, (p.rows + plan.groups - 1) / plan.groups), stream, p, plan);
                 });
  if (plan.pieces > 1)
    rms_norm_fwd_cuda({.dtype = p.dtype,
                       .weight_dtype = p.weight_dtype,
                       .rows = p.rows,
                       .cols = p.cols,
                       .x = p.h,
                       .residual = nullptr,
                       .weight = p.pre_weight,
                       .y = p.y,
                       .h = nullptr,
                       .rstd = p.pre_rstd,
                       .x_stride = p.cols,
                       .residual_stride = 0,
                       .eps = p.eps,
                       .zero_centered = p.zero_centered,
                       .sums = p.sums},
                      stream);
}

// Of longer rows: the pre-norm's gradient, then the post-norm's from what that wrote.
void backward_in_two_steps(const DualRmsNormBwdParams& p, Stream stream) {
  RmsNormBwdParams norm{.dtype = p.dtype,
                        .weight_dtype = p.weight_dtype,
                        .rows = p.rows,
                        .cols = p.cols,
                        .dy = p.dy,
                        .dh = p.dh,
                        .x = p.h,
                        .weight = p.pre_weight,
                        .rstd = p.pre_rstd,
                        .dx = p.dresidual,
                        .dweight = p.dpre_weight,
                        .dy_stride = p.dy_stride,
                        .dh_stride = p.dh_stride,
                        .x_stride = p.h_stride,
                        .zero_centered = p.zero_centered,
                        .sums = p.sums,
                        .partial = p.partial};
  rms_norm_bwd_cuda(norm, stream);
  norm.dy = p.dresidual, norm.dy_stride = p.cols;
  norm.dh = nullptr, norm.dh_stride = 0;
  norm.x = p.x, norm.x_stride = p.x_stride;
  norm.weight = p.post_weight, norm.rstd = p.post_rstd;
  norm.dx = p.dx, norm.dweight = p.dpost_weight;
  rms_norm_bwd_cuda(norm, stream);
}

template <typename T>
void backward(const DualRmsNormBwdParams& p, Stream stream) {
  const NormPlan plan = norm_plan(p.rows, p.cols);
  if (plan.pieces > 1 || plan.lanes > kBackwardThreads<T>) return backward_in_two_steps(p, stream);
  with_alignment(
      norm_aligned<T>(p.cols, {p.dy, p.dh, p.x, p.h, p.post_weight, p.pre_weight, p.dx, p.dresidual, p.partial},
                      {p.dy_stride, p.dh_stride, p.x_stride, p.h_stride}),
      [&]<bool kAligned>() {
        launch(dual_rms_norm_bwd_kernel<T, kAligned>, norm_shape(plan, plan.chunks, p.cols), stream, p, plan);
      });
  norm_weight_gradient(p.partial, plan.chunks, p.cols, p.weight_dtype, p.dpost_weight, stream);
  norm_weight_gradient(p.partial + plan.chunks * p.cols, plan.chunks, p.cols, p.weight_dtype, p.dpre_weight, stream);
}

}  // namespace

void dual_rms_norm_fwd_cuda(const DualRmsNormFwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, forward<T>(p, stream));
}

void dual_rms_norm_bwd_cuda(const DualRmsNormBwdParams& p, Stream stream) {
  GK_SWITCH_DTYPE(p.dtype, T, backward<T>(p, stream));
}

}  // namespace grokkernels
