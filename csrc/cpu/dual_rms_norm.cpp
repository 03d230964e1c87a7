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
      p.post_rstd[row] = rstd_of(mean_of_squares(p.cols, [=](int64_t c, auto n) { return fetch_n(x + c, n); }), p.eps);
      const vf rstd = set1(p.post_rstd[row]);
      T* sum = kStream ? scratch<T>(0, p.cols) : h;
      const float mean = mean_of_squares(p.cols, [=](int64_t c, auto n) {
        store_n(sum + c, fma(load_n(x + c, n) * rstd, scale_at(post_weight, c, n, offset), fetch_n(residual + c, n)),
                n);
        return load_n(sum + c, n);
      });
      p.pre_rstd[row] = rstd_of(mean, p.eps);
      const NextRow<T> next_x(x, p.x_stride, p.cols), next_residual(residual, p.residual_stride, p.cols);
      T* y = static_cast<T*>(p.y) + row * p.cols;
      scale_row<kStream>(sum, p.pre_rstd[row], pre_weight, offset, y, p.cols, next_x, next_residual);
      if constexpr (kStream) put_row<true>(h, sum, p.cols);
    }
    stream_fence();
  });
}

template <int kRows, bool kStream, typename T, typename W>
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
  gather_rows<kRows>([=](int k, int64_t c, auto n) { return fetch_n(dy + k * p.dy_stride + c, n); }, h, p.h_stride,
                     p.pre_rstd + row, pre_weight, offset, gradients.sums(1), dots, p.cols);
  RowGradient of_h[kRows];
  for (int k = 0; k < kRows; ++k) of_h[k] = RowGradient(p.pre_rstd[row + k], dots[k], p.cols);
  gather_rows<kRows>(
      [=, &of_h](int k, int64_t c, auto n) {
        const vf scale = scale_at(pre_weight, c, n, offset);
        const vf also = dh == nullptr ? zero() : fetch_n(dh + k * p.dh_stride + c, n);
        const vf d = of_h[k](load_n(dy + k * p.dy_stride + c, n), load_n(h + k * p.h_stride + c, n), scale, also);
        store_n(total + k * p.cols + c, d, n);
        return d;
      },
      x, p.x_stride, p.post_rstd + row, post_weight, offset, gradients.sums(0), dots, p.cols);
  for (int k = 0; k < kRows; ++k, x += p.x_stride, dresidual += p.cols, dx += p.cols) {
    const RowGradient of_x(p.post_rstd[row + k], dots[k], p.cols);
    const float* of_h_row = total + k * p.cols;
    int64_t c = 0;
    for (; c + 2 * kLanes <= p.cols; c += 2 * kLanes) {
      const VfPair d = load_pair(of_h_row + c), v = load_pair(x + c), w = load_pair(post_weight + c);
      put_pair<kStream>(dresidual + c, d.first, d.second);
      put_pair<kStream>(dx + c, of_x(d.first, v.first, w.first + offset), of_x(d.second, v.second, w.second + offset));
    }
    for_vectors(c, p.cols, [&](int64_t i, auto n) {
      const vf d = load_n(of_h_row + i, n);
      store_n(dresidual + i, d, n);
      store_n(dx + i, of_x(d, load_n(x + i, n), scale_at(post_weight, i, n, offset)), n);
    });
  }
}

template <typename T, typename W, bool kStream>
void backward(const DualRmsNormBwdParams& p) {
  over_row_groups<2, W>(p.rows, p.cols, 4 * p.cols, {static_cast<W*>(p.dpost_weight), static_cast<W*>(p.dpre_weight)},
                        [&](int64_t row, auto rows, WeightGradients& gradients) {
                          backward_rows<rows, kStream, T, W>(p, row, gradients);
                        });
}

}  // namespace

void dual_rms_norm_fwd(const DualRmsNormFwdParams& p) {
  with_row_and_weight(p.dtype, p.weight_dtype, [&]<typename T, typename W>() {
    const int64_t bytes = p.rows * p.cols * static_cast<int64_t>(sizeof(T));
    if (should_stream(static_cast<T*>(p.y), p.cols, bytes) && should_stream(static_cast<T*>(p.h), p.cols, bytes))
      forward<T, W, true>(p);
    else
      forward<T, W, false>(p);
  });
}

void dual_rms_norm_bwd(const DualRmsNormBwdParams& p) {
  with_row_and_weight(p.dtype, p.weight_dtype, [&]<typename T, typename W>() {
    const int64_t bytes = p.rows * p.cols * static_cast<int64_t>(sizeof(T));
    if (should_stream(static_cast<T*>(p.dx), p.cols, bytes) &&
        should_stream(static_cast<T*>(p.dresidual), p.cols, bytes))
      backward<T, W, true>(p);
    else
      backward<T, W, false>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(dual_rms_norm_fwd, DualRmsNormFwdParams);
GK_CPU_LAUNCHER(dual_rms_norm_bwd, DualRmsNormBwdParams);
