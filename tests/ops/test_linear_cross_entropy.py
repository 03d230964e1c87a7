"""linear_cross_entropy against its case table, on drawn shapes, and with bad input."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import linear_cross_entropy as cases
from tests.suite import CaseTableTests, native_calls


class TestCases(CaseTableTests):
    table = cases.TABLE


ON_DEVICE = pytest.mark.parametrize("backend", ["emulated", "triton"])


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
    backend=st.sampled_from(["cpu", "emulated", "triton"]),
)
def test_drawn_shapes(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype, backend: str, **options: float
) -> None:
    """With enough rows that no single lucky rounding of the reference decides, and the losses unreduced."""
    case = cases.case(rows, width, vocabulary, reduction="none", **options)
    verdict = judge.judge(cases.TABLE, case, dtype, backend)
    assert verdict.passed, verdict


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradient_of_every_reduction(reduction: str, backend: str) -> None:
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
            loss = grokkernels.linear_cross_entropy(*leaves, targets, reduction=reduction, backend=backend)
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


@pytest.mark.slow
def test_several_pieces_of_dlogits_on_a_device() -> None:
    """Triton's is below, with small pieces."""
    rows, vocabulary = 5000, 3400
    x, weight = torch.randn(rows, 8).bfloat16(), torch.randn(vocabulary, 8).bfloat16()
    targets = torch.randint(0, vocabulary, (rows,))
    leaves = x.requires_grad_(), weight.requires_grad_()
    losses = [grokkernels.linear_cross_entropy(*leaves, targets, backend=name) for name in ("emulated", "cpu")]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-6)


def test_several_pieces_of_dlogits_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer bytes than one piece takes: dx is summed over four, the last of them short, dweight written in four."""
    module = importlib.import_module("grokkernels.triton.linear_cross_entropy")
    arguments = cases.case(30, 16, 3400, softcap=30.0, ignored=0.3).arguments()
    leaves = [arguments[name].float().requires_grad_() for name in ("x", "weight")]
    gradients = []
    for held in (module.HELD, 1):
        monkeypatch.setattr(module, "HELD", held)
        loss = grokkernels.linear_cross_entropy(*leaves, arguments["targets"], softcap=30.0, backend="triton")
        gradients.append(torch.autograd.grad(loss, leaves))
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)
    assert torch.equal(gradients[0][1], gradients[1][1])


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


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_only_the_gradients_asked_for(backend: str) -> None:
    x, weight, targets = torch.randn(6, 8), torch.randn(20, 8), torch.tensor([1, 2, 3, -100, 0, 19])
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    both = torch.autograd.grad(grokkernels.linear_cross_entropy(*leaves, targets, backend=backend), leaves)
    for i in range(2):
        parts = [x.clone(), weight.clone()]
        parts[i].requires_grad_()
        calls = native_calls(
            lambda parts=parts: grokkernels.linear_cross_entropy(*parts, targets, backend=backend).backward()
        )
        needed = next(args[5:7] for function, args, _ in calls if "bwd" in function.name())
        assert needed == (i == 0, i == 1)
        assert torch.equal(parts[i].grad, both[i])
        assert parts[1 - i].grad is None


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_ignored_rows_are_not_read(backend: str) -> None:
    x, weight, targets = torch.randn(3, 8), torch.randn(20, 8).requires_grad_(), torch.tensor([1, -100, 0])
    x[1] = torch.nan
    x.requires_grad_()
    loss = grokkernels.linear_cross_entropy(x, weight, targets, softcap=30.0, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_any_schedule_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Several tiles each way, on a device, in any order of its threads."""
    case = cases.case(140, 136, 264, ignored=0.2, softcap=30.0, z_loss=1e-3)
    arguments, runs = judge.in_dtype(case.arguments(), dtype), []
    native.emulated.reset_counters()
    for seed in (0, 5):
        native.emulated.set_seed(seed)
        try:
            run = judge.run(
                lambda **kw: cases.linear_cross_entropy(**kw, backend="emulated"), arguments, ("x", "weight"), None
            )
        finally:
            native.emulated.set_seed(0)
        runs.append(run[0] + run[1])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    assert native.emulated.counters()["bank_conflicts"] == 0


@ON_DEVICE
def test_rows_of_a_device_do_not_see_the_batch(backend: str) -> None:
    """What a row gets depends on neither the other rows nor where they lie, across two ranges of columns."""
    targets = torch.tensor([0, 7, 4200, -100, 4, 5, 4096, 1])
    x, weight = torch.randn(8, 16), torch.randn(4300, 16)

    def run(rows: slice) -> tuple[torch.Tensor, ...]:
        part = x[rows].clone().requires_grad_()
        losses = grokkernels.linear_cross_entropy(part, weight, targets[rows], reduction="none", backend=backend)
        return losses, *torch.autograd.grad(losses.sum(), part)

    whole = run(slice(None))
    for rows in (slice(0, 6), slice(2, 8)):
        for one, other in zip(run(rows), whole, strict=True):
            assert torch.equal(one, other[rows])


@ON_DEVICE
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 65536.0, 1e30])
def test_gradients_of_any_size_on_a_device(scale: float, backend: str) -> None:
    """dlogits are 16-bit numbers, whatever the loss is multiplied by."""
    arguments = judge.in_dtype(cases.case(30, 16, 50, logit_scale=8.0, reduction="sum").arguments(), torch.float16)
    tensors, options = [arguments[name] for name in ("x", "weight", "targets")], (0.0, 8.0, 0.0, 0.0, -100, "sum")
    _, lse = getattr(torch.ops.grokkernels.linear_cross_entropy_fwd, backend)(*tensors, *options)
    bwd = getattr(torch.ops.grokkernels.linear_cross_entropy_bwd, backend)
    gradients = [bwd(torch.tensor(factor), *tensors, lse, True, True, *options) for factor in (1.0, scale)]
    for one, scaled in zip(*gradients, strict=True):
        wanted = (one.double() * scale).half()
        inside = wanted.isfinite() & (wanted.abs() > 1e-3) & (one.abs() > 1e-3)
        torch.testing.assert_close(scaled[inside], wanted[inside], rtol=4e-3, atol=1e-3)
        assert not scaled.isnan().any()


@ON_DEVICE
def test_a_target_outside_is_nan_on_a_device(backend: str) -> None:
    """Nothing can look at targets there: such a row's loss and gradient are NaN, the others' are as ever."""
    x, weight = torch.randn(4, 8), torch.randn(20, 8)
    options = (0.0, 1.0, 0.0, 0.0, -100, "none")
    targets, wrong = torch.tensor([1, 2, -100, 19]), torch.tensor([1, 20, -100, 19])
    ops = torch.ops.grokkernels
    fwd, bwd = (getattr(op, backend) for op in (ops.linear_cross_entropy_fwd, ops.linear_cross_entropy_bwd))
    loss, lse = fwd(x, weight, wrong, *options)
    right, right_lse = fwd(x, weight, targets, *options)
    assert loss.isnan().tolist() == [False, True, False, False]
    assert torch.equal(loss[[0, 2, 3]], right[[0, 2, 3]])
    dx, _ = bwd(torch.ones(4), x, weight, wrong, lse, True, True, *options)
    right_dx, _ = bwd(torch.ones(4), x, weight, targets, right_lse, True, True, *options)
    assert dx[1].isnan().all()
    assert torch.equal(dx[[0, 2, 3]], right_dx[[0, 2, 3]])


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
