// One row of a cross-entropy loss, column range by column range: what cross_entropy and linear_cross_entropy share.
//
// The logsumexp is the online one (Milakov and Gimelshein, arXiv:1805.02867), a block of columns at a time: the block
// is squashed into z once and stays in the first-level cache while its maximum and then its exponentials are taken.
// Blocks add up in double precision, so that the error does not grow with V.
#pragma once

#include "cpu/loops.h"
#include "cpu/simd_math.h"
#include "cross_entropy.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// z = slope * x, or cap * tanh(inner * x).
struct Squash {
  vf inner, cap, slope;
};

GK_ALWAYS_INLINE Squash make_squash(const LossOptions& options) {
  const bool capped = options.softcap > 0;
  return {set1(static_cast<float>(capped ? options.logit_scale / options.softcap : options.logit_scale)),
          set1(static_cast<float>(options.softcap)), set1(static_cast<float>(options.logit_scale))};
}

// z and dz/dx.
template <bool kCapped>
GK_ALWAYS_INLINE ValueAndSlope squash(const Squash& s, vf x) {
  if constexpr (kCapped) {
    const vf t = tanh(x * s.inner);
    return {s.cap * t, s.slope * (1.0f - t * t)};
  } else {
    return {x * s.slope, s.slope};
  }
}

// Over some columns of a row: max(z), sum of exp(z - max), sum of z where labels are smoothed. The maximum is kept
// finite, so that an infinite logit gives an infinite sum rather than infinity - infinity.
struct RowSum {
  float max = -__FLT_MAX__;
  double exp_sum = 0.0, z_sum = 0.0;

  GK_ALWAYS_INLINE void raise_max(float to) {
    to = to < __FLT_MAX__ ? to : __FLT_MAX__;
    if (to <= max) return;
    exp_sum *= __builtin_exp(static_cast<double>(max) - to);
    max = to;
  }
};

GK_ALWAYS_INLINE void merge(RowSum& into, RowSum other) {
  into.raise_max(other.max);
  other.raise_max(into.max);
  into.exp_sum += other.exp_sum;
  into.z_sum += other.z_sum;
}

inline constexpr int64_t kLossBlock = 1024;  // columns squashed at a time: 4 KiB of z

// Adds x[0..n).
template <bool kCapped, typename T>
GK_ALWAYS_INLINE void add_columns(RowSum& row, const T* x, int64_t n, const Squash& s, bool smoothed) {
  alignas(64) float z[kLossBlock];
  for (int64_t begin = 0; begin < n; begin += kLossBlock, x += kLossBlock) {
    const int64_t count = n - begin < kLossBlock ? n - begin : kLossBlock;
    vf top[2] = {set1(row.max), set1(row.max)};
    int64_t c = 0;
    for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
      const VfPair pair = fetch_pair(x + c);
      const vf first = squash<kCapped>(s, pair.first).value, second = squash<kCapped>(s, pair.second).value;
      store(z + c, first);
      store(z + c + kLanes, second);
      top[0] = max(first, top[0]);
      top[1] = max(second, top[1]);
    }
    for (; c < count; c += kLanes) {  // lanes past the end become -infinity: neither a maximum nor an exponential
      const vf v = squash<kCapped>(s, load_n(x + c, static_cast<int>(count - c < kLanes ? count - c : kLanes))).value;
      const vf inside = select(lane_index() < static_cast<int32_t>(count - c), v, set1(-__builtin_inff()));
      store(z + c, inside);
      top[0] = max(inside, top[0]);
    }
    row.raise_max(reduce_max(max(top[0], top[1])));

    const vf m = set1(row.max);
    vf sum[4] = {zero(), zero(), zero(), zero()};
    for (c = 0; c + 4 * kLanes <= count; c += 4 * kLanes)
      for (int u = 0; u < 4; ++u) sum[u] = sum[u] + exp(load(z + c + u * kLanes) - m);
    for (; c < count; c += kLanes) sum[0] = sum[0] + exp(load(z + c) - m);
    row.exp_sum += reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (smoothed) {
      vf total = zero();
      for (c = 0; c < count; c += kLanes)
        total = total + load_n(z + c, static_cast<int>(count - c < kLanes ? count - c : kLanes));
      row.z_sum += reduce_add(total);
    }
  }
}

