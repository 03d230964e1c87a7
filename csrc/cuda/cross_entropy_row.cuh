// One row of a cross-entropy loss, logit by logit: what cross_entropy and linear_cross_entropy share on the device.
//
// The logsumexp is the online one (Milakov and Gimelshein, arXiv:1805.02867): a thread adds its logits up in float,
// lanes and ranges of columns are merged in double, so that the error does not grow with V.
#pragma once

#include <device/math.cuh>

#include "cross_entropy.h"
#include "cuda/reduce.cuh"

namespace grokkernels::device {

// LossOptions for rows of `cols` columns, with what every logit needs in float.
struct LossTerms {
  float inner, cap, slope;  // z = slope * logit, or cap * tanh(inner * logit)
  float q, q_target;        // what the gradient takes from p: label_smoothing / V, and the target's share more
  float twice_z_loss;
  double label_smoothing, z_loss;
  int64_t cols, ignore_index;
};

inline LossTerms loss_terms(const LossOptions& options, int64_t cols) {
  const bool capped = options.softcap > 0;
  const double q = options.label_smoothing / static_cast<double>(cols);
  return {.inner = static_cast<float>(capped ? options.logit_scale / options.softcap : 0.0),
          .cap = static_cast<float>(options.softcap),
          .slope = static_cast<float>(options.logit_scale),
          .q = static_cast<float>(q),
          .q_target = static_cast<float>(q + (1 - options.label_smoothing)),
          .twice_z_loss = static_cast<float>(2 * options.z_loss),
          .label_smoothing = options.label_smoothing,
          .z_loss = options.z_loss,
          .cols = cols,
          .ignore_index = options.ignore_index};
}

GK_DEVICE int64_t target_of(const Targets& targets, int64_t row) {
  return targets.wide ? static_cast<const int64_t*>(targets.data)[row * targets.stride]
                      : static_cast<const int32_t*>(targets.data)[row * targets.stride];
}

// The host cannot look at targets that lie on the device. One outside the vocabulary names no logit to read: its row's
// loss, lse and gradient are NaN.
GK_DEVICE bool is_word(const LossTerms& terms, int64_t target) {
  return static_cast<uint64_t>(target) < static_cast<uint64_t>(terms.cols);
}

// tanh, element by element the same whatever the others are. A cap leaves nearly all logits near zero, where an odd
// polynomial of least relative error (7e-9) errs by 0.8 units in the last place; where all of them are, the exponential
// and the division that the others need are passed by. Those err by about two: tanh x is 0.57 or more there.
template <int kCount>
GK_DEVICE void tanh_each(float (&x)[kCount]) {
  constexpr float kNear = 0.65f;
  auto near = [](float x) {
    const float square = x * x;
    float p = fmaf(-0.00551516423f, square, 0.0204694197f);
    p = fmaf(p, square, -0.0536880232f);
    p = fmaf(p, square, 0.133308306f);
    p = fmaf(p, square, -0.333332598f);
    return fmaf(p * square, x, x);
  };
  auto far = [](float x) {
    const float e = exp2_approx(2.88539008f * fabsf(x));  // e^(2 |x|)
    return copysignf(fmaf(-2.0f, reciprocal_approx(e + 1.0f), 1.0f), x);
  };
  float farthest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) farthest = fmaxf(farthest, fabsf(x[i]));
  if (farthest < kNear) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = near(x[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fabsf(x[i]) < kNear ? near(x[i]) : far(x[i]);
  }
}

// Logits become z. kCapped: whether softcap > 0.
template <bool kCapped, int kCount>
GK_DEVICE void squash(const LossTerms& terms, float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= kCapped ? terms.inner : terms.slope;
  if constexpr (kCapped) {
    tanh_each(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] *= terms.cap;
  }
}

template <bool kCapped>
GK_DEVICE float squash(const LossTerms& terms, float logit) {
  float z[1] = {logit};
  squash<kCapped>(terms, z);
  return z[0];
}

// e^x, x <= 0. 16-bit logits come twice as fast, and leave time for two instructions rather than expf's eight; what
// those err more, about |x| 2^-24, evens out in the sum and drowns in the rounding of a 16-bit gradient.
template <typename T>
GK_DEVICE float exponential(float x) {
  if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp2_approx(x * 1.44269504f);
}

// Over some columns of a row: max(z), sum of exp(z - max), sum of z (for label smoothing alone). The maximum is kept
// finite, so that an infinite z gives an infinite sum rather than infinity - infinity.
template <typename Sum>
struct RowSums {
  float max = -__FLT_MAX__;
  Sum exp_sum = 0, z_sum = 0;
};
using ThreadSum = RowSums<float>;  // of the logits of one thread, some tens or hundreds
using RowSum = RowSums<double>;

GK_DEVICE float finite_max(float max, float z) { return fminf(fmaxf(max, z), __FLT_MAX__); }

// Adds columns of logits of type T; -infinity adds nothing.
template <typename T, int kCount>
GK_DEVICE void add_columns(ThreadSum& sum, const float (&z)[kCount]) {
  float max = z[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) max = fmaxf(max, z[i]);
  max = finite_max(sum.max, max);
  float exp_sum[2] = {sum.exp_sum * exponential<T>(sum.max - max), 0.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) exp_sum[i % 2] += exponential<T>(z[i] - max);
  sum.max = max;
  sum.exp_sum = exp_sum[0] + exp_sum[1];
}

GK_DEVICE void merge(RowSum& into, const RowSum& other) {
  const float max = fmaxf(into.max, other.max);
  into.exp_sum = into.exp_sum * expf(into.max - max) + other.exp_sum * expf(other.max - max);
  into.z_sum += other.z_sum;
  into.max = max;
}

// Of all lanes of each segment of kWidth; every lane gets it.
template <int kWidth = 32, typename Sum>
GK_DEVICE RowSum merge_lanes(const LossTerms& terms, const RowSums<Sum>& mine) {
  RowSum all;
  all.max = warp_max<kWidth>(mine.max);
  all.exp_sum = warp_sum<kWidth>(static_cast<double>(mine.exp_sum) * expf(mine.max - all.max));
  if (terms.label_smoothing > 0) all.z_sum = warp_sum<kWidth>(static_cast<double>(mine.z_sum));
  return all;
}

GK_DEVICE double logsumexp(const RowSum& sum) { return sum.max + log(sum.exp_sum); }

// The loss of a row from its lse, the z of its target and the sum of all z.
GK_DEVICE double row_loss(const LossTerms& terms, double lse, double target_z, double z_sum) {
  double expected = target_z;
  if (terms.label_smoothing > 0)
    expected =
        (1 - terms.label_smoothing) * target_z + terms.label_smoothing * (z_sum / static_cast<double>(terms.cols));
  return lse - expected + terms.z_loss * lse * lse;
}

// dlogit = weight * dz/dlogit * (p * (1 + 2 z_loss lse) - q): what of it is the same along a row. What rounding lse to
// float takes from every p of the row, p_factor gives back.
struct RowGradient {
  float lse, weight, p_factor;
};

// `weight`: the gradient of the row's loss.
GK_DEVICE RowGradient row_gradient(const LossTerms& terms, double lse, float weight) {
  const float rounded = static_cast<float>(lse);
  const float lost = static_cast<float>(rounded - lse);  // below half a place of lse, so exp(lost) is 1 + lost
  return {rounded, weight, (1.0f + lost) * fmaf(terms.twice_z_loss, rounded, 1.0f)};
}

// Logits of type T become their gradients; x[target], if there is one, is the target's.
template <bool kCapped, typename T, int kCount>
GK_DEVICE void logit_gradients(const LossTerms& terms, const RowGradient& row, float (&x)[kCount], int target) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] *= kCapped ? terms.inner : terms.slope;
  if constexpr (kCapped) tanh_each(x);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float z = kCapped ? terms.cap * x[i] : x[i];
    const float slope = kCapped ? terms.slope * (1.0f - x[i] * x[i]) : terms.slope;
    const float p = exponential<T>(z - row.lse);
    x[i] = row.weight * slope * (p * row.p_factor - (i == target ? terms.q_target : terms.q));
  }
}

}  // namespace grokkernels::device
