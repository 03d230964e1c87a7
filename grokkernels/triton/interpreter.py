"""Makes Triton's interpreter right about bfloat16, or makes it refuse.

Triton 3.9 keeps bfloat16 as uint16 in numpy arrays and computes on the bits as if they were integers: sums and products
come out wrong without an error, and float32 is cut off, not rounded, on its way to bfloat16. Kernels of this column do
arithmetic in float32 and keep bfloat16 for memory and for the operands of `tl.dot`, so three things are enough: casts
that round to nearest even, products that widen their operands, and an error for any other arithmetic.

Sums are those of a GPU in kind: numpy adds pairwise along contiguous elements, as a tree of threads does, but one after
another along other axes, where the error grows. Products of float32 are added up eight at a time, as by a tensor core:
the order of numpy's BLAS, and so the error, is another one on every machine. And like a GPU it says nothing about
infinities and NaNs on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _is_bf16(value: Any) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _cast(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @wraps(original)
    def cast(self: Any, source: TensorHandle, target: Any, *rounding: Any) -> TensorHandle:
        to = target.scalar
        if _is_bf16(source):
            if to == tl.bfloat16:
                return source
            source = TensorHandle(widened(source.data), tl.float32)
            return source if to == tl.float32 else self.cast_impl(source, target)
        if to == tl.bfloat16:
            return TensorHandle(narrowed(source.data.astype(np.float32)), to)
        return original(self, source, target, *rounding)

    return cast


def _dot(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @wraps(original)
    def dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        a, b = (TensorHandle(widened(x.data), tl.float32) if _is_bf16(x) else x for x in (a, b))
        # numpy multiplies float16 matrices element by element; float32 ones with BLAS.
        a, b = (TensorHandle(x.data.astype(np.float32), tl.float32) if x.dtype == tl.float16 else x for x in (a, b))
        if a.data.ndim != 2 or a.data.shape[1] % _DEPTH or a.dtype != tl.float32:
            return original(self, a, b, *rest)
        steps = a.data.shape[1] // _DEPTH
        left = a.data.reshape(-1, steps, _DEPTH).swapaxes(0, 1)
        products = np.matmul(left, b.data.reshape(steps, _DEPTH, -1)).sum(0)
        return TensorHandle(products + rest[0].data, rest[0].dtype.scalar)

    return dot


def _refuses(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @wraps(original)
    def operation(self: Any, *operands: Any) -> TensorHandle:
        if operands[-1] is not np.where and any(_is_bf16(x) for x in operands):
            raise TypeError("arithmetic on bfloat16: convert to float32 first")
        return original(self, *operands)

    return operation


def _reduces(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def apply(self: Any, values: Any) -> Any:
        if any(v.dtype == tl.bfloat16 for v in (values if isinstance(values, tuple) else (values,))):
            raise TypeError("a reduction of bfloat16: convert to float32 first")
        return original(self, values)

    return apply


def _sum(self: Any, values: Any) -> Any:
    data = values.handle.data
    if self.axis is None:
        data = data.reshape(-1)
    data = np.ascontiguousarray(np.moveaxis(data, self.axis or 0, -1)).sum(-1)
    if self.keep_dims:
        data = data.reshape((1,) * values.handle.data.ndim) if self.axis is None else np.expand_dims(data, self.axis)
    return self.to_tensor(data, values.dtype)


_DEPTH = 8  # products of float32 that a tensor core adds up at once
_patched: set[str] = set()  # modules whose view of triton.language this launch has patched


def _launch(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def call(self: Any, *arguments: Any, **named: Any) -> None:
        _patched.clear()
        with np.errstate(all="ignore"):
            original(self, *arguments, **named)

    return call


def _device_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patches a device function's module once in a launch: at each call it would take longer than a small function."""

    @wraps(original)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.fn.__module__ not in _patched:
            _patched.add(self.fn.__module__)
            return original(self, *arguments, **named)
        return self.rewrite()(*arguments, **named)

    return call


@cache
def mend() -> None:
    """Changes the interpreter of this process, once."""
    builder = interpreter.InterpreterBuilder
    builder.cast_impl = _cast(builder.cast_impl)
    builder.create_fp_to_fp = _cast(builder.create_fp_to_fp)
    builder.create_dot = _dot(builder.create_dot)
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt"):
        setattr(builder, name, _refuses(getattr(builder, name)))
    interpreter.ReduceScanOpInterface.apply = _reduces(interpreter.ReduceScanOpInterface.apply)
    interpreter.ReduceOps.sum = _sum
    # Sums of int32 are checked for overflow at a quarter of all time spent; compiled kernels do not check either.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)
    interpreter.InterpretedFunction.__call__ = _device_function(interpreter.InterpretedFunction.__call__)
