// cross_entropy on the CPU: logits (N, V) are read once forward, and once more backward to write dlogits.
//
// A task is a range of kColumns columns of a row, so that one long row too is shared between cores. The ranges depend
// on V alone and are merged in order: a row's loss is the same whatever the batch and the number of threads.
#include "cross_entropy.h"

#include "cpu/cross_entropy_row.h"
#include "cpu/launch.h"
#include "cpu/parallel.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {
namespace {

constexpr int64_t kColumns = 8192;
constexpr int64_t kCostPerColumn = 4;  // an exponential, in floats touched

GK_ALWAYS_INLINE int64_t parts_of(int64_t cols) { return (cols + kColumns - 1) / kColumns; }

template <bool kCapped, typename T>
void forward(const CrossEntropyFwdParams& p) {
  const int64_t parts = parts_of(p.cols);
  RowSum* partials = scratch<RowSum>(0, p.rows * parts);
  float* losses = p.options.reduction == Reduction::none ? p.loss : scratch<float>(1, p.rows);
  const Squash s = make_squash(p.options);
  const bool smoothed = p.options.label_smoothing > 0;

  auto finish = [&](int64_t row) {
    const int64_t target = p.targets[row];
    if (target == p.options.ignore_index) {
      losses[row] = 0.0f;
      p.lse[row] = 0.0;
      return;
    }
    RowSum sum = partials[row * parts];
    for (int64_t part = 1; part < parts; ++part) merge(sum, partials[row * parts + part]);
    const T* x = static_cast<const T*>(p.logits) + row * p.logits_stride;
    const float target_z = squash<kCapped>(s, load_n(x + target, 1)).value[0];
    p.lse[row] = logsumexp(sum);
    losses[row] = static_cast<float>(row_loss(sum, target_z, p.cols, p.options));
  };

  parallel_range(
      p.rows * parts, (p.cols < kColumns ? p.cols : kColumns) * kCostPerColumn, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / parts, first = task % parts * kColumns;
          if (p.targets[row] != p.options.ignore_index) {
            const int64_t n = p.cols - first < kColumns ? p.cols - first : kColumns;
            RowSum sum;
            add_columns<kCapped>(sum, static_cast<const T*>(p.logits) + row * p.logits_stride + first, n, s, smoothed);
            partials[task] = sum;
          }
          if (parts == 1) finish(row);
        }
      });
  if (parts > 1)
    for (int64_t row = 0; row < p.rows; ++row) finish(row);
  reduce_losses(losses, p.rows, p.targets, p.options, p.loss);
}

template <bool kCapped, bool kStream, typename T>
void backward(const CrossEntropyBwdParams& p) {
  const int64_t parts = parts_of(p.cols);
  const Squash s = make_squash(p.options);
  const double divisor = loss_divisor(p.rows, p.targets, p.options);
  parallel_range(
      p.rows * parts, (p.cols < kColumns ? p.cols : kColumns) * kCostPerColumn, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / parts, first = task % parts * kColumns;
          const int64_t n = p.cols - first < kColumns ? p.cols - first : kColumns;
          const int64_t target = p.targets[row];
          T* dx = static_cast<T*>(p.dlogits) + row * p.cols + first;
          if (target == p.options.ignore_index) {
            __builtin_memset(dx, 0, n * sizeof(T));
            continue;
          }
          const RowGradient g = row_gradient(p.lse[row], p.dloss[row * p.dloss_stride] / divisor, p.cols, p.options);
          const T* x = static_cast<const T*>(p.logits) + row * p.logits_stride + first;
          gradient_columns<kCapped, kStream>(dx, x, n, target - first, s, g);
        }
      });
}

// Whether to write dlogits past the caches: when it would not stay in them, and every row starts aligned.
template <typename T>
bool streams(const CrossEntropyBwdParams& p) {
  constexpr int64_t kCacheBytes = 16 << 20;
  const int64_t row_bytes = p.cols * static_cast<int64_t>(sizeof(T));
  return p.rows * row_bytes > kCacheBytes && row_bytes % kStreamAlignment == 0 &&
         reinterpret_cast<uintptr_t>(p.dlogits) % kStreamAlignment == 0;
}

}  // namespace

void cross_entropy_fwd(const CrossEntropyFwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    if (p.options.softcap > 0)
      forward<true, T>(p);
    else
      forward<false, T>(p);
  });
}

void cross_entropy_bwd(const CrossEntropyBwdParams& p) {
  GK_SWITCH_DTYPE(p.dtype, T, {
    const bool stream = streams<T>(p);
    if (p.options.softcap > 0)
      stream ? backward<true, true, T>(p) : backward<true, false, T>(p);
    else
      stream ? backward<false, true, T>(p) : backward<false, false, T>(p);
  });
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu

GK_CPU_LAUNCHER(cross_entropy_fwd, CrossEntropyFwdParams);
GK_CPU_LAUNCHER(cross_entropy_bwd, CrossEntropyBwdParams);
