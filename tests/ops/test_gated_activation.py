"""gated_activation against its case table, on drawn shapes, at special values, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels.ops.gated_activation import KINDS
from grokkernels.testing import judge
from grokkernels.testing.cases import gated_activation as cases
from tests.suite import CaseTableTests, native_calls


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=40, deadline=None)
@given(
    # Many elements: the largest error over a few, where the reference may by luck be exact, is no measure.
    rows=st.sampled_from([0, 4, 5, 6, 7, 8, 9]),
    cols=st.integers(33, 300),
    kind=st.sampled_from(KINDS),
    std=st.sampled_from([0.1, 1.0, 4.0]),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(rows: int, cols: int, kind: str, std: float, dtype: torch.dtype) -> None:
    verdict = judge.judge(cases.TABLE, cases.case(rows, cols, kind=kind, std=std), dtype, "cpu")
    assert verdict.passed, verdict


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("backend", "cols"), [("cpu", 33), ("emulated", 33), ("emulated", 64), ("triton", 33)])
def test_halves_of_one_tensor(backend: str, cols: int, kind: str) -> None:
    """As a fused projection leaves them: read in place, and the same numbers as from tensors of their own."""
    both = torch.randn(7, 2 * cols).requires_grad_()
    gate, up = both.chunk(2, dim=-1)
    expected = grokkernels.gated_activation(gate.contiguous(), up.contiguous(), kind, backend=backend)
    calls = native_calls(lambda: grokkernels.gated_activation(gate, up, kind, backend=backend))
    assert [arguments[0].data_ptr() for _, arguments, _ in calls] == [both.data_ptr()]
    y = grokkernels.gated_activation(gate, up, kind, backend=backend)
    assert torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), both, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), both)
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_large_outputs_are_streamed_and_equal(dtype: torch.dtype) -> None:
    """From 8 MiB on the stores go past the caches; the values are those of the small calls."""
    rows, cols = 2056, 2048
    gate, up = (t.to(dtype).requires_grad_() for t in torch.randn(2, rows, cols))
    dy = torch.randn(rows, cols).to(dtype)
    y = grokkernels.gated_activation(gate, up, backend="cpu")
    gradients = torch.autograd.grad(y, (gate, up), dy)
    part = slice(1000, 1010)
    small = [t.detach()[part].clone().requires_grad_() for t in (gate, up)]
    small_y = grokkernels.gated_activation(*small, backend="cpu")
    assert torch.equal(y[part], small_y)
    for whole, piece in zip(gradients, torch.autograd.grad(small_y, small, dy[part]), strict=True):
        assert torch.equal(whole[part], piece)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_special_values(backend: str, kind: str) -> None:
    """Far out the activations are 0 and g, their slopes 0 and 1; NaN stays NaN."""
    gate = torch.tensor([-1e30, -1000.0, -0.0, 0.0, 1000.0, 1e30, float("nan")], requires_grad=True)
    y = grokkernels.gated_activation(gate, torch.ones(7), kind, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), gate)
    assert y[:4].abs().max() == 0
    assert torch.equal(y[4:6], gate[4:6])
    assert y[6].isnan()
    assert slope[:2].abs().max() == 0
    assert torch.equal(slope[4:6], torch.ones(2))
    assert slope[2] == slope[3] == (0.0 if kind == "relu" else 0.5)


def test_device_takes_aligned_blocks_and_odd_ends() -> None:
    """One row of several blocks whose last is not full, with its start on and off a 16-byte boundary: the same bits."""
    memory = torch.randn(2, 10004)
    gate, up = memory[:, :10000]
    expected = grokkernels.gated_activation(gate.contiguous(), up.contiguous(), backend="emulated")
    odd_gate, odd_up = torch.empty(2, 10001)[:, 1:].copy_(memory[:, :10000])
    assert torch.equal(grokkernels.gated_activation(odd_gate, odd_up, backend="emulated"), expected)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"gate": [1.0]}, "gate must be a torch.Tensor, got list"),
        ({"gate": torch.ones(4, dtype=torch.int32)}, "gate must be one of float32"),
        ({"gate": torch.tensor(1.0)}, "gate must have at least one dimension"),
        ({"up": torch.ones(1, 4)}, r"up must have shape of gate = \(2, 4\), got \(1, 4\)"),
        ({"up": torch.ones(2, 4).bfloat16()}, "up must be one of float32"),
        ({"kind": "tanh"}, "kind must be one of gelu_tanh, gelu, silu, relu, got 'tanh'"),
        (
            {"gate": torch.ones(2, 4).double(), "up": torch.ones(2, 4).double(), "backend": "cpu"},
            "gate is torch.float64",
        ),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.gated_activation(**{"gate": torch.ones(2, 4), "up": torch.ones(2, 4), **arguments})
