// Transcendental functions on vf, and the activation functions that several ops share.
//
// Each follows the textbook plan: reduce the argument exactly, evaluate a polynomial, put the exponent back. The
// polynomials are our own minimax fits: Lawson's iteration (reweighted least squares) on 400 Chebyshev nodes in double
// precision against 40-digit values, with coefficients rounded to float one at a time from the lowest and the others
// refitted. "Fit" below is the largest error of the rounded polynomial in exact arithmetic; the error of a whole
// function is measured in tests/test_simd.cpp, at every level, and stated as ulp of the exact result.
//
// Unless a comment says otherwise NaN gives NaN, and limits at zero and infinity are exact. Results below 2^-126 are
// denormal, and right to one last place there. The floating-point mode must be the default one (round to nearest).
#pragma once

#include "simd.h"

namespace grokkernels::cpu {
inline namespace GK_CPU_LEVEL {

// A function's value and its derivative at one point.
struct ValueAndSlope {
  vf value, slope;
};

namespace detail {

inline constexpr float kLog2E = 1.44269504f;
// ln 2 in two parts. With a fused multiply-add n * kLn2High needs no spare bits; without one the high part has 9
// significant bits, so the product is exact for |n| < 2^15.
#if defined(GK_SIMD_FMA)
inline constexpr float kLn2High = 0x1.62e430p-1f;
inline constexpr float kLn2Low = -0x1.05c610p-29f;
#else
inline constexpr float kLn2High = 0x1.63p-1f;
inline constexpr float kLn2Low = -0x1.bd0106p-13f;
#endif
inline constexpr float kInfinity = __builtin_inff();

// c0 + c1 x + c2 x^2 + ... by Horner's rule.
GK_ALWAYS_INLINE vf polynomial(vf, float c0) { return set1(c0); }
template <typename... Floats>
GK_ALWAYS_INLINE vf polynomial(vf x, float c0, Floats... higher) {
  return fma(polynomial(x, higher...), x, set1(c0));
}

// p * 2^n for integral n in [-252, 254] and p near 1, with gradual underflow and overflow to infinity.
GK_ALWAYS_INLINE vf scale(vf p, vf n) {
#if defined(GK_SIMD_AVX512)
  return _mm512_scalef_ps(p, n);
#else  // in two steps, each by a normal power of two; only the second can round
  const vi i = truncate_to_int(n);
  const vi half = i >> 1;
  return p * as_float((half + 127) << 23) * as_float((i - half + 127) << 23);
#endif
}

// x - n ln 2.
GK_ALWAYS_INLINE vf minus_n_ln2(vf x, vf n) { return fnma(n, set1(kLn2Low), fnma(n, set1(kLn2High), x)); }

// exp as p 2^n: n = round(x / ln 2) and p = e^r on |r| <= ln 2 / 2. Fit 2^-28.3 relative.
GK_ALWAYS_INLINE vf exp_parts(vf x, vf& n) {
  n = round(x * kLog2E);
  const vf r = minus_n_ln2(x, n);
  return polynomial(r, 1.0f, 1.0f, 4.9999994e-01f, 1.6666521e-01f, 4.1668266e-02f, 8.368677e-03f, 1.3820734e-03f);
}

// exp of x in [-104, 89].
GK_ALWAYS_INLINE vf exp_clamped(vf x) {
  vf n;
  const vf p = exp_parts(x, n);
  return scale(p, n);
}

// exp of x <= 89, zero below -104. AVX-512 leaves such lanes, masked scores are some, out of the last step: a result
// that underflows stops some processors for two hundred cycles.
GK_ALWAYS_INLINE vf exp_bounded(vf x) {
#if defined(GK_SIMD_AVX512)
  vf n;
  const vf p = exp_parts(x, n);
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set1(-104.0f), _CMP_NLT_UQ), p, n);
#else
  return exp_clamped(max(set1(-104.0f), x));
#endif
}

}  // namespace detail

// e^x, below 0.9 ulp (1.2 without a fused multiply-add). Zero below -103.98, infinity above 88.73.
GK_ALWAYS_INLINE vf exp(vf x) { return detail::exp_bounded(min(set1(89.0f), x)); }

// e^x for x <= 0 (or NaN), the same values as exp, one operation less.
GK_ALWAYS_INLINE vf exp_nonpositive(vf x) { return detail::exp_bounded(x); }

