"""linear_cross_entropy against its case table, on drawn shapes, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import linear_cross_entropy as cases
from tests.suite import CaseTableTests, native_calls


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(16, 40),
    width=st.integers(8, 70),
    vocabulary=st.integers(16, 300),
    softcap=st.sampled_from([0.0, 30.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(rows: int, width: int, vocabulary: int, dtype: torch.dtype, **options: float) -> None:
    """With enough rows that no single lucky rounding of the reference decides, and the losses unreduced."""
    case = cases.case(rows, width, vocabulary, reduction="none", **options)
    verdict = judge.judge(cases.TABLE, case, dtype, "cpu")
    assert verdict.passed, verdict


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradient_of_every_reduction(reduction: str) -> None:
    """Scaled and weighted upstream gradients reach x and weight as through plain logits."""
    arguments = cases.case(30, 16, 50, ignored=0.3).arguments()
    x, weight, targets = arguments["x"].float(), arguments["weight"].float(), arguments["targets"]
    upstream = torch.linspace(-2, 3, 30) if reduction == "none" else torch.tensor(2.5)
    both = []
    for logits_exist in (False, True):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if logits_exist:
            loss = torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction=reduction)
        else:
            loss = grokkernels.linear_cross_entropy(*leaves, targets, reduction=reduction, backend="cpu")
        both.append(torch.autograd.grad(loss, leaves, upstream))
    torch.testing.assert_close(both[0], both[1])


def test_several_pieces_of_dlogits() -> None:
    """More (N, V) than is held at once: dx is summed over the pieces."""
    rows, vocabulary = 5000, 3400
    x, weight = torch.randn(rows, 8), torch.randn(vocabulary, 8)
    targets = torch.randint(0, vocabulary, (rows,))
    leaves = x.requires_grad_(), weight.requires_grad_()
    loss = grokkernels.linear_cross_entropy(*leaves, targets, softcap=30.0, backend="cpu")
    plain = grokkernels.cross_entropy(x @ weight.T, targets, softcap=30.0, backend="cpu")
    torch.testing.assert_close(loss, plain)
    gradients, expected = torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-8)


def test_neither_rows_nor_threads_change_a_result() -> None:
    targets = torch.tensor([0, 7, 8999, -100, 4, 5, 4096, 1, 2, 8192, 3])
    x, weight = torch.randn(11, 40), torch.randn(9000, 40)
    x.requires_grad_()
    weight.requires_grad_()

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        losses = grokkernels.linear_cross_entropy(x[rows], weight, targets[rows], reduction="none", backend="cpu")
        return losses, *torch.autograd.grad(losses.sum(), (x, weight))

    whole = run(slice(None))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), whole, strict=True))
    # (Up to four rows take another path through the products, which sums in another order: see csrc/cpu/gemm.h.)
    for rows in (slice(0, 6), slice(1, 11), slice(4, 9)):
        losses, dx, _ = run(rows)
        assert torch.equal(losses, whole[0][rows])
        assert torch.equal(dx[rows], whole[1][rows])


def test_only_the_gradients_asked_for() -> None:
    x, weight, targets = torch.randn(6, 8), torch.randn(20, 8), torch.tensor([1, 2, 3, -100, 0, 19])
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    both = torch.autograd.grad(grokkernels.linear_cross_entropy(*leaves, targets, backend="cpu"), leaves)
    for i in range(2):
        parts = [x.clone(), weight.clone()]
        parts[i].requires_grad_()
        calls = native_calls(
            lambda parts=parts: grokkernels.linear_cross_entropy(*parts, targets, backend="cpu").backward()
        )
        needed = next(args[5:7] for function, args, _ in calls if "bwd" in function.name())
        assert needed == (i == 0, i == 1)
        assert torch.equal(parts[i].grad, both[i])
        assert parts[1 - i].grad is None


def test_ignored_rows_are_not_read() -> None:
    x, weight, targets = torch.randn(3, 8), torch.randn(20, 8).requires_grad_(), torch.tensor([1, -100, 0])
    x[1] = torch.nan
    x.requires_grad_()
    loss = grokkernels.linear_cross_entropy(x, weight, targets, softcap=30.0, backend="cpu")
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": torch.ones(4)}, r"x must have shape \(N, C\) = \(any, any\), got \(4,\)"),
        ({"weight": torch.ones(5, 3)}, r"weight must have shape \(V, C\) = \(any, 4\), got \(5, 3\)"),
        ({"x": torch.ones(2, 0), "weight": torch.ones(5, 0)}, "C must be at least 1"),
        ({"weight": torch.ones(0, 4)}, "V must be at least 1"),
        ({"targets": torch.tensor([0, 5])}, r"targets\[1\] is 5; allowed are 0 to 4 and ignore_index -100"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"softcap": -1.0}, "softcap must be a finite number >= 0"),
        ({"weight": torch.ones(5, 4).bfloat16(), "backend": "cpu"}, "they must agree"),
        ({"x": torch.ones(2, 4).double(), "backend": "cpu"}, "x is torch.float64"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.linear_cross_entropy(
            **{"x": torch.ones(2, 4), "weight": torch.ones(5, 4), "targets": torch.tensor([0, 3]), **arguments}
        )
