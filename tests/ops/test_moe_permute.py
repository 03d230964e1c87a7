"""moe_permute and moe_unpermute against their case tables, on drawn routings, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import moe_permute as permute_cases
from grokkernels.testing.cases import moe_unpermute as unpermute_cases
from tests.suite import CaseTableTests


class TestPermute(CaseTableTests):
    table = permute_cases.TABLE


class TestUnpermute(CaseTableTests):
    table = unpermute_cases.TABLE


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 60),
    cols=st.integers(8, 80),
    experts=st.integers(1, 12),
    data=st.data(),
    how=st.sampled_from(["even", "uneven", "one", "dropped"]),
    dtype=st.sampled_from(permute_cases.TABLE.dtypes),
    backend=st.sampled_from(["cpu", "emulated"]),
)
def test_drawn_routings(
    tokens: int, cols: int, experts: int, data: st.DataObject, how: str, dtype: torch.dtype, backend: str
) -> None:
    top_k = data.draw(st.integers(1, experts))
    capacity = data.draw(st.none() | st.integers(0, 20))
    for cases in (permute_cases, unpermute_cases):
        case = cases.case(tokens, cols, experts, top_k, how, capacity=capacity)
        verdict = judge.judge(cases.TABLE, case, dtype, backend)
        assert verdict.passed, verdict


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_there_and_back(backend: str) -> None:
    """With weights 1/K the way back gives the tokens again."""
    x = torch.randn(50, 33)
    indices = permute_cases.routing(torch.Generator().manual_seed(0), 50, 8, 2)
    rows, slots, offsets = grokkernels.moe_permute(x, indices, 8, backend=backend)
    assert offsets[-1] == 100
    assert torch.equal(grokkernels.moe_unpermute(rows, torch.full((50, 2), 0.5), slots, backend=backend), x)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_does_not_depend_on_the_schedule(seed: int) -> None:
    """Threads of a device in any order: the same bits, of several chunks and of more experts than fit at a time."""
    for tokens, experts, top_k, capacity in ((2500, 7, 2, 600), (1500, 1100, 3, None)):
        indices = permute_cases.routing(torch.Generator().manual_seed(0), tokens, experts, top_k, "uneven")
        x = torch.randn(tokens, 3)
        expected = grokkernels.moe_permute(x, indices, experts, capacity=capacity, backend="reference")
        native.emulated.set_seed(seed)
        try:
            got = grokkernels.moe_permute(x, indices, experts, capacity=capacity, backend="emulated")
        finally:
            native.emulated.set_seed(0)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("overload", ["native", "emulated", "triton"])
@pytest.mark.parametrize("slots", [[[0, 99], [-7, 1]], [[4, 2**31 - 1], [-(2**31), 0]]])
def test_native_functions_stay_inside(slots: list[list[int]], overload: str) -> None:
    """Whatever slots hold, the native functions read and write their own memory only."""
    y, weights, slots = torch.randn(4, 8), torch.ones(2, 2), torch.tensor(slots, dtype=torch.int32)
    out = getattr(torch.ops.grokkernels.moe_unpermute_fwd, overload)(y, weights, slots)
    getattr(torch.ops.grokkernels.moe_unpermute_bwd, overload)(out, y, weights, slots)
    getattr(torch.ops.grokkernels.moe_permute_bwd, overload)(y, slots)
    assert torch.equal(out[0], y[0] if slots[0, 0] == 0 else torch.zeros(8))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4)}, r"x must have shape \(N, C\) = \(4, any\), got \(4,\)"),
        ({"x": torch.ones(3, 5)}, r"x must have shape \(N, C\) = \(4, any\), got \(3, 5\)"),
        ({"indices": torch.zeros(4, 2)}, "indices must be one of int32, int64, got torch.float32"),
        ({"indices": torch.zeros(4, dtype=torch.int32)}, r"indices must have shape \(N, K\)"),
        ({"num_experts": 0}, "num_experts must be from 1 to 2147483647, got 0"),
        ({"capacity": -1}, "capacity must be from 0 to 9223372036854775807, got -1"),
        ({"backend": "cuda"}, "cannot run on backend 'cuda'"),
    ],
)
def test_permute_bad_input(arguments: dict, words: str) -> None:
    valid = {"x": torch.ones(4, 5), "indices": torch.zeros(4, 2, dtype=torch.int32), "num_experts": 3}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.moe_permute(**{**valid, **arguments})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"y": torch.ones(7, 5)}, r"y must have shape \(N\*K, C\) = \(8, any\), got \(7, 5\)"),
        ({"weights": torch.ones(4, 3)}, r"weights must have shape of slots = \(4, 2\), got \(4, 3\)"),
        ({"weights": torch.ones(4, 2).bfloat16()}, "weights must be one of float32"),
        ({"slots": torch.zeros(4, 2)}, "slots must be one of int32"),
        ({"slots": torch.zeros(8, dtype=torch.int32)}, r"slots must have shape \(N, K\)"),
    ],
)
def test_unpermute_bad_input(arguments: dict, words: str) -> None:
    valid = {"y": torch.ones(8, 5), "weights": torch.ones(4, 2), "slots": torch.zeros(4, 2, dtype=torch.int32)}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.moe_unpermute(**{**valid, **arguments})