// 2^x, below 0.9 ulp (1.1 without a fused multiply-add). Zero below -150, infinity from 128. Fit 2^-28.3 relative on |x
// - round(x)| <= 1/2.
GK_ALWAYS_INLINE vf exp2(vf x) {
#if defined(GK_SIMD_AVX512)  // one instruction for x - round(x), which is 0 for infinities
  const vf r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf n = x - r;
  const auto inside = _mm512_cmp_ps_mask(x, set1(-151.0f), _CMP_NLT_UQ);  // see exp_bounded
#else
  x = min(set1(129.0f), max(set1(-151.0f), x));
  const vf n = round(x);
  const vf r = x - n;
#endif
  const vf p = detail::polynomial(r, 1.0f, 6.931472e-01f, 2.4022648e-01f, 5.55036e-02f, 9.618506e-03f, 1.3390806e-03f,
                                  1.5326463e-04f);
#if defined(GK_SIMD_AVX512)
  return _mm512_maskz_scalef_ps(inside, p, n);
#else
  return detail::scale(p, n);
#endif
}

// The natural logarithm, below 0.8 ulp. -infinity at 0, NaN below. x = m 2^e with m in [sqrt(1/2), sqrt(2)), then
// log(1 + f) = f - f^2 / 2 + f^3 q(f). Fit 2^-30.3 of the logarithm.
GK_ALWAYS_INLINE vf log(vf x) {
  const vmask denormal = x < 0x1p-126f;
  const vu bits = as_unsigned(select(denormal, x * 0x1p23f, x));
  const vi exponent = reinterpret_cast<vi>(bits - 0x3f3504f3u) >> 23;
  const vf f = as_float(bits - (as_unsigned(exponent) << 23)) - 1.0f;
  const vf e = to_float(exponent) - select(denormal, set1(23.0f), vf{});
  const vf q = detail::polynomial(f, 3.3333313e-01f, -2.500001e-01f, 2.0002072e-01f, -1.6667989e-01f, 1.422036e-01f,
                                  -1.240624e-01f, 1.18835375e-01f, -1.1670025e-01f, 6.74919e-02f);
  const vf square = f * f;
  vf y = fma(q * f, square, e * detail::kLn2Low);
  y = fnma(set1(0.5f), square, y) + f;
  y = fma(e, set1(detail::kLn2High), y);
  const vf special = select(x == 0.0f, set1(-detail::kInfinity), select(x > 0.0f, x, set1(__builtin_nanf(""))));
  return select((x > 0.0f) & (x < detail::kInfinity), y, special);
}

// tanh, below 1.1 ulp, the sign of zero kept. tanh |x| = x + x^3 P(x^2) up to 1 (fit 2^-27.7), and 1 - 2 / (e^(2|x|)
// + 1) above, which is left out where no lane asks for it: what is capped is mostly far below its cap.
GK_ALWAYS_INLINE vf tanh(vf x) {
  const vf a = min(set1(10.0f), abs(x));
  const vf square = a * a;
  const vf p = detail::polynomial(square, -3.3333296e-01f, 1.3332345e-01f, -5.3879801e-02f, 2.1486657e-02f,
                                  -7.9461057e-03f, 2.3013637e-03f, -3.5845177e-04f);
  const vf small = fma(p * square, a, a);
  if (!any(a > 1.0f)) return with_sign(small, x);
  const vf large = fnma(set1(2.0f), reciprocal(detail::exp_clamped(a + a) + 1.0f), set1(1.0f));
  return with_sign(select(a > 1.0f, large, small), x);
}

namespace detail {
// erf x for |x| <= 0.93: x + x P(x^2) (fit 2^-30.1).
GK_ALWAYS_INLINE vf erf_near_zero(vf x) {
  const vf p = polynomial(x * x, 1.2837917e-01f, -3.761263e-01f, 1.1283626e-01f, -2.6855731e-02f, 5.192405e-03f,
                          -8.0497697e-04f, 7.99665e-05f);
  return fma(x, p, x);
}
}  // namespace detail

// erf, below 1.3 ulp. erf |x| = x + x P(x^2) up to 0.93 (fit 2^-30.1), and 1 - e^(x Q(x)) above, with Q the fit of
// log(erfc(x)) / x (2^-30.5 of erf), where 4 and more give 1.
GK_ALWAYS_INLINE vf erf(vf x) {
  const vf a = min(set1(4.0f), abs(x));
  const vf large = detail::polynomial(a, -1.1286542e+00f, -6.35128e-01f, -1.06275305e-01f, 2.3795081e-02f,
                                      -3.6580346e-03f, 3.2662647e-04f, -1.1612488e-05f);
  const vf y = select(a > 0.93f, 1.0f - detail::exp_clamped(a * large), detail::erf_near_zero(a));
  return with_sign(y, x);
}