GK_ALWAYS_INLINE double logsumexp(const RowSum& row) { return row.max + __builtin_log(row.exp_sum); }

// The loss of a row from its sums and the z of its target.
GK_ALWAYS_INLINE double row_loss(const RowSum& row, double target_z, int64_t cols, const LossOptions& options) {
  const double lse = logsumexp(row);
  double expected = target_z;
  if (options.label_smoothing > 0)
    expected =
        (1 - options.label_smoothing) * target_z + options.label_smoothing * (row.z_sum / static_cast<double>(cols));
  return lse - expected + options.z_loss * lse * lse;
}

// Reduces the losses of all rows in order, unless they are the result.
GK_ALWAYS_INLINE void reduce_losses(const float* losses, int64_t rows, const Targets& targets,
                                    const LossOptions& options, float* loss) {
  if (options.reduction == Reduction::none) return;
  double total = 0.0;
  int64_t counted = 0;
  for (int64_t row = 0; row < rows; ++row) {
    total += losses[row];
    counted += targets[row] != options.ignore_index;
  }
  const double divisor = options.reduction == Reduction::mean && counted > 0 ? static_cast<double>(counted) : 1.0;
  *loss = static_cast<float>(total / divisor);
}

// What the gradient of a mean is divided by; 1 for the other reductions.
GK_ALWAYS_INLINE double loss_divisor(int64_t rows, const Targets& targets, const LossOptions& options) {
  if (options.reduction != Reduction::mean) return 1.0;
  int64_t counted = 0;
  for (int64_t row = 0; row < rows; ++row) counted += targets[row] != options.ignore_index;
  return counted > 0 ? static_cast<double>(counted) : 1.0;
}

// dlogit = weight * dz/dlogit * (p * (1 + 2 z_loss lse) - q): what of it is the same along a row.
struct RowGradient {
  vf lse, weight, p_factor, q, q_target;
};

// What rounding lse to float takes from every p of the row, p_factor gives back.
GK_ALWAYS_INLINE RowGradient row_gradient(double lse, double weight, int64_t cols, const LossOptions& options) {
  const double q = options.label_smoothing / static_cast<double>(cols);
  const float rounded = static_cast<float>(lse);
  const double p_factor = __builtin_exp(rounded - lse) * (1 + 2 * options.z_loss * lse);
  return {set1(rounded), set1(static_cast<float>(weight)), set1(static_cast<float>(p_factor)),
          set1(static_cast<float>(q)), set1(static_cast<float>(q + (1 - options.label_smoothing)))};
}

// dx[0..n) of x[0..n), which may be the same memory; `target` is the target's place, outside [0, n) for another range.
// kStream writes past the caches, in which case dx must be aligned to kStreamAlignment.
template <bool kCapped, bool kStream, typename T, typename D>
GK_ALWAYS_INLINE void gradient_columns(D* dx, const T* x, int64_t n, int64_t target, const Squash& s,
                                       const RowGradient& row) {
  auto gradient = [&](vf logit, vf q) {
    const ValueAndSlope z = squash<kCapped>(s, logit);
    const vf p = exp(z.value - row.lse);
    return row.weight * z.slope * (p * row.p_factor - q);
  };
  auto q_at = [&](int64_t c) { return select(lane_index() == static_cast<int32_t>(target - c), row.q_target, row.q); };
  int64_t c = 0;
  for (; c + 2 * kLanes <= n; c += 2 * kLanes) {
    const VfPair pair = fetch_pair(x + c);
    vf first, second;
    if (static_cast<uint64_t>(target - c) < 2 * kLanes) [[unlikely]] {
      first = gradient(pair.first, q_at(c));
      second = gradient(pair.second, q_at(c + kLanes));
    } else {
      first = gradient(pair.first, row.q);
      second = gradient(pair.second, row.q);
    }
    put_pair<kStream>(dx + c, first, second);
  }
  for (; c < n; c += kLanes) {
    const int count = static_cast<int>(n - c < kLanes ? n - c : kLanes);
    const bool near = static_cast<uint64_t>(target - c) < kLanes;
    store_n(dx + c, gradient(load_n(x + c, count), near ? q_at(c) : row.q), count);
  }
  if constexpr (kStream) stream_fence();
}

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
