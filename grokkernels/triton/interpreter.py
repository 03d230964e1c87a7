"""Makes Triton's interpreter right about bfloat16, or makes it refuse; the same numbers on every machine and release.

Triton keeps bfloat16 as uint16 in numpy arrays and computes on the bits as if they were integers: sums and products
come out wrong without an error, and float32 is cut off, not rounded, on its way to bfloat16. Kernels of this column do
arithmetic in float32 and keep bfloat16 for memory and for the operands of `tl.dot`, so three things are enough: casts
that round to nearest even, products that widen their operands, and an error for any other arithmetic.

Sums are those of a GPU in kind: numpy adds pairwise along contiguous elements, as a tree of threads does, but one after
another along other axes, where the error grows. Products are added up eight at a time, as by a tensor core, in numpy's
own loops: BLAS has an order, and so an error, of its own on every machine and for every number of rows. And like a GPU
the interpreter says nothing about infinities and NaNs on the way.

Releases before 3.9 round a multiplication and addition twice; 3.6 cannot take an index from an array of one element
beside numpy 2.4. Both are mended here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, wraps
from types import SimpleNamespace
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
        return original(self, a, b, *rest)

    return dot


def _matmul(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """a (..., M, K) @ b (..., K, N): sums over eight k, rounded once as by a tensor core, then these in their order.

    Both operands are made contiguous, so that einsum's innermost loop runs along N, whatever M is.
    """
    a, b = (np.ascontiguousarray(x, dtype) for x in (a, b))
    result = np.result_type(a, b)
    exact = np.float64 if result == np.float32 else result
    depth = math.gcd(a.shape[-1], _DEPTH)
    left = a.reshape(*a.shape[:-1], -1, depth).astype(exact)
    right = b.reshape(*b.shape[:-2], -1, depth, b.shape[-1]).astype(exact)
    sums = np.einsum("...msk,...skn->s...mn", left, right).astype(result)
    return sums.sum(0, dtype=result)


def _fma(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    @wraps(original)
    def fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.data.dtype != np.float32:
            return original(self, x, y, z)
        # The product is exact in float64; the sum is rounded there first, 2^29 times finer than it is then.
        total = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(total.astype(np.float32), z.dtype.scalar)

    return fma


def _indexes(original: Callable[..., None]) -> Callable[..., None]:
    @wraps(original)
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


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


_DEPTH = 8  # products that a tensor core adds up at once
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
    if not hasattr(interpreter._interpreter, "fma_fp32"):
        builder.create_fma = _fma(builder.create_fma)
    interpreter.np = SimpleNamespace(**{**vars(np), "matmul": _matmul})  # for tl.dot of every dtype and tl.dot_scaled
    interpreter._patch_lang_tensor = _indexes(interpreter._patch_lang_tensor)
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_fabs", "create_erf", "create_rsqrt"):
        setattr(builder, name, _refuses(getattr(builder, name)))
    interpreter.ReduceScanOpInterface.apply = _reduces(interpreter.ReduceScanOpInterface.apply)
    interpreter.ReduceOps.sum = _sum
    # Sums of int32 are checked for overflow at a quarter of all time spent; compiled kernels do not check either.
    interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__)
    interpreter.InterpretedFunction.__call__ = _device_function(interpreter.InterpretedFunction.__call__)