// ------------------------------------------------------------------------------------------------ activation functions

namespace detail {
// sigmoid(y) and its derivative sigmoid(y) (1 - sigmoid(y)), both without cancellation: from e = e^(-|y|).
GK_ALWAYS_INLINE ValueAndSlope sigmoid(vf y) {
  const vf e = exp_nonpositive(-abs(y));
  const vf upper = reciprocal(1.0f + e);
  const vf lower = e * upper;
  return {select(y < 0.0f, lower, upper), lower * upper};
}
}  // namespace detail

// 1 / (1 + e^-x), below 3 ulp, also for negative x; the slope below 5 ulp.
GK_ALWAYS_INLINE vf sigmoid(vf x) { return detail::sigmoid(x).value; }
GK_ALWAYS_INLINE ValueAndSlope sigmoid_and_slope(vf x) { return detail::sigmoid(x); }

// silu(x) = x sigmoid(x), below 3.5 ulp, the slope within 2.5e-7; -0 at -infinity.
GK_ALWAYS_INLINE ValueAndSlope silu_and_slope(vf x) {
  const vf v = max(set1(-110.0f), x);
  const ValueAndSlope s = detail::sigmoid(v);
  return {v * s.value, fma(min(set1(110.0f), v), s.slope, s.value)};
}
GK_ALWAYS_INLINE vf silu(vf x) { return silu_and_slope(x).value; }

// gelu_tanh(x) = x / 2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the second form keeps its
// relative accuracy for negative x. Below 3 ulp for x >= -1, relative error
// 1e-5 at -8, slope within 2.5e-7. -0 at -infinity. (Hendrycks and Gimpel, arXiv:1606.08415.)
GK_ALWAYS_INLINE ValueAndSlope gelu_tanh_and_slope(vf x) {
  constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
  constexpr float kCubic = 0.0713548163f;  // 0.044715 * kLinear
  const vf v = max(set1(-14.0f), x);
  const vf c = min(set1(14.0f), v);
  const vf square = c * c;
  const ValueAndSlope s = detail::sigmoid(c * fma(square, set1(kCubic), set1(kLinear)));
  const vf inner = c * fma(square, set1(3.0f * kCubic), set1(kLinear));  // c d(2u)/dc
  return {v * s.value, fma(inner, s.slope, s.value)};
}
GK_ALWAYS_INLINE vf gelu_tanh(vf x) { return gelu_tanh_and_slope(x).value; }

// gelu_erf(x) = x Phi(x), Phi the normal distribution function. With one exponential for value and derivative,
// Phi(-|x|) = e^(-x^2 / 2) t P(1 - t), t = 1 / (1 + 0.35 |x|) (fit 2^-24.7 relative, for |x| <= 15), so the left tail
// keeps its relative accuracy, up to the rounding of x^2 / 2. Below 6 ulp for x >= -1, relative error 5e-6 at -12,
// slope within 2.5e-7. -0 at -infinity.
GK_ALWAYS_INLINE ValueAndSlope gelu_erf_and_slope(vf x) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const vf v = max(set1(-15.0f), x);
  const vf c = min(set1(15.0f), v);
  const vf e = exp_nonpositive(-0.5f * c * c);
  const vf t = reciprocal(fma(abs(c), set1(0.35f), set1(1.0f)));
  const vf p = detail::polynomial(1.0f - t, 0.5f, -6.398329e-01f, 2.610603e-01f, 1.02527395e-01f, -6.3730404e-02f,
                                  -1.706833e-02f, -6.2805966e-02f, 8.839758e-02f, -2.892585e-02f);
  const vf tail = t * p;
  const vf outside = select(c < 0.0f, e * tail, fnma(e, tail, set1(1.0f)));
  const vf a = c * 0.707106781f;  // near zero 1/2 (1 + erf(x / sqrt(2))) rounds less
  const vf phi = select(abs(a) < 0.93f, fma(set1(0.5f), detail::erf_near_zero(a), set1(0.5f)), outside);
  return {v * phi, fma(c * kInverseSqrt2Pi, e, phi)};
}
GK_ALWAYS_INLINE vf gelu_erf(vf x) { return gelu_erf_and_slope(x).value; }

}  // namespace GK_CPU_LEVEL
}  // namespace grokkernels::cpu
