"""grouped_mm against its case table, on drawn groups, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.testing import judge
from grokkernels.testing.cases import grouped_mm as cases
from grokkernels.testing.fences import LAYOUTS
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(st.integers(0, 30), min_size=1, max_size=5).map(tuple),
    depth=st.integers(8, 80),  # a gradient of a few numbers would be judged by luck
    cols=st.integers(8, 140),
    unused=st.integers(0, 3),
    mt=st.booleans(),
    dtype=st.sampled_from(cases.TABLE.dtypes),
    backend=st.sampled_from(["cpu", "emulated"]),
)
def test_drawn_groups(
    groups: tuple[int, ...], depth: int, cols: int, unused: int, mt: bool, dtype: torch.dtype, backend: str
) -> None:
    case = cases.case(groups, depth, cols, unused=unused, mt=mt)
    verdict = judge.judge(cases.TABLE, case, dtype, backend)
    assert verdict.passed, verdict


TILES = cases.case((130, 0, 3), 104, 264, unused=2)  # two tiles of rows, three of columns, four steps of the sum


@pytest.mark.parametrize("backend", ["emulated", "triton"])
@pytest.mark.parametrize("mt", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_a_device(layout: str, mt: bool, backend: str) -> None:
    """Operands that are copied as they lie, from either side, and those that are read number by number."""
    case = cases.case((130, 0, 3), 104, 264, unused=2, mt=mt)
    verdict = judge.judge(cases.TABLE, case, torch.bfloat16, backend, layout=layout)
    assert verdict.passed, verdict


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
@pytest.mark.parametrize("seed", [1, 2])
def test_any_schedule_gives_the_same_bits(seed: int, dtype: torch.dtype) -> None:
    arguments = judge.in_dtype(TILES.arguments(), dtype)
    runs = []
    native.emulated.reset_counters()
    for now in (0, seed):
        native.emulated.set_seed(now)
        try:
            runs.append(judge.run(lambda **kw: cases.grouped_mm(**kw, backend="emulated"), arguments, ("x", "w"), None))
        finally:
            native.emulated.set_seed(0)
    for one, other in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert torch.equal(one, other)
    counters = native.emulated.counters()
    assert counters["asynchronous_copies"] > 0
    assert counters["bank_conflicts"] == 0


# Two blocks share columns from 256 rows per group on; a sum of 456 has more steps than the ring has slots.
@pytest.mark.parametrize(
    ("groups", "depth", "cols", "mt"),
    [((300,), 72, 264, True), ((600, 30), 200, 264, False), ((100, 130, 1, 0, 30), 456, 136, True)],
)
def test_hopper(groups: tuple[int, ...], depth: int, cols: int, mt: bool) -> None:
    case = cases.case(groups, depth, cols, unused=3, mt=mt)
    with judge.at_level("sm_90"):
        for dtype in (torch.bfloat16, torch.float16):
            verdict = judge.judge(cases.TABLE, case, dtype, "emulated")
            assert verdict.passed, verdict
        arguments = judge.in_dtype(case.arguments(), torch.bfloat16)
        runs: list[list[torch.Tensor]] = []
        for seed in range(4):
            native.emulated.set_seed(seed)
            native.emulated.set_multiprocessors(1 + 2 * seed)
            try:
                out, grad, _ = judge.run(
                    lambda **kw: cases.grouped_mm(**kw, backend="emulated"), arguments, ("x", "w"), None
                )
            finally:
                native.emulated.set_seed(0)
                native.emulated.set_multiprocessors(3)
            runs.append([*out, *grad])
            assert all(torch.equal(one, other) for one, other in zip(runs[0], runs[-1], strict=True))


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_groups_are_kept_apart(backend: str) -> None:
    """The tiles of a group reach into the next: its NaN must not come through, not even in sums over rows."""
    x, w = torch.randn(160, 72).bfloat16(), torch.randn(3, 72, 136).bfloat16()
    ends = torch.tensor([70, 75, 160], dtype=torch.int32)
    x[75:] = float("nan")
    x.requires_grad_(), w.requires_grad_()
    with judge.at_level("sm_90"):
        y = grokkernels.grouped_mm(x, w, ends, backend=backend)
        y.sum().backward()
    for part in (y[:75], x.grad[:75], w.grad[:2]):
        assert part.isfinite().all()


@pytest.mark.parametrize("multiprocessors", [1, 40])
def test_any_number_of_blocks(multiprocessors: int) -> None:
    x, w = torch.randn(300, 16), torch.randn(40, 16, 72)
    ends = torch.arange(7, 287, 7, dtype=torch.int32)
    before = grokkernels.grouped_mm(x, w, ends, backend="emulated")
    native.emulated.set_multiprocessors(multiprocessors)
    try:
        assert torch.equal(grokkernels.grouped_mm(x, w, ends, backend="emulated"), before)
    finally:
        native.emulated.set_multiprocessors(3)
    torch.testing.assert_close(before[:280], torch.cat([x[7 * e : 7 * e + 7] @ w[e] for e in range(40)]))
    assert (before[280:] == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_gradient_of_a_sum(backend: str) -> None:
    """The gradient that arrives is one number expanded: every stride is 0."""
    x, w = torch.randn(5, 6, requires_grad=True), torch.randn(2, 6, 3, requires_grad=True)
    offsets = torch.tensor([2, 4], dtype=torch.int32)
    grokkernels.grouped_mm(x, w, offsets, backend=backend).sum().backward()
    wanted = torch.cat([w[0].sum(1).expand(2, -1), w[1].sum(1).expand(2, -1), torch.zeros(1, 6)])
    torch.testing.assert_close(x.grad, wanted)
    torch.testing.assert_close(w.grad, torch.stack([x[:2].sum(0), x[2:4].sum(0)]).unsqueeze(2).expand(-1, -1, 3))


def test_weight_gradient_lies_as_the_weight() -> None:
    """A parameter (E, out, in) passed as .mT gets a gradient that needs no copy."""
    weight = torch.randn(2, 7, 5, requires_grad=True)
    grokkernels.grouped_mm(
        torch.randn(4, 5), weight.mT, torch.tensor([1, 4], dtype=torch.int32)
    ).square().sum().backward()
    assert weight.grad.is_contiguous()


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_rows_do_not_see_each_other(backend: str) -> None:
    """NaN in one row changes no bit of another."""
    x, w = torch.randn(9, 700), torch.randn(2, 700, 37)
    ends = torch.tensor([7, 9], dtype=torch.int32)
    before = grokkernels.grouped_mm(x, w, ends, backend=backend)
    x[3] = float("nan")
    after = grokkernels.grouped_mm(x, w, ends, backend=backend)
    assert torch.equal(torch.cat([after[:3], after[4:]]), torch.cat([before[:3], before[4:]]))


@pytest.mark.parametrize("overload", ["native", "emulated", "triton"])
@pytest.mark.parametrize("offsets", [[3, 1], [-5, 2], [9, 9], [2**31 - 1, -(2**31)]])
def test_native_function_stays_inside(offsets: list[int], overload: str) -> None:
    """Whatever offsets hold, the native function reads and writes its own memory only."""
    x, w = torch.randn(4, 8), torch.randn(2, 8, 8)
    ends = torch.tensor(offsets, dtype=torch.int32)
    y = getattr(torch.ops.grokkernels.grouped_mm, overload)(x, w, ends)
    assert y.shape == (4, 8)
    getattr(torch.ops.grokkernels.grouped_mm_bwd, overload)(y, x, w, ends)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(4)}, r"x must have shape \(M, K\) = \(any, 3\), got \(4,\)"),
        ({"x": torch.ones(4, 2)}, r"x must have shape \(M, K\) = \(any, 3\), got \(4, 2\)"),
        ({"w": torch.ones(3, 5)}, r"w must have shape \(E, K, N\)"),
        ({"w": torch.ones(2, 3, 5).bfloat16()}, "w must be one of float32, got torch.bfloat16"),
        ({"w": torch.ones(0, 3, 5), "offsets": torch.zeros(0, dtype=torch.int32)}, "at least one group"),
        ({"offsets": torch.tensor([2, 4])}, "offsets must be one of int32, got torch.int64"),
        ({"offsets": torch.tensor([4], dtype=torch.int32)}, r"offsets must have shape \(E,\) = \(2\), got \(1,\)"),
        ({"offsets": torch.tensor([3, 2], dtype=torch.int32)}, r"got offsets\[1\] = 2 after 3"),
        ({"offsets": torch.tensor([-1, 2], dtype=torch.int32)}, r"got offsets\[0\] = -1"),
        ({"offsets": torch.tensor([2, 5], dtype=torch.int32)}, "at most the 4 rows of x"),
        ({"backend": "cuda"}, "cannot run on backend 'cuda'"),
    ],
)
def test_bad_input(arguments: dict, words: str) -> None:
    valid = {"x": torch.ones(4, 3), "w": torch.ones(2, 3, 5), "offsets": torch.tensor([2, 4], dtype=torch.int32)}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.grouped_mm(**{**valid, **arguments})
