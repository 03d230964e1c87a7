"""Functions of one float32 number that the hardware's own are too coarse for: device functions."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """By an odd polynomial of least relative error near zero, where 1 - 2 / (e^2|x| + 1) would lose its places.

    (A hardware tanh that errs by 2^-11 puts an error of 0.015 into a score capped at 30.)
    """
    square = x * x
    p = -0.00551516423 * square + 0.0204694197
    p = p * square - 0.0536880232
    p = p * square + 0.133308306
    p = p * square - 0.333332598
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.65, p * square * x + x, tl.where(x < 0.0, -far, far))
