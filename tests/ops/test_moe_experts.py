"""moe_experts against its case table, on drawn routings, and with bad input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.ops.moe_experts import ACTIVATIONS
from grokkernels.reference.gated_activation import ACTIVATIONS as REFERENCE_ACTIVATIONS
from grokkernels.reference.moe_gate import Routing
from grokkernels.testing import judge
from grokkernels.testing.cases import moe_experts as cases
from tests.suite import CaseTableTests


class TestCases(CaseTableTests):
    table = cases.TABLE


# Drawn alike in every run: of gradients of a few numbers about one case in a hundred fails the rule by luck.
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(16, 40),
    cols=st.integers(16, 70),
    hidden_cols=st.integers(16, 140),
    experts=st.integers(1, 6),
    data=st.data(),
    how=st.sampled_from(["even", "uneven", "one", "dropped"]),
    activation=st.sampled_from(ACTIVATIONS),
    capacity_factor=st.none() | st.floats(0.5, 2.0),
    dtype=st.sampled_from(cases.TABLE.dtypes),
    backend=st.sampled_from(["cpu", "emulated"]),
)
def test_drawn_shapes(
    tokens: int,
    cols: int,
    hidden_cols: int,
    experts: int,
    data: st.DataObject,
    how: str,
    activation: str,
    capacity_factor: float | None,
    dtype: torch.dtype,
    backend: str,
) -> None:
    top_k = data.draw(st.integers(1, experts))
    options = {"activation": activation, "capacity_factor": capacity_factor}
    case = cases.case(tokens, cols, hidden_cols, experts, top_k, how, **options)
    verdict = judge.judge(cases.TABLE, case, dtype, backend)
    assert verdict.passed, verdict


def arguments(tokens: int = 40) -> dict:
    return judge.in_dtype(cases.case(tokens, 48, 80, 4, 2).arguments(), torch.bfloat16)


def test_activations_are_those_of_the_reference() -> None:
    assert set(ACTIVATIONS) == set(REFERENCE_ACTIVATIONS)


def test_repeatable_bit_by_bit() -> None:
    """Two runs agree in every bit, gradients included."""
    runs = [judge.run(cases.moe_experts, arguments(), cases.TABLE.grad, None) for _ in range(2)]
    for one, other in zip(runs[0][0] + runs[0][1], runs[1][0] + runs[1][1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_any_schedule_gives_the_same_bits(dtype: torch.dtype) -> None:
    """More than one tile of rows and of both widths, on a device, in any order of its threads."""
    case = judge.in_dtype(cases.case(70, 136, 136, 3, 2, "uneven").arguments(), dtype)
    runs = []
    native.emulated.reset_counters()
    for seed in (0, 5):
        native.emulated.set_seed(seed)
        try:
            run = judge.run(lambda **kw: cases.moe_experts(**kw, backend="emulated"), case, cases.TABLE.grad, None)
        finally:
            native.emulated.set_seed(0)
        runs.append(run[0] + run[1])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    assert native.emulated.counters()["bank_conflicts"] == 0


@pytest.mark.parametrize(
    ("tokens", "cols", "hidden_cols", "experts"),
    [(300, 72, 136, 2), (70, 200, 264, 3)],  # clusters of two blocks from 256 rows per expert on; several tiles
)
def test_hopper(tokens: int, cols: int, hidden_cols: int, experts: int) -> None:
    case = cases.case(tokens, cols, hidden_cols, experts, 2, "uneven")
    arguments = judge.in_dtype(case.arguments(), torch.bfloat16)
    runs: list[list[torch.Tensor]] = []
    with judge.at_level("sm_90"):
        for dtype in (torch.bfloat16, torch.float16):
            verdict = judge.judge(cases.TABLE, case, dtype, "emulated")
            assert verdict.passed, verdict
        for seed in range(4):
            native.emulated.set_seed(seed)
            native.emulated.set_multiprocessors(1 + 2 * seed)
            try:
                out, grad, _ = judge.run(
                    lambda **kw: cases.moe_experts(**kw, backend="emulated"), arguments, cases.TABLE.grad, None
                )
            finally:
                native.emulated.set_seed(0)
                native.emulated.set_multiprocessors(3)
            runs.append([*out, *grad])
            assert all(torch.equal(one, other) for one, other in zip(runs[0], runs[-1], strict=True))


@pytest.mark.parametrize("backend", ["emulated", "triton"])
@pytest.mark.parametrize("transposed", [(), ("gate_proj", "up_proj"), ("down_proj",), ("gate_proj",), ("x",)])
def test_weights_that_lie_the_other_way(transposed: tuple[str, ...], backend: str) -> None:
    """Operands of either layout, and gate and up that differ: on a device each has a path of its own."""
    case = judge.in_dtype(cases.case(40, 48, 80, 4, 2).arguments(), torch.bfloat16)
    wanted = judge.run(lambda **kw: cases.moe_experts(**kw, backend=backend), case, cases.TABLE.grad, None)
    other = {k: v.mT.contiguous().mT if k in transposed else v for k, v in case.items()}
    got = judge.run(lambda **kw: cases.moe_experts(**kw, backend=backend), other, cases.TABLE.grad, wanted[2])
    for one, two in zip(wanted[0] + wanted[1], got[0] + got[1], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("slots", [[[0, 99], [-7, 1]], [[4, 2**31 - 1], [-(2**31), 0]]])
@pytest.mark.parametrize("offsets", [[3, 1], [-5, 2], [9, 9]])
@pytest.mark.parametrize("overload", ["emulated", "triton"])
def test_device_function_stays_inside(slots: list[list[int]], offsets: list[int], overload: str) -> None:
    """Whatever slots and offsets hold, the gradient reads and writes its own memory only."""
    x, weights = torch.ones(2, 8), torch.ones(2, 2)
    gate_proj, down_proj, kept = torch.ones(2, 16, 8), torch.ones(2, 8, 16), torch.ones(4, 16)
    slots, offsets = torch.tensor(slots, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
    getattr(torch.ops.grokkernels.moe_experts_bwd, overload)(
        x, x, gate_proj, gate_proj, down_proj, weights, kept, kept, slots, offsets, 0
    )


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_tokens_do_not_see_each_other(backend: str) -> None:
    """NaN in one token changes no bit of another; alone, a token gives the same up to the order of sums."""
    case = judge.in_dtype(cases.case(40, 48, 80, 4, 2).arguments(), torch.float32)
    before = cases.moe_experts(**case, backend=backend)
    case["x"][5] = float("nan")
    after = cases.moe_experts(**case, backend=backend)
    assert torch.equal(torch.cat([after[:5], after[6:]]), torch.cat([before[:5], before[6:]]))
    alone = {**case, **{name: case[name][9:10] for name in ("x", "weights", "indices")}}
    torch.testing.assert_close(cases.moe_experts(**alone, backend=backend), before[9:10])


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_inference_keeps_nothing(backend: str) -> None:
    """Without gradients gate and up are not written, and the result is the same."""
    case = arguments()
    leaf = {**case, "x": case["x"].requires_grad_()}
    with torch.no_grad():
        y = cases.moe_experts(**leaf, backend=backend)
    assert torch.equal(y, cases.moe_experts(**leaf, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_idle_experts_are_not_read(backend: str) -> None:
    """NaN in the weights of an expert without tokens reaches nothing, and its gradient is zero."""
    case = arguments()
    case["indices"] = case["indices"].clamp(max=2)
    for name in ("gate_proj", "up_proj", "down_proj"):
        case[name][3] = float("nan")
    outputs, gradients, _ = judge.run(
        lambda **kw: cases.moe_experts(**kw, backend=backend), case, cases.TABLE.grad, None
    )
    assert outputs[0].isfinite().all()
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert all(torch.count_nonzero(gradients[i][3]) == 0 for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor(1.0)}, "x must have at least one dimension"),
        ({"x": torch.ones(4, 4)}, r"gate_proj must have shape \(E, F, C\) = \(any, any, 4\), got \(2, 6, 3\)"),
        ({"up_proj": torch.ones(2, 5, 3)}, r"up_proj must have shape \(E, F, C\) = \(2, 6, 3\), got \(2, 5, 3\)"),
        ({"down_proj": torch.ones(2, 6, 3)}, r"down_proj must have shape \(E, C, F\) = \(2, 3, 6\), got \(2, 6, 3\)"),
        ({"down_proj": torch.ones(2, 3, 6).half()}, "down_proj must be one of float32, got torch.float16"),
        ({"weights": torch.ones(4, 1)}, r"routing.weights must have shape of routing.indices = \(4, 2\)"),
        ({"weights": torch.ones(4, 2).half()}, "routing.weights must be one of float32"),
        ({"indices": torch.ones(3, 2).int()}, r"routing.indices must have shape \(N, K\) = \(4, any\), got \(3, 2\)"),
        ({"indices": torch.ones(4, 2)}, "routing.indices must be one of int32, int64"),
        ({"activation": "tanh"}, "activation must be one of gelu_tanh, gelu, silu, relu, got 'tanh'"),
        ({"capacity_factor": -0.5}, "capacity_factor must be a finite number >= 0, got -0.5"),
        ({"backend": "cuda"}, "cannot run on backend 'cuda'"),
    ],
)
def test_bad_input(changes: dict, words: str) -> None:
    valid = {
        "x": torch.ones(4, 3),
        "gate_proj": torch.ones(2, 6, 3),
        "up_proj": torch.ones(2, 6, 3),
        "down_proj": torch.ones(2, 3, 6),
        "weights": torch.ones(4, 2),
        "indices": torch.zeros(4, 2, dtype=torch.int32),
    }
    with pytest.raises((TypeError, ValueError), match=words):
        cases.moe_experts(**{**valid, **changes})


def test_routing_is_read_by_name() -> None:
    """Whatever has weights and indices is a routing."""
    case = arguments()
    weights, indices = case.pop("weights"), case.pop("indices")
    routing = Routing(weights, indices.long(), indices, weights.sum(), weights.sum())
    y = grokkernels.moe_experts(**case, routing=routing, backend="cpu")
    assert torch.equal(y, cases.moe_experts(**case, weights=weights, indices=indices, backend="cpu"))
