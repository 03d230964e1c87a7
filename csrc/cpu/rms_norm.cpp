// rms_norm on the CPU. Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
//
// x (N, C) row by row: one sweep gathers the sum of squares, a second, over a row that is still in the cache, scales.
// The sum x + residual is formed in the first sweep, rounded to the tensor's dtype, and normalised as rounded: exactly
// what the chain add -> rms_norm that this replaces would see.
#include "rms_norm.h"

#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr int64_t kBlock = 128 * kLanes;

// Mean of squares of one row. Four accumulators hide the latency of the fused multiply-add; they are emptied into a
// double every kBlock elements, so that the error does not grow with the length of the row.
template <typename T, bool kAdd>
float mean_of_squares(const T* x, const T* residual, T* h, int64_t cols) {
  auto element = [&](int64_t c, int64_t n) {
    vf v = load_n(x + c, n);
    if constexpr (kAdd) {
      store_n(h + c, v + load_n(residual + c, n), n);
      v = load_n(h + c, n);
    }
    return v;
  };
  double total = 0.0;
  for (int64_t begin = 0; begin < cols; begin += kBlock) {
    const int64_t end = begin + kBlock < cols ? begin + kBlock : cols;
    vf sum[4] = {zero(), zero(), zero(), zero()};
    int64_t c = begin;
    for (; c + 4 * kLanes <= end; c += 4 * kLanes)
      for (int u = 0; u < 4; ++u) {
        const vf v = element(c + u * kLanes, kLanes);
        sum[u] = fma(v, v, sum[u]);
      }
    for (; c < end; c += kLanes) {
      const vf v = element(c, end - c < kLanes ? end - c : kLanes);
      sum[0] = fma(v, v, sum[0]);
    }
    total += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  return static_cast<float>(total / static_cast<double>(cols));
}

template <typename W>
vf scale_at(const W* weight, int64_t c, int64_t n, vf offset) {
  return load_n(weight + c, n) + offset;
}

template <typename T, typename W>
void forward(const RmsNormFwdParams& p) {
  const W* weight = static_cast<const W*>(p.weight);
  const vf offset = set1(p.zero_centered ? 1.0f : 0.0f);
  parallel_range(p.rows, p.cols, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      T* y = static_cast<T*>(p.y) + row * p.cols;
      float mean;
      if (p.residual != nullptr) {
        T* h = static_cast<T*>(p.h) + row * p.cols;
        mean = mean_of_squares<T, true>(x, static_cast<const T*>(p.residual) + row * p.residual_stride, h, p.cols);
        x = h;
      } else {
        mean = mean_of_squares<T, false>(x, nullptr, nullptr, p.cols);
      }
      const float rstd = 1.0f / __builtin_sqrtf(mean + p.eps);
      p.rstd[row] = rstd;
      const vf r = set1(rstd);
      int64_t c = 0;
      for (; c + kLanes <= p.cols; c += kLanes) store(y + c, load(x + c) * r * scale_at(weight, c, kLanes, offset));
      if (c < p.cols)
        store_n(y + c, load_n(x + c, p.cols - c) * r * scale_at(weight, c, p.cols - c, offset), p.cols - c);
    }
  });
}

// With g = dy * weight and xhat = x * rstd:
//   dx = rstd * (g - xhat * mean(g * xhat)) + dh,   dweight = sum over rows of dy * xhat.
// Each chunk of rows adds into its own float32 partial of dweight; the partials are then summed in chunk order, so the
// result is the same from run to run for one thread count.
template <typename T, typename W>
void backward(const RmsNormBwdParams& p) {
  const W* weight = static_cast<const W*>(p.weight);
  const vf offset = set1(p.zero_centered ? 1.0f : 0.0f);
  const int64_t padded = (p.cols + kLanes - 1) / kLanes * kLanes;
  const int64_t threads = num_threads();
  const int64_t chunks = p.rows < threads ? (p.rows > 0 ? p.rows : 1) : threads;
  float* partials = scratch<float>(0, chunks * padded);
  for (int64_t i = 0; i < chunks * padded; ++i) partials[i] = 0.0f;

  parallel_tasks(chunks, p.rows * p.cols / chunks * 2, [&](int64_t chunk) {
    float* dw = partials + chunk * padded;
    for (int64_t row = p.rows * chunk / chunks; row < p.rows * (chunk + 1) / chunks; ++row) {
      const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
      const T* dy = static_cast<const T*>(p.dy) + row * p.dy_stride;
      const T* dh = p.dh == nullptr ? nullptr : static_cast<const T*>(p.dh) + row * p.dh_stride;
      T* dx = static_cast<T*>(p.dx) + row * p.cols;
      const vf rstd = set1(p.rstd[row]);

      double dot = 0.0;  // emptied into per block, as in the forward pass
      for (int64_t block = 0; block < p.cols; block += kBlock) {
        const int64_t end = block + kBlock < p.cols ? block + kBlock : p.cols;
        vf sum = zero();
        for (int64_t c = block; c < end; c += kLanes) {
          const int64_t n = end - c < kLanes ? end - c : kLanes;
          const vf d = load_n(dy + c, n), xhat = load_n(x + c, n) * rstd;
          store(dw + c, fma(d, xhat, load(dw + c)));
          sum = fma(d * scale_at(weight, c, n, offset), xhat, sum);
        }
        dot += reduce_add(sum);
      }
      const vf mean = set1(static_cast<float>(dot / static_cast<double>(p.cols)));
      for (int64_t c = 0; c < p.cols; c += kLanes) {
        const int64_t n = p.cols - c < kLanes ? p.cols - c : kLanes;
        const vf xhat = load_n(x + c, n) * rstd;
        vf g = rstd * (load_n(dy + c, n) * scale_at(weight, c, n, offset) - xhat * mean);
        if (dh != nullptr) g = g + load_n(dh + c, n);
        store_n(dx + c, g, n);
      }
    }
  });

  W* dweight = static_cast<W*>(p.dweight);
  for (int64_t c = 0; c < p.cols; c += kLanes) {
    vf sum = zero();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + load(partials + chunk * padded + c);
    store_n(dweight + c, sum, p.cols - c < kLanes ? p.cols - c : kLanes);
  }
}

}  // namespace

void rms_norm_fwd(const RmsNormFwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (p.weight_dtype == DType::float32)
      forward<T, float>(p);
    else
      forward<T, T>(p);
  });
}

void rms_norm_bwd(const RmsNormBwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (p.weight_dtype == DType::float32)
      backward<T, float>(p);
    else
      backward<T, T>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(rms_norm_fwd, RmsNormFwdParams);
GK_CPU_LAUNCHER(rms_norm_bwd, RmsNormBwdParams);
