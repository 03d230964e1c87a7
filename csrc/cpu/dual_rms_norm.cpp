// dual_rms_norm on the CPU: the seam of a sandwich-normed block (post-norm, addition, next pre-norm) in one pass over
// memory in each direction: a row stays in the cache between its sweeps.
//
// Forward, per row: the mean square of x; h, rounded, and its mean square; y. Backward, for a few rows at once: the
// pre-norm's sums; the gradient of h, kept in float, and with it the post-norm's sums; dx.
#include "dual_rms_norm.h"

#include "cpu/launch.h"
#include "cpu/norm.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

template <typename T, typename W, bool kStream>
void forward(const DualRmsNormFwdParams& p) {
  const W* post_weight = static_cast<const W*>(p.post_weight);
  const W* pre_weight = static_cast<const W*>(p.pre_weight);
  const vf offset = set1(p.zero_centered ? 1.0f : 0.0f);
  parallel_range(p.rows, 2 * p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
      T* h = static_cast<T*>(p.h) + row * p.cols;
      p.post_rstd[row] = rstd_of(mean_of_squares(p.cols, [=](int64_t c, auto n) { return load_n(x + c, n); }), p.eps);
      const vf rstd = set1(p.post_rstd[row]);
      const float mean = mean_of_squares(p.cols, [=](int64_t c, auto n) {
        store_n(h + c, fma(load_n(x + c, n) * rstd, scale_at(post_weight, c, n, offset), load_n(residual + c, n)), n);
        return load_n(h + c, n);
      });
      p.pre_rstd[row] = rstd_of(mean, p.eps);
      scale_row<kStream>(h, p.pre_rstd[row], pre_weight, offset, static_cast<T*>(p.y) + row * p.cols, p.cols);
    }
    stream_fence();
  });
}

template <int kRows, typename T, typename W>
void backward_rows(const DualRmsNormBwdParams& p, int64_t row, WeightGradients& gradients) {
  const W* post_weight = static_cast<const W*>(p.post_weight);
  const W* pre_weight = static_cast<const W*>(p.pre_weight);
  const vf offset = set1(p.zero_centered ? 1.0f : 0.0f);
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* h = static_cast<const T*>(p.h) + row * p.h_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
  const T* dh = p.dh == nullptr ? nullptr : static_cast<const T*>(p.dh) + row * p.dh_stride;
  T* dresidual = static_cast<T*>(p.dresidual) + row * p.cols;
  T* dx = static_cast<T*>(p.dx) + row * p.cols;
  float* total = scratch<float>(2, kRows * p.cols);  // the gradient of h

  double dots[kRows];
  gather_rows<kRows>([=](int k, int64_t c, auto n) { return load_n(dy + k * p.dy_stride + c, n); }, h, p.h_stride,
                     p.pre_rstd + row, pre_weight, offset, gradients.sums(1), dots, p.cols);
  RowGradient of_h[kRows];
  for (int k = 0; k < kRows; ++k) of_h[k] = RowGradient(p.pre_rstd[row + k], dots[k], p.cols);
  gather_rows<kRows>(
      [=, &of_h](int k, int64_t c, auto n) {
        const vf scale = scale_at(pre_weight, c, n, offset);
        const vf also = dh == nullptr ? zero() : load_n(dh + k * p.dh_stride + c, n);
        const vf d = of_h[k](load_n(dy + k * p.dy_stride + c, n), load_n(h + k * p.h_stride + c, n), scale, also);
        store_n(dresidual + k * p.cols + c, d, n);
        store_n(total + k * p.cols + c, d, n);
        return d;
      },
      x, p.x_stride, p.post_rstd + row, post_weight, offset, gradients.sums(0), dots, p.cols);
  for (int k = 0; k < kRows; ++k) {
    const RowGradient of_x(p.post_rstd[row + k], dots[k], p.cols);
    for_vectors(0, p.cols, [&](int64_t c, auto n) {
      const vf d = load_n(total + k * p.cols + c, n), v = load_n(x + k * p.x_stride + c, n);
      store_n(dx + k * p.cols + c, of_x(d, v, scale_at(post_weight, c, n, offset)), n);
    });
  }
}

template <typename T, typename W>
void backward(const DualRmsNormBwdParams& p) {
  const int64_t chunks = chunks_of(p.rows);
  double* totals = WeightGradients::totals(chunks, 2, p.cols);
  over_row_groups(
      p.rows, 4 * p.cols, chunks, totals, 2, p.cols,
      [&](int64_t row, auto rows, WeightGradients& gradients) { backward_rows<rows, T, W>(p, row, gradients); });
  WeightGradients::finish(totals, chunks, 2, p.cols, 0, static_cast<W*>(p.dpost_weight));
  WeightGradients::finish(totals, chunks, 2, p.cols, 1, static_cast<W*>(p.dpre_weight));
}

}  // namespace

void dual_rms_norm_fwd(const DualRmsNormFwdParams& p) {
  with_row_and_weight(p.dtype, p.weight_dtype, [&]<typename T, typename W>() {
    if (should_stream(static_cast<T*>(p.y), p.cols, p.rows * p.cols * static_cast<int64_t>(sizeof(T))))
      forward<T, W, true>(p);
    else
      forward<T, W, false>(p);
  });
}

void dual_rms_norm_bwd(const DualRmsNormBwdParams& p) {
  with_row_and_weight(p.dtype, p.weight_dtype, [&]<typename T, typename W>() { backward<T, W>(p); });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(dual_rms_norm_fwd, DualRmsNormFwdParams);
GK_CPU_LAUNCHER(dual_rms_norm_bwd, DualRmsNormBwdParams);
