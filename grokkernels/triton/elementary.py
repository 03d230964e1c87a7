"""Functions of one float32 number that the hardware's own are too coarse for: device functions."""

from __future__ import annotations

import triton
import triton.language as tl

TWICE_LOG2_E: tl.constexpr = tl.constexpr(2.8853900817779268)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """e^x. GPUs raise 2 to x log2(e), whose rounding errs by |x| 2^-24; EXACT takes that back."""
    if not EXACT:
        return tl.exp(x)
    power = x * 1.4426950216293335
    lost = tl.fma(x, 1.4426950216293335, -power) + x * 1.9259629911266175e-8
    y = tl.exp2(power)
    return y + y * tl.where(tl.abs(power) < 200.0, 0.6931471805599453 * lost, 0.0)


@triton.jit
def tanh(x):
    """x + x^3 p(x^2), a fit on [0, 0.55], and 1 - 2 / (1 + e^2|x|) beyond: about one unit in the last place.

    (A hardware tanh that errs by 2^-11 puts an error of 0.015 into a score capped at 30.)
    """
    square = x * x
    p = square * -0.006615754682570696 + 0.021312745288014412
    p = p * square - 0.053910065442323685
    p = p * square + 0.13333117961883545
    p = p * square - 0.3333333134651184
    near = x * square * p + x
    size = tl.abs(x)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(size * TWICE_LOG2_E))
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return tl.where(size < 0.55, near, (far.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True))
