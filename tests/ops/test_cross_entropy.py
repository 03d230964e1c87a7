"""cross_entropy against its case table, on drawn shapes, and with bad input."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import cross_entropy as cases
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


BACKENDS = ("cpu", "emulated", "triton")
ON_DEVICE = pytest.mark.parametrize("backend", ["emulated", "triton"])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(16, 40),
    vocabulary=st.integers(16, 300),
    softcap=st.sampled_from([0.0, 5.0, 30.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    ignored=st.sampled_from([0.0, 0.5]),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(rows: int, vocabulary: int, ignored: float, dtype: torch.dtype, **options: float) -> None:
    """With enough rows that no single lucky rounding of the reference decides, and the losses unreduced."""
    case = cases.case(rows, vocabulary, ignored=ignored, reduction="none", **options)
    verdict = judge.judge(cases.TABLE, case, dtype, "cpu")
    assert verdict.passed, verdict


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=st.integers(0, 9), vocabulary=st.integers(1, 70), ignored=st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None)
def test_reductions_agree(backend: str, rows: int, vocabulary: int, ignored: float) -> None:
    """Sum and mean are those of the unreduced losses in double precision; so are their gradients."""
    arguments = cases.case(rows, vocabulary, ignored=ignored).arguments()
    logits, targets = arguments["logits"].float().requires_grad_(), arguments["targets"]
    counted = int((targets != -100).sum())
    losses = grokkernels.cross_entropy(logits, targets, reduction="none", backend=backend)
    for reduction, divisor in (("sum", 1), ("mean", max(counted, 1))):
        loss = grokkernels.cross_entropy(logits, targets, reduction=reduction, backend=backend)
        assert loss == (losses.double().sum() / divisor).float()
        (expected,) = torch.autograd.grad(losses, logits, torch.full((rows,), 3.0 / divisor), retain_graph=True)
        (gradient,) = torch.autograd.grad(loss, logits, torch.tensor(3.0))
        torch.testing.assert_close(gradient, expected, rtol=3e-7, atol=0)


def test_rows_and_threads_do_not_change_a_row() -> None:
    """Neither the other rows nor the number of threads, although one long row is shared between threads."""
    logits, targets = torch.randn(3, 20000), torch.tensor([0, 7, 19999])
    whole = grokkernels.cross_entropy(logits, targets, reduction="none", backend="cpu")
    torch.set_num_threads(1)
    for row in range(3):
        one = grokkernels.cross_entropy(logits[row : row + 1], targets[row : row + 1], backend="cpu")
        assert torch.equal(one, whole[row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_stride_0_gradient(reduction: str, backend: str) -> None:
    """An expanded upstream gradient, as .sum().backward() makes it, is read as what it is."""
    logits, targets = torch.randn(5, 40), torch.tensor([3, -100, 0, 39, 7])
    x = logits.clone().requires_grad_()
    rows = grokkernels.cross_entropy(x, targets, reduction="none", backend=backend)
    (rows.sum() if reduction == "sum" else rows.sum() / 4).backward()
    y = logits.clone().requires_grad_()
    F.cross_entropy(y, targets, reduction=reduction).backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_are_not_read(backend: str) -> None:
    logits = torch.randn(3, 40)
    logits[1] = torch.nan
    logits.requires_grad_()
    loss = grokkernels.cross_entropy(logits, torch.tensor([3, -100, 0]), softcap=30.0, backend=backend)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_special_logits(special: float, backend: str) -> None:
    """As in PyTorch: NaN spreads over its row, +inf makes the row's loss infinite, -inf masks; other rows are whole."""
    logits, targets = torch.randn(3, 40), torch.tensor([3, 5, 0])
    logits[1, 33] = special
    ours = grokkernels.cross_entropy(logits, targets, reduction="none", backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, reduction="none"), equal_nan=True)
    full = torch.full((1, 40), special)
    ours = grokkernels.cross_entropy(full, targets[:1], backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(full, targets[:1]), equal_nan=True)


