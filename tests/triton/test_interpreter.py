"""The interpreter is right about bfloat16, or refuses; sums are as good as a tree's; no product sees a BLAS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.errors import InterpreterError

from grokkernels.triton import interpreter
from grokkernels.triton.kernel import Kernel, kernel

interpreter_only = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests compile")


@kernel
def copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.float32).to(y_ptr.dtype.element_ty))


@kernel
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision=PRECISION)
    tl.store(c_ptr + at, product)


@kernel
def lost_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, tl.fma(x, 1.0 / 3.0, -(x * (1.0 / 3.0))))


@kernel
def sum_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + column[None, :])
    tl.store(y_ptr + column, tl.sum(x, 0))


@kernel
def add_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, x + x)


@kernel
def exp_kernel(x_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(x_ptr + at, tl.exp(tl.load(x_ptr + at)))


@kernel
def reduce_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N)), 0))


@kernel
def less_kernel(x_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(x_ptr + tl.arange(0, N), tl.where(x < x, x, x))


def special() -> torch.Tensor:
    """float32 numbers that are hard to round: ties, both signs, subnormal, infinite, overflowing, NaN."""
    words = torch.randint(-(2**31), 2**31, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    ties = torch.arange(16, dtype=torch.int64) * 0x8000 + 0x3F800000
    edges = torch.tensor([0, 1, 0x7F800000, -0x800000, 0x7F7FFFFF, 0x7FC00000, 0x00008000, 0x00018000])
    return torch.cat([words, ties, edges]).to(torch.int32).view(torch.float32)


@interpreter_only
def test_casts_round_to_nearest_even() -> None:
    x = special()
    y = torch.empty(1024, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, y, N=1024)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    z = torch.empty(1024)
    copy_kernel[(1,)](y, z, N=1024)
    torch.testing.assert_close(z, y.float(), rtol=0, atol=0, equal_nan=True)
    half = torch.empty(1024, dtype=torch.float16)
    copy_kernel[(1,)](y, half, N=1024)
    torch.testing.assert_close(half, y.half(), rtol=0, atol=0, equal_nan=True)


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 64, 64).to(dtype)
    c = torch.empty(64, 64)
    dot_kernel[(1,)](a, b, c, N=64)
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def blas(*operands: Any, **named: Any) -> None:
    raise AssertionError("the order of this sum is the machine's")


@interpreter_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8])
def test_no_product_is_left_to_a_blas(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matmul", "dot", "vdot", "inner", "tensordot"):
        monkeypatch.setattr(np, name, blas)
        if name != "matmul":
            monkeypatch.setattr(interpreter.interpreter.np, name, blas)
    a, b = torch.randint(-9, 10, (2, 32, 32), dtype=torch.int32)
    c = torch.empty(32, 32, dtype={torch.float64: dtype, torch.int8: torch.int32}.get(dtype, torch.float32))
    dot_kernel[(1,)](a.to(dtype), b.to(dtype), c, N=32)
    assert torch.equal(c, (a @ b).to(c.dtype))


@pytest.mark.parametrize("columns", [16, 17, 128])
def test_a_row_of_a_product_does_not_see_the_others(columns: int) -> None:
    """Nor does a matrix of a batch."""
    draw = np.random.default_rng(0)
    a, b = draw.standard_normal((2, 40, 64), np.float32), draw.standard_normal((2, 64, columns), np.float32)
    whole = interpreter._matmul(a, b)
    for rows in (slice(0, 1), slice(3, 19), slice(17, 40)):
        assert np.array_equal(interpreter._matmul(a[1, rows], b[1]), whole[1, rows])
        assert np.array_equal(interpreter._matmul(a[:, rows], np.asfortranarray(b)), whole[:, rows])


@interpreter_only
def test_fma_rounds_once() -> None:
    """What a product loses when it is rounded: zero, were it rounded before the sum."""
    x = torch.randn(64)
    lost = torch.empty(64)
    lost_kernel[(1,)](x, lost, N=64)
    product = x.double() * torch.tensor(1 / 3, dtype=torch.float32).double()
    assert torch.equal(lost, (product - product.float()).float())
    assert lost.any()


@interpreter_only
def test_sums_over_any_axis_are_a_tree() -> None:
    """One after another, 65536 ones and a large number would lose them all."""
    x = torch.ones(4096, 16)
    x[0] = 2.0**24
    y = torch.empty(16)
    sum_kernel[(1,)](x, y, ROWS=4096, COLUMNS=16)
    assert ((y - (2.0**24 + 4095)).abs() <= 128).all()


@interpreter_only
@pytest.mark.parametrize("wrong", [add_kernel, exp_kernel, reduce_kernel, less_kernel])
def test_arithmetic_on_bfloat16_is_refused(wrong: Kernel) -> None:
    """By the mended interpreter, or by Triton itself as the compiler does."""
    with pytest.raises(InterpreterError, match=r"bfloat16: convert to float32 first|but got bf16"):
        wrong[(1,)](torch.ones(16, dtype=torch.bfloat16), N=16)


def test_mending_twice_changes_nothing() -> None:
    before = interpreter.interpreter.InterpreterBuilder.create_dot
    interpreter.mend()
    assert interpreter.interpreter.InterpreterBuilder.create_dot is before
