"""The activations of gated units and their slopes: device functions of float32 numbers, for every kernel that has one.

KIND is the contract's number: an index into `grokkernels.ops.gated_activation.KINDS`. Value and slope come from one
exponential and one reciprocal; what a caller does not use the compiler drops. The formulas and their fits are those of
csrc/cuda/activation.cuh: sigmoids of -|y| keep the relative accuracy of the left tails, and gelu needs no erf. Limits
are comparisons, which let a NaN pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sigmoid_and_slope(y):
    """1 / (1 + e^-y) and its derivative, without cancellation and without overflow: from e^-|y|."""
    e = tl.exp(-tl.abs(y))
    upper = 1.0 / (1.0 + e)
    lower = e * upper
    return tl.where(y < 0.0, lower, upper), lower * upper


@triton.jit
def silu_and_slope(x):
    """x sigmoid(x)."""
    v = tl.where(x < -110.0, -110.0, x)
    value, slope = sigmoid_and_slope(v)
    return v * value, tl.where(v > 110.0, 110.0, v) * slope + value


@triton.jit
def gelu_tanh_and_slope(x):
    """x / 2 (1 + tanh u) = x sigmoid(2u), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    linear: tl.constexpr = 1.59576912  # 2 sqrt(2 / pi)
    cubic: tl.constexpr = 0.0713548163  # 0.044715 * linear
    v = tl.where(x < -14.0, -14.0, x)
    c = tl.where(v > 14.0, 14.0, v)
    square = c * c
    value, slope = sigmoid_and_slope(c * (square * cubic + linear))
    inner = c * (square * (3.0 * cubic) + linear)  # c d(2u)/dc
    return v * value, inner * slope + value


@triton.jit
def gelu_and_slope(x):
    """x Phi(x), Phi the normal distribution function.

    Phi(-|x|) = e^(-x^2 / 2) t P(1 - t), t = 1 / (1 + 0.35 |x|), keeps the relative accuracy of the left tail; near zero
    1/2 (1 + erf(x / sqrt(2))), erf a = a + a Q(a^2), rounds less.
    """
    v = tl.where(x < -15.0, -15.0, x)
    c = tl.where(v > 15.0, 15.0, v)
    e = tl.exp(-0.5 * c * c)
    t = 1.0 / (tl.abs(c) * 0.35 + 1.0)
    s = 1.0 - t
    p = -2.892585e-02 * s + 8.839758e-02
    p = p * s - 6.2805966e-02
    p = p * s - 1.706833e-02
    p = p * s - 6.3730404e-02
    p = p * s + 1.02527395e-01
    p = p * s + 2.610603e-01
    p = p * s - 6.398329e-01
    p = p * s + 0.5
    tail = e * (t * p)
    outside = tl.where(c < 0.0, tail, 1.0 - tail)
    a = c * 0.707106781
    b = a * a
    q = 7.99665e-05 * b - 8.0497697e-04
    q = q * b + 5.192405e-03
    q = q * b - 2.6855731e-02
    q = q * b + 1.1283626e-01
    q = q * b - 3.761263e-01
    q = q * b + 1.2837917e-01
    phi = tl.where(tl.abs(a) < 0.93, 0.5 * (a * q + a) + 0.5, outside)
    return v * phi, c * 0.398942280 * e + phi  # 1 / sqrt(2 pi)


@triton.jit
def relu_and_slope(x):
    """max(x, 0), with slope 0 at 0; a NaN stays."""
    return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """x float32, of any shape -> act(x) and act'(x)."""
    tl.static_assert(KIND >= 0 and KIND <= 3)
    if KIND == 0:
        return gelu_tanh_and_slope(x)
    elif KIND == 1:
        return gelu_and_slope(x)
    elif KIND == 2:
        return silu_and_slope(x)
    else:
        return relu_and_slope(x)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x) of float32 numbers."""
    value, _ = value_and_slope(x, KIND)
    return value


@triton.jit
def derivative(x, KIND: tl.constexpr):
    """act'(x) of float32 numbers."""
    _, slope = value_and_slope(x, KIND)
    return slope