@ON_DEVICE
@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_rows_and_alignment_do_not_change_a_row_on_the_device(dtype: torch.dtype, backend: str) -> None:
    """Rows of 8199 elements begin at every alignment; alone, or in a wider matrix, each gives the same bits."""
    columns = 8192 + 7
    logits, targets = torch.randn(9, columns).to(dtype), torch.randint(0, columns, (9,))
    weights = torch.rand(9)

    def run(x: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        losses = grokkernels.cross_entropy(
            x, targets[rows], softcap=30.0, label_smoothing=0.1, z_loss=1e-3, reduction="none", backend=backend
        )
        return losses.detach(), torch.autograd.grad(losses, x, weights[rows])[0]

    losses, gradient = run(logits, slice(None))
    wide = torch.full((9, columns + 3), torch.nan, dtype=dtype)
    wide[:, 2:-1] = logits
    again, gradient_again = run(wide[:, 2:-1], slice(None))
    assert torch.equal(again, losses)
    assert torch.equal(gradient_again, gradient)
    for row in range(9):
        alone, gradient_alone = run(logits[row : row + 1].clone(), slice(row, row + 1))
        assert torch.equal(alone, losses[row : row + 1])
        assert torch.equal(gradient_alone, gradient[row : row + 1])


@ON_DEVICE
def test_more_ranges_than_lanes_on_the_device(backend: str) -> None:
    """34 ranges of columns, whose maxima lie far apart, merged by the 32 lanes of a warp."""
    columns = 33 * 8192 + 5
    levels = torch.linspace(-4, 4, 34)[torch.randperm(34)]
    logits = torch.randn(1, columns) + levels.repeat_interleave(8192)[:columns]
    target = torch.tensor([columns - 1])
    ours = grokkernels.cross_entropy(logits, target, backend=backend)
    torch.testing.assert_close(ours.double(), F.cross_entropy(logits.double(), target), rtol=2e-7, atol=0)


@ON_DEVICE
def test_targets_strided_on_the_device(backend: str) -> None:
    logits, targets = torch.randn(6, 40), torch.randint(0, 40, (6, 3), dtype=torch.int32)
    ours = grokkernels.cross_entropy(logits, targets[:, 1], backend=backend)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets[:, 1].long()))


@ON_DEVICE
@pytest.mark.parametrize("columns", [40, 8192 + 40])
@pytest.mark.parametrize("outside", [-1, 2**40, -(2**63)])
def test_targets_outside_are_nan_on_the_device(columns: int, outside: int, backend: str) -> None:
    """The device's host does not look: the row becomes NaN, and so does a mean; the other rows are whole."""
    logits, targets = torch.randn(3, columns), torch.tensor([3, outside, columns - 1])
    options = (0.0, 1.0, 0.0, 0.0, -100)
    ops = torch.ops.grokkernels
    forward, backward = (getattr(op, backend) for op in (ops.cross_entropy_fwd, ops.cross_entropy_bwd))
    losses, lse = forward(logits, targets, *options, "none")
    gradient = backward(torch.ones(3), logits, targets, lse, *options, "none")
    for result in (losses, gradient):
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()
    targets[1] = columns
    assert forward(logits, targets, *options, "mean")[0].isnan()


def test_one_launch_per_pass_over_the_logits() -> None:
    """Beside it stand the merge of long rows and the reduction, or the count of rows that a mean is divided by."""
    for columns, reduction, forward, backward in ((40, "none", 1, 1), (40, "mean", 2, 2), (9000, "sum", 3, 1)):
        logits = torch.randn(2, columns, requires_grad=True)
        native.emulated.reset_counters()
        loss = grokkernels.cross_entropy(logits, torch.tensor([1, 2]), reduction=reduction, backend="emulated")
        assert native.emulated.counters()["launches"] == forward
        loss.sum().backward()
        assert native.emulated.counters()["launches"] == forward + backward


def test_large_gradients_are_written_past_the_caches() -> None:
    """More than the caches hold: another store instruction, the same numbers."""
    logits, targets = torch.randn(140, 32768), torch.randint(0, 32768, (140,))
    logits.requires_grad_()
    grokkernels.cross_entropy(logits, targets, reduction="sum", backend="cpu").backward()
    few = logits.detach()[-3:].clone().requires_grad_()
    grokkernels.cross_entropy(few, targets[-3:], reduction="sum", backend="cpu").backward()
    assert torch.equal(logits.grad[-3:], few.grad)


def test_compiled_calls_refuse_targets_outside() -> None:
    compiled = torch.compile(grokkernels.cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"targets\[1\] is 4; allowed are 0 to 3 and ignore_index -100"):
        compiled(torch.randn(2, 4), torch.tensor([0, 4]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"logits": [1.0]}, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.ones(4)}, r"logits must have shape \(N, V\) = \(any, any\), got \(4,\)"),
        ({"logits": torch.ones(2, 0)}, "V must be at least 1"),
        ({"targets": torch.zeros(2)}, "targets must be one of int32, int64, got torch.float32"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"targets must have shape \(N,\) = \(2\), got \(3,\)"),
        ({"targets": torch.tensor([0, 4])}, r"targets\[1\] is 4; allowed are 0 to 3 and ignore_index -100"),
        ({"targets": torch.tensor([-1, -100])}, r"targets\[0\] is -1"),
        ({"targets": torch.tensor([0, 4]), "backend": "reference"}, r"targets\[1\] is 4"),
        ({"softcap": -1.0}, "softcap must be a finite number >= 0, got -1.0"),
        ({"z_loss": float("inf")}, "z_loss must be a finite number >= 0, got inf"),
        ({"logit_scale": float("nan")}, "logit_scale must be a finite number, got nan"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in \[0, 1\], got 1.5"),
        ({"ignore_index": 0.5}, "ignore_index must be an int, got float"),
        ({"reduction": "avg"}, "reduction must be one of mean, sum, none, got 'avg'"),
        ({"logits": torch.ones(2, 4).double(), "backend": "cpu"}, "logits is torch.float64"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.cross_entropy(**{"logits": torch.ones(2, 4), "targets": torch.tensor([0, 3]), **arguments})
