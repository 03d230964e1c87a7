"""dual_rms_norm against its case table, on drawn shapes, against the chain it replaces, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import dual_rms_norm as cases
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=40, deadline=None)
@given(
    # Many elements: the largest error over a few, where the reference may by luck be exact, is no measure.
    rows=st.sampled_from([0, 4, 5, 6, 7, 8, 9]),
    cols=st.integers(33, 300),
    zero_centered=st.booleans(),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(rows: int, cols: int, zero_centered: bool, dtype: torch.dtype) -> None:
    verdict = judge.judge(cases.TABLE, cases.case(rows, cols, zero_centered=zero_centered), dtype, "cpu")
    assert verdict.passed, verdict


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_y_is_the_norm_of_h_as_returned(backend: str) -> None:
    x, residual = torch.randn(2, 3, 64).bfloat16()
    post, pre = torch.rand(2, 64) + 0.5
    y, h = grokkernels.dual_rms_norm(x, residual, post, pre, backend=backend)
    assert torch.equal(y, grokkernels.rms_norm(h, pre, backend=backend))


def test_large_outputs_are_streamed_and_equal() -> None:
    x, residual = torch.randn(2, 2056, 1024)
    post, pre = torch.rand(2, 1024) + 0.5
    y, h = grokkernels.dual_rms_norm(x, residual, post, pre, backend="cpu")
    part = slice(1000, 1010)
    small_y, small_h = grokkernels.dual_rms_norm(x[part], residual[part], post, pre, backend="cpu")
    assert torch.equal(y[part], small_y)
    assert torch.equal(h[part], small_h)


@pytest.mark.parametrize("used", ["y", "h"])
@pytest.mark.parametrize("native_backend", ["cpu", "triton"])
def test_one_output_alone(native_backend: str, used: str) -> None:
    """The gradient when only one of the two outputs is used is that of the reference."""
    leaves = [t.requires_grad_() for t in (*torch.randn(2, 5, 40), *(torch.rand(2, 40) + 0.5))]
    index = ("y", "h").index(used)
    gradients = {}
    for backend in (native_backend, "reference"):
        out = grokkernels.dual_rms_norm(*leaves, backend=backend)[index]
        gradients[backend] = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    for got, wanted in zip(gradients[native_backend], gradients["reference"], strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_rows_do_not_see_each_other(backend: str) -> None:
    x, residual = (t.requires_grad_() for t in torch.randn(2, 9, 333))
    post, pre = torch.rand(2, 333) + 0.5
    outputs = grokkernels.dual_rms_norm(x, residual, post, pre, backend=backend)
    gradients = torch.autograd.grad(sum(o.sum() for o in outputs), (x, residual))
    for row in range(9):
        one = [t.detach()[row].clone().requires_grad_() for t in (x, residual)]
        single = grokkernels.dual_rms_norm(*one, post, pre, backend=backend)
        assert all(torch.equal(o[row], s) for o, s in zip(outputs, single, strict=True))
        for whole, alone in zip(gradients, torch.autograd.grad(sum(o.sum() for o in single), one), strict=True):
            assert torch.equal(whole[row], alone)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("shape", [(9, 24), (1100, 520), (3, 9001)])
def test_device_repeats_itself(shape: tuple[int, int], seed: int) -> None:
    """Whatever the order of its threads, the device gives the same bits, whatever other rows are there."""
    rows, cols = shape
    tensors = [*torch.randn(2, rows, cols), *(torch.rand(2, cols) + 0.5)]

    def call(part: slice) -> list[torch.Tensor]:
        leaves = [t[part].clone().requires_grad_() for t in tensors[:2]] + [t.clone() for t in tensors[2:]]
        outputs = grokkernels.dual_rms_norm(*leaves, backend="emulated")
        return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves[:2])]

    expected = call(slice(None))
    native.emulated.set_seed(seed)
    try:
        got, alone = call(slice(None)), call(slice(2, 3))
    finally:
        native.emulated.set_seed(0)
    for whole, again, one in zip(expected, got, alone, strict=True):
        assert torch.equal(again, whole)
        assert torch.equal(one, whole[2:3])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4, dtype=torch.int32)}, "x must be one of float32"),
        ({"x": torch.tensor(1.0), "residual": torch.tensor(1.0)}, "x must have at least one dimension"),
        ({"residual": torch.ones(1, 4)}, r"residual must have shape of x = \(2, 4\), got \(1, 4\)"),
        ({"residual": torch.ones(2, 4).bfloat16()}, "residual must be one of float32"),
        ({"post_weight": torch.ones(3)}, r"post_weight must have shape \(C,\) = \(4\), got \(3,\)"),
        ({"pre_weight": torch.ones(3)}, r"pre_weight must have shape \(C,\) = \(4\), got \(3,\)"),
        ({"eps": -1.0}, "eps must be a finite number >= 0, got -1.0"),
        ({"pre_weight": torch.ones(4).bfloat16(), "backend": "cpu"}, "they must agree"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    ones = torch.ones(2, 4)
    defaults = {"x": ones, "residual": ones, "post_weight": torch.ones(4), "pre_weight": torch.ones(4)}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.dual_rms_norm(**{**defaults, **arguments})
