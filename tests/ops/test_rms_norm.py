"""rms_norm against its case table, on drawn shapes, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import rms_norm as cases
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=40, deadline=None)
@given(
    # Many elements: the largest error over a few, where the reference may by luck be exact, is no measure.
    rows=st.sampled_from([0, 4, 5, 6, 7, 8, 9]),
    cols=st.integers(33, 300),
    residual=st.booleans(),
    zero_centered=st.booleans(),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(rows: int, cols: int, residual: bool, zero_centered: bool, dtype: torch.dtype) -> None:
    case = cases.case(rows, cols, residual=residual, zero_centered=zero_centered)
    verdict = judge.judge(cases.TABLE, case, dtype, "cpu")
    assert verdict.passed, verdict


def test_residual_reads_one_rounded_sum() -> None:
    """In bfloat16, y is the norm of x + residual as rounded, as in the two calls that the fused form replaces."""
    x, residual = torch.randn(2, 3, 64).bfloat16()
    weight = torch.ones(64)
    y, h = grokkernels.rms_norm(x, weight, residual=residual, backend="cpu")
    assert torch.equal(h, x + residual)
    assert torch.equal(y, grokkernels.rms_norm(h, weight, backend="cpu"))


def test_rows_do_not_see_each_other() -> None:
    x, weight = torch.randn(5, 333), torch.randn(333)
    whole = grokkernels.rms_norm(x, weight, backend="cpu")
    for row in range(5):
        assert torch.equal(whole[row], grokkernels.rms_norm(x[row], weight, backend="cpu"))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 24), (3, 67), (1100, 520), (3, 20000)])
def test_device_repeats_itself(shape: tuple[int, int], seed: int) -> None:
    """Whatever the order of its threads, the device gives the same bits: nothing is added in the order of arrival."""
    rows, cols = shape
    x, residual = torch.randn(2, rows, cols)
    weight = torch.rand(cols) + 0.5

    def call() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        outputs = grokkernels.rms_norm(leaves[0], leaves[2], residual=leaves[1], backend="emulated")
        return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)]

    expected = call()
    native.emulated.set_seed(seed)
    try:
        got = call()
    finally:
        native.emulated.set_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_device_many_short_rows() -> None:
    """Blocks of 32 rows at a time, several times."""
    verdict = judge.judge(cases.TABLE, cases.case(33001, 8), torch.float32, "emulated")
    assert verdict.passed, verdict


@pytest.mark.parametrize("cols", [40, 1024, 9000])
def test_device_rows_do_not_see_each_other(cols: int) -> None:
    """Nor does it matter for a row whether others are there, forward and backward."""
    x, weight = torch.randn(37, cols), torch.randn(cols)

    def call(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = rows.clone().requires_grad_()
        y = grokkernels.rms_norm(leaf, weight, backend="emulated")
        return y, torch.autograd.grad(y.square().sum(), leaf)[0]

    y, dx = call(x)
    for row in (0, 17, 36):
        one_y, one_dx = call(x[row])
        assert torch.equal(one_y, y[row])
        assert torch.equal(one_dx, dx[row])


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_device_reads_rows_of_any_alignment(dtype: torch.dtype) -> None:
    """Rows that start between two 16-byte vectors give what aligned ones give."""
    memory = torch.randn(5 * 264 + 3).to(dtype)
    weight = torch.rand(264 + 1).to(dtype)
    x = memory[3:].view(5, 264)
    expected = grokkernels.rms_norm(x.clone(), weight[1:].clone(), backend="emulated")
    torch.testing.assert_close(grokkernels.rms_norm(x, weight[1:], backend="emulated"), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4, dtype=torch.int32)}, "x must be one of float32"),
        ({"x": torch.tensor(1.0)}, "x must have at least one dimension"),
        ({"weight": torch.ones(3)}, r"weight must have shape \(C,\) = \(4\), got \(3,\)"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be a finite number >= 0"),
        ({"residual": torch.ones(1, 4)}, r"residual must have shape of x = \(2, 4\), got \(1, 4\)"),
        ({"residual": torch.ones(2, 4).bfloat16()}, "residual must be one of float32"),
        ({"backend": "tpu"}, "names no backend: 'tpu'; allowed are"),
        ({"backend": "cuda"}, "cannot run on backend 'cuda'"),
        ({"x": torch.ones(2, 4).double(), "backend": "cpu"}, "x is torch.float64"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.rms_norm(**{"x": torch.ones(2, 4), "weight": torch.ones(4), **arguments})
