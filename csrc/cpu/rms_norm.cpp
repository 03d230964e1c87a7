// rms_norm on the CPU. Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
//
// x (N, C) row by row: one sweep gathers the sum of squares, a second, over a row that is still in the cache, scales.
// The sum x + residual is formed in the first sweep, rounded to the tensor's dtype, and normalised as rounded: exactly
// what the chain add -> rms_norm that this replaces would see.
#include "rms_norm.h"

#include "cpu/launch.h"
#include "cpu/norm.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

template <typename T, typename W, bool kStream>
void forward(const RmsNormFwdParams& p) {
  const W* weight = static_cast<const W*>(p.weight);
  const vf offset = set1(p.zero_centered ? 1.0f : 0.0f);
  parallel_range(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* y = static_cast<T*>(p.y) + row * p.cols;
      const NextRow<T> next_x(x, p.x_stride, p.cols);
      if (p.residual != nullptr) {
        const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
        T* h = static_cast<T*>(p.h) + row * p.cols;
        T* sum = kStream ? scratch<T>(0, p.cols) : h;
        const float mean = mean_of_squares(p.cols, [=](int64_t c, auto n) {
          store_n(sum + c, fetch_n(x + c, n) + fetch_n(residual + c, n), n);
          return load_n(sum + c, n);
        });
        p.rstd[row] = rstd_of(mean, p.eps);
        const NextRow<T> next_residual(residual, p.residual_stride, p.cols);
        scale_row<kStream>(sum, p.rstd[row], weight, offset, y, p.cols, next_x, next_residual);
        if constexpr (kStream) put_row<true>(h, sum, p.cols);
      } else {
        p.rstd[row] = rstd_of(
            mean_of_squares(p.cols, [=](int64_t c, auto n) { return kStream ? fetch_n(x + c, n) : load_n(x + c, n); }),
            p.eps);
        scale_row<kStream>(x, p.rstd[row], weight, offset, y, p.cols, next_x);
      }
    }
    stream_fence();
  });
}

// With g = dy * weight and xhat = x * rstd:
//   dx = rstd * (g - xhat * mean(g * xhat)) + dh,   dweight = sum over rows of dy * xhat.
template <int kRows, bool kStream, typename T, typename W>
void backward_rows(const RmsNormBwdParams& p, int64_t row, const W* weight, vf offset, float* dweight) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
  const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
  double dots[kRows];
  gather_rows<kRows>([=](int k, int64_t c, auto n) { return fetch_n(dy + k * p.dy_stride + c, n); }, x, p.x_stride,
                     p.rstd + row, weight, offset, dweight, dots, p.cols);
  for (int k = 0; k < kRows; ++k, x += p.x_stride, dy += p.dy_stride) {
    const RowGradient gradient(p.rstd[row + k], dots[k], p.cols);
    T* dx = static_cast<T*>(p.dx) + (row + k) * p.cols;
    int64_t c = 0;
    if (p.dh == nullptr) {
      for (; c + 2 * kLanes <= p.cols; c += 2 * kLanes) {
        const VfPair d = load_pair(dy + c), v = load_pair(x + c), w = load_pair(weight + c);
        put_pair<kStream>(dx + c, gradient(d.first, v.first, w.first + offset),
                          gradient(d.second, v.second, w.second + offset));
      }
      for_vectors(c, p.cols, [&](int64_t i, auto n) {
        store_n(dx + i, gradient(load_n(dy + i, n), load_n(x + i, n), scale_at(weight, i, n, offset)), n);
      });
    } else {
      const T* dh = static_cast<const T*>(p.dh) + (row + k) * p.dh_stride;
      for (; c + 2 * kLanes <= p.cols; c += 2 * kLanes) {
        const VfPair d = load_pair(dy + c), v = load_pair(x + c), w = load_pair(weight + c), e = fetch_pair(dh + c);
        put_pair<kStream>(dx + c, gradient(d.first, v.first, w.first + offset, e.first),
                          gradient(d.second, v.second, w.second + offset, e.second));
      }
      for_vectors(c, p.cols, [&](int64_t i, auto n) {
        const vf scale = scale_at(weight, i, n, offset);
        store_n(dx + i, gradient(load_n(dy + i, n), load_n(x + i, n), scale, load_n(dh + i, n)), n);
      });
    }
  }
}

template <typename T, typename W, bool kStream>
void backward(const RmsNormBwdParams& p) {
  const W* weight = static_cast<const W*>(p.weight);
  const vf offset = set1(p.zero_centered ? 1.0f : 0.0f);
  over_row_groups<1, W>(p.rows, p.cols, 2 * p.cols, {static_cast<W*>(p.dweight)},
                        [&](int64_t row, auto rows, WeightGradients& gradients) {
                          backward_rows<rows, kStream, T>(p, row, weight, offset, gradients.sums(0));
                        });
}

}  // namespace

void rms_norm_fwd(const RmsNormFwdParams& p) {
  with_row_and_weight(p.dtype, p.weight_dtype, [&]<typename T, typename W>() {
    const int64_t bytes = p.rows * p.cols * static_cast<int64_t>(sizeof(T));
    if (should_stream(static_cast<T*>(p.y), p.cols, bytes) && should_stream(static_cast<T*>(p.h), p.cols, bytes))
      forward<T, W, true>(p);
    else
      forward<T, W, false>(p);
  });
}

void rms_norm_bwd(const RmsNormBwdParams& p) {
  with_row_and_weight(p.dtype, p.weight_dtype, [&]<typename T, typename W>() {
    if (should_stream(static_cast<T*>(p.dx), p.cols, p.rows * p.cols * static_cast<int64_t>(sizeof(T))))
      backward<T, W, true>(p);
    else
      backward<T, W, false>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(rms_norm_fwd, RmsNormFwdParams);
GK_CPU_LAUNCHER(rms_norm_bwd, RmsNormBwdParams);
