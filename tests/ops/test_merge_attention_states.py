"""merge_attention_states against its case table, on drawn shapes, against whole attention, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import merge_attention_states as cases
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=20, deadline=None)
@given(
    # Several dozen rows: the largest error over a few, where the reference may by luck be exact, is no measure.
    shape=st.tuples(st.integers(1, 2), st.integers(16, 20), st.integers(8, 20), st.integers(4, 150)),
    dead=st.booleans(),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(shape: tuple[int, int, int, int], dead: bool, dtype: torch.dtype) -> None:
    verdict = judge.judge(cases.TABLE, cases.case(*shape, dead=dead), dtype, "cpu")
    assert verdict.passed, verdict


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v), scores.logsumexp(-1)


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_two_parts_make_the_whole(backend: str) -> None:
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 11, 3, 8), torch.randn(2, 11, 3, 8)
    expected = _attention(q, k, v)
    parts = [_attention(q, k[:, part], v[:, part]) for part in (slice(4), slice(4, None))]
    merged = grokkernels.merge_attention_states(*parts[0], *parts[1], backend=backend)
    for got, wanted in zip(merged, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_dead_rows(backend: str) -> None:
    """No keys in either state: 0 and -inf, and no gradient. No keys in one: the other comes back as it is."""
    leaves = [t.requires_grad_() for t in (torch.randn(1, 3, 1, 4), torch.zeros(1, 1, 3), torch.randn(1, 3, 1, 4))]
    lse2 = torch.zeros(1, 1, 3)
    with torch.no_grad():
        leaves[1][..., :2] = -torch.inf
        lse2[..., 1:] = -torch.inf
    o, lse = grokkernels.merge_attention_states(*leaves, lse2.requires_grad_(), backend=backend)
    assert torch.equal(o[:, 0], leaves[2][:, 0])
    assert torch.equal(o[:, 1], torch.zeros(1, 1, 4))
    assert torch.equal(o[:, 2], leaves[0][:, 2])
    assert lse.flatten().tolist() == [0.0, -torch.inf, 0.0]
    gradients = torch.autograd.grad((o.sum() + lse[..., ::2].sum()), [*leaves, lse2])
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][:, :2].abs().max() == gradients[2][:, 1:].abs().max() == 0
    assert gradients[1].flatten().tolist() == [0.0, 0.0, 1.0]
    assert gradients[3].flatten().tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("native", ["cpu", "emulated", "triton"])
def test_one_output_alone(native: str, used: int) -> None:
    leaves = list(cases.case(2, 3, 4, 8).arguments().values())
    leaves = [t.float().requires_grad_() for t in leaves]
    gradients = {}
    for backend in (native, "reference"):
        out = grokkernels.merge_attention_states(*leaves, backend=backend)[used]
        gradients[backend] = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)
    for got, wanted in zip(gradients[native], gradients["reference"], strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_device_long_rows(backend: str) -> None:
    """Rows of more columns than 32 threads hold at once, of either alignment."""
    for dim in (1040, 700, 601):
        verdict = judge.judge(cases.TABLE, cases.case(1, 3, 5, dim), torch.bfloat16, backend)
        assert verdict.passed, verdict


@pytest.mark.parametrize("backend", ["emulated", "triton"])
@pytest.mark.parametrize("dim", [64, 30])
def test_device_reads_any_strides(dim: int, backend: str) -> None:
    """Heads before tokens, a slice of a wider tensor, statistics transposed: the bits of dense tensors."""
    wide = torch.randn(2, 3, 5, 2 * dim + 4)
    o1, o2 = wide[..., :dim].transpose(1, 2), torch.randn(2, 5, 3, dim)
    lse1, lse2 = torch.randn(2, 5, 3).transpose(1, 2), torch.randn(2, 3, 5)
    dense = [t.contiguous() for t in (o1, lse1, o2, lse2)]

    def call(*arguments: torch.Tensor) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() for t in arguments]
        outputs = grokkernels.merge_attention_states(*leaves, backend=backend)
        return [*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)]

    for got, wanted in zip(call(o1, lse1, o2, lse2), call(*dense), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"o1": [1.0]}, "o1 must be a torch.Tensor, got list"),
        ({"o1": torch.ones(2, 3, 4)}, r"o1 must have shape \(B, T, H, D\)"),
        ({"o2": torch.ones(1, 3, 2, 5)}, r"o2 must have shape of o1 = \(1, 3, 2, 4\), got \(1, 3, 2, 5\)"),
        ({"o2": torch.ones(1, 3, 2, 4).bfloat16()}, "o2 must be one of float32"),
        ({"lse1": torch.ones(1, 3, 2)}, r"lse1 must have shape \(B, H, T\) = \(1, 2, 3\), got \(1, 3, 2\)"),
        ({"lse2": torch.ones(1, 2, 3).bfloat16()}, "lse2 must be one of float32"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    o, lse = torch.ones(1, 3, 2, 4), torch.ones(1, 2, 3)
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.merge_attention_states(**{"o1": o, "lse1": lse, "o2": o, "lse2": lse, **arguments})
