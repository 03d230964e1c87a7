// The activations of common/activation.h on one number, with their derivatives: one exponential and at most one
// reciprocal for both. The formulas and their fits are those of csrc/cpu/simd_math.h; value alone costs what it needs.
#pragma once

#include <device/core.cuh>
#include <device/math.cuh>

#include "common/activation.h"

namespace grokkernels::device {

struct ValueAndSlope {
  float value, slope;
};

// Limits that let a NaN pass, which fminf and fmaxf do not.
GK_DEVICE float at_least(float x, float low) { return x < low ? low : x; }
GK_DEVICE float at_most(float x, float high) { return x > high ? high : x; }

// c0 + c1 x + c2 x^2 + ... by Horner's rule.
GK_DEVICE float polynomial(float, float c0) { return c0; }
template <typename... Floats>
GK_DEVICE float polynomial(float x, float c0, Floats... higher) {
  return fmaf(polynomial(x, higher...), x, c0);
}

// 1 / x for normal x with a normal reciprocal, within 0.6 units in the last place: a Newton step after the hardware's.
GK_DEVICE float reciprocal(float x) {
  const float r = reciprocal_approx(x);
  return fmaf(r, fmaf(-x, r, 1.0f), r);
}

// sigmoid(y) = 1 / (1 + e^-y) and its derivative, both without cancellation: from e^(-|y|).
GK_DEVICE ValueAndSlope sigmoid_and_slope(float y) {
  const float e = expf(-fabsf(y));
  const float upper = reciprocal(1.0f + e), lower = e * upper;
  return {y < 0.0f ? lower : upper, lower * upper};
}

// x sigmoid(x); -0 at -infinity.
GK_DEVICE ValueAndSlope silu_and_slope(float x) {
  const float v = at_least(x, -110.0f);
  const ValueAndSlope s = sigmoid_and_slope(v);
  return {v * s.value, fmaf(at_most(v, 110.0f), s.slope, s.value)};
}

// x / 2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the second form keeps its relative accuracy
// for negative x. Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
GK_DEVICE ValueAndSlope gelu_tanh_and_slope(float x) {
  constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
  constexpr float kCubic = 0.0713548163f;  // 0.044715 * kLinear
  const float v = at_least(x, -14.0f), c = at_most(v, 14.0f), square = c * c;
  const ValueAndSlope s = sigmoid_and_slope(c * fmaf(square, kCubic, kLinear));
  const float inner = c * fmaf(square, 3.0f * kCubic, kLinear);  // c d(2u)/dc
  return {v * s.value, fmaf(inner, s.slope, s.value)};
}

// x Phi(x), Phi the normal distribution function. Phi(-|x|) = e^(-x^2 / 2) t P(1 - t), t = 1 / (1 + 0.35 |x|), keeps
// the relative accuracy of the left tail; near zero 1/2 (1 + erf(x / sqrt(2))), erf a = a + a Q(a^2), rounds less.
GK_DEVICE ValueAndSlope gelu_and_slope(float x) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const float v = at_least(x, -15.0f), c = at_most(v, 15.0f);
  const float e = expf(-0.5f * c * c);
  const float t = reciprocal(fmaf(fabsf(c), 0.35f, 1.0f));
  const float p = polynomial(1.0f - t, 0.5f, -6.398329e-01f, 2.610603e-01f, 1.02527395e-01f, -6.3730404e-02f,
                             -1.706833e-02f, -6.2805966e-02f, 8.839758e-02f, -2.892585e-02f);
  const float tail = t * p;
  const float outside = c < 0.0f ? e * tail : fmaf(-e, tail, 1.0f);
  const float a = c * 0.707106781f;
  const float q = polynomial(a * a, 1.2837917e-01f, -3.761263e-01f, 1.1283626e-01f, -2.6855731e-02f, 5.192405e-03f,
                             -8.0497697e-04f, 7.99665e-05f);
  const float phi = fabsf(a) < 0.93f ? fmaf(0.5f, fmaf(a, q, a), 0.5f) : outside;
  return {v * phi, fmaf(c * kInverseSqrt2Pi, e, phi)};
}

// max(x, 0), with slope 0 at 0; a NaN stays.
GK_DEVICE ValueAndSlope relu_and_slope(float x) {
  return x <= 0.0f ? ValueAndSlope{0.0f, 0.0f} : ValueAndSlope{x, 1.0f};
}

template <Activation kKind>
GK_DEVICE ValueAndSlope value_and_slope(float x) {
  if constexpr (kKind == Activation::gelu_tanh)
    return gelu_tanh_and_slope(x);
  else if constexpr (kKind == Activation::gelu)
    return gelu_and_slope(x);
  else if constexpr (kKind == Activation::silu)
    return silu_and_slope(x);
  else
    return relu_and_slope(x);
}

template <Activation kKind>
GK_DEVICE float activate(float x) {
  return value_and_slope<kKind>(x).value;
}

// Host: f.template operator()<kind>() for a kind known at run time.
template <typename F>
void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::gelu_tanh:
      return f.template operator()<Activation::gelu_tanh>();
    case Activation::gelu:
      return f.template operator()<Activation::gelu>();
    case Activation::silu:
      return f.template operator()<Activation::silu>();
    case Activation::relu:
      return f.template operator()<Activation::relu>();
  }
}

}  // namespace grokkernels::device
