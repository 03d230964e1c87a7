"""moe_gate against its case table, on drawn shapes and options, its invariants, and bad input."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import Routing, native
from grokkernels.reference.moe_gate import moe_gate as reference
from grokkernels.testing import judge
from grokkernels.testing.cases import moe_gate as cases
from tests.suite import Backend, CaseTableTests, cpu_backends


class TestCases(CaseTableTests):
    table = cases.TABLE


def run(logits: torch.Tensor, top_k: int, *, backend: str = "cpu", **options: Any) -> Routing:
    return grokkernels.moe_gate(logits, top_k, backend=backend, **options)


def native_backends() -> list[Backend]:
    return [*cpu_backends(), Backend("emulated"), Backend("triton")]


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options that fit together, for E = groups * size experts."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 30))
    topk_groups = draw(st.integers(1, groups))
    topk_first = draw(st.booleans())
    return {
        "experts": groups * size,
        "tokens": draw(st.integers(0, 40)),
        "top_k": draw(st.integers(1, topk_groups * size)),
        "levels": draw(st.sampled_from((0, 3, 30))),
        "scoring": "softmax" if topk_first else draw(st.sampled_from(("softmax", "sigmoid"))),
        "order": "topk_then_softmax" if topk_first else "softmax_then_topk",
        "softcap": draw(st.sampled_from((0.0, 6.0))),
        "num_groups": groups,
        "topk_groups": topk_groups,
        "renormalize": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from(cases.TABLE.dtypes)),
        "level": draw(st.sampled_from(native_backends())),
    }


def permuted_grid(tokens: int, experts: int, levels: int) -> torch.Tensor:
    """Rows of permutations of evenly spaced logits; of `levels` values, so with ties, unless that is 0.

    From -1.7 to 2.3: around zero two sigmoids would add up to 1, and rounding would decide between groups.
    """
    steps = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(experts)).argsort(dim=-1)
    return (steps % levels if levels else steps) * (4 / (levels or experts)) - 1.7


@given(drawn=options())
@settings(max_examples=60, deadline=None)
def test_drawn_options(drawn: dict[str, Any]) -> None:
    """Ties and well separated scores only: a bias is a multiple of 2, so it orders before any score does."""
    tokens, experts, dtype = drawn.pop("tokens"), drawn.pop("experts"), drawn.pop("dtype")
    level, logits = drawn.pop("level"), permuted_grid(tokens, experts, drawn.pop("levels")).to(dtype)
    biases = torch.randint(-2, 3, (experts,), generator=torch.Generator().manual_seed(1)).float() * 2
    arguments = {"logits": logits, **drawn, "bias": biases if drawn["bias"] else None}
    expected, expected_grad, cotangents = judge.run(reference, arguments, ("logits",), None)
    with level.active() as backend:
        got, grad, _ = judge.run(partial(run, backend=backend), arguments, ("logits",), cotangents)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grad, expected_grad)
    check_invariants(Routing(*got), tokens, experts, drawn["top_k"])


def check_invariants(routing: Routing, tokens: int, experts: int, top_k: int) -> None:
    assert routing.tokens_per_expert.sum() == tokens * top_k
    assert (routing.weights >= 0).all()
    assert routing.indices.shape == routing.weights.shape == (tokens, top_k)
    ordered = routing.indices.sort(dim=-1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all(), "an expert was chosen twice"
    assert ((ordered >= 0) & (ordered < experts)).all()
    assert torch.equal(routing.tokens_per_expert, torch.bincount(routing.indices.flatten(), minlength=experts).int())


@pytest.mark.parametrize("top_k", [1, 2, 3, 8, 9, 64])
@pytest.mark.parametrize("backend", native_backends(), ids=str)
def test_planted_tie_takes_the_lower_index(top_k: int, backend: Backend) -> None:
    logits = torch.zeros(19, 64)
    logits[1::2, 40:] = 1.0
    expected = torch.arange(64).expand(19, 64).clone()
    expected[1::2] = torch.cat((torch.arange(40, 64), torch.arange(40)))
    with backend.active() as name:
        for scoring in ("softmax", "sigmoid"):
            assert torch.equal(run(logits, top_k, scoring=scoring, backend=name).indices, expected[:, :top_k].int())


@pytest.mark.parametrize("backend", native_backends(), ids=str)
def test_rows_do_not_see_each_other(backend: Backend) -> None:
    """Permuting rows permutes weights and indices to the bit; so does taking one alone."""
    logits = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    permutation = torch.randperm(37, generator=torch.Generator().manual_seed(1))
    with backend.active() as name:
        whole, permuted = run(logits, 5, backend=name), run(logits[permutation], 5, backend=name)
        alone = run(logits[7:8], 5, backend=name)
    for now, then, one in zip(permuted[:2], whole[:2], alone[:2], strict=True):
        assert torch.equal(now, then[permutation])
        assert torch.equal(one, then[7:8])
    assert torch.equal(permuted.tokens_per_expert, whole.tokens_per_expert)


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_with_any_number_of_threads(threads: int) -> None:
    logits = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0))

    def both(count: int) -> list[torch.Tensor]:
        torch.set_num_threads(count)
        leaf = logits.clone().requires_grad_()
        routing = run(leaf, 4, renormalize=True)
        (routing.weights.square().sum() + routing.load_balance_loss + routing.z_loss).backward()
        return [*routing, leaf.grad]

    for now, then in zip(both(threads), both(2), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_same_bits_with_any_schedule(seed: int) -> None:
    """The threads of a device in any order, with groups, choices beyond a lane's first and several final blocks."""
    logits = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))

    def both(seed: int) -> list[torch.Tensor]:
        native.emulated.set_seed(seed)
        try:
            leaf = logits.clone().requires_grad_()
            routing = run(leaf, 40, num_groups=7, topk_groups=5, renormalize=True, backend="emulated")
            (routing.weights.square().sum() + routing.load_balance_loss + routing.z_loss).backward()
        finally:
            native.emulated.set_seed(0)
        return [*routing, leaf.grad]

    for now, then in zip(both(seed), both(0), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("backend", ["emulated", "triton"])
def test_more_rows_than_a_device_has_blocks_for(backend: str) -> None:
    logits = permuted_grid(66000, 8, 0)
    for got, expected in zip(run(logits, 2, backend=backend), run(logits, 2), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["emulated", "triton"])
@pytest.mark.parametrize("experts", [1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 512, 513, 1024])
def test_every_way_to_share_a_row(experts: int, backend: str) -> None:
    """The lanes and the experts of each lane, at both ends of what they take, and all experts chosen."""
    logits = permuted_grid(3, experts, 0)
    for top_k in {1, experts}:
        expected, expected_grad, cotangents = judge.run(
            reference, {"logits": logits, "top_k": top_k}, ("logits",), None
        )
        arguments = {"logits": logits, "top_k": top_k}
        got, grad, _ = judge.run(partial(run, backend=backend), arguments, ("logits",), cotangents)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(grad, expected_grad)


def test_a_device_takes_1024_experts() -> None:
    logits = torch.zeros(2, 1025)
    for backend in ("emulated", "triton"):
        with pytest.raises(ValueError, match="logits has 1025 experts; up to 1024 are supported"):
            run(logits, 2, backend=backend)
    with pytest.raises(RuntimeError, match="there may be 1024 experts at most, got 1025"):
        torch.ops.grokkernels.moe_gate_fwd.emulated(logits, None, 1, 1, 2, False, 0.0, False, 1.0, False, 0.0, 0)


@pytest.mark.parametrize("overload", ["native", "emulated", "triton"])
@pytest.mark.parametrize("indices", [[[-1, 4], [7, 2**31 - 1]], [[0, 0], [-(2**31), 3]]])
def test_native_functions_stay_inside(indices: list[list[int]], overload: str) -> None:
    """Whatever indices hold, the gradient reads and writes its own memory only."""
    wrong = torch.tensor(indices, dtype=torch.int32)
    counts = torch.tensor([2**31 - 1, -5, 0, 1], dtype=torch.int32)
    options = (2, False, 0.0, True, 1.0, False, 0.0, 0)
    backward = getattr(torch.ops.grokkernels.moe_gate_bwd, overload)
    assert backward(torch.ones(2, 2), None, None, torch.randn(2, 4), wrong, counts, *options).isfinite().all()


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_all_rows_nowhere(backend: str) -> None:
    logits = torch.full((5, 4), float("nan"), requires_grad=True)
    routing = run(logits, 2, backend=backend)
    assert (routing.indices == -1).all()
    assert (routing.weights == 0).all()
    assert (routing.tokens_per_expert == 0).all()
    assert routing.load_balance_loss == routing.z_loss == 0
    (routing.weights.sum() + routing.load_balance_loss + routing.z_loss).backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_a_nan_bias_keeps_indices_in_range(backend: str) -> None:
    bias = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), float("nan"), 0.0])
    routing = run(torch.randn(20, 6), 4, bias=bias, num_groups=3, topk_groups=2, backend=backend)
    check_invariants(routing, 20, 6, 4)


@pytest.mark.parametrize("used", ["weights", "load_balance_loss", "z_loss"])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_each_output_alone_has_its_gradient(used: str, scoring: str, backend: str) -> None:
    logits = torch.randn(9, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for leaf, gate in ((logits.float(), partial(run, backend=backend)), (logits.clone(), reference)):
        leaf.requires_grad_()
        getattr(gate(leaf, 3, scoring=scoring), used).square().sum().backward()
        gradients.append(leaf.grad.double())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_seeds_of_64_bits(backend: str) -> None:
    logits = torch.randn(4, 8)
    for seed in (0, -1, 2**63, 2**64 - 1, -(2**63)):
        ours = run(logits, 2, jitter=0.5, seed=seed, backend=backend)
        theirs = reference(logits, 2, jitter=0.5, seed=seed)
        assert torch.equal(ours.indices, theirs.indices)
        torch.testing.assert_close(ours.weights, theirs.weights)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"logits": [1.0]}, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.ones(4, dtype=torch.int32)}, "logits must be one of float32"),
        ({"logits": torch.tensor(1.0)}, r"logits must have shape \(..., E\) with E >= 1, got \(\)"),
        ({"logits": torch.ones(3, 0)}, r"logits must have shape \(..., E\) with E >= 1, got \(3, 0\)"),
        ({"top_k": 0}, "top_k must be from 1 to 6, got 0"),
        ({"top_k": 7}, "top_k must be from 1 to 6, got 7"),
        ({"top_k": 2.0}, "top_k must be an int, got float"),
        ({"top_k": True}, "top_k must be an int, got bool"),
        ({"scoring": "tanh"}, "scoring must be one of softmax, sigmoid, got 'tanh'"),
        ({"order": "topk"}, "order must be one of softmax_then_topk, topk_then_softmax, got 'topk'"),
        ({"scoring": "sigmoid", "order": "topk_then_softmax"}, "scoring must be 'softmax' with order"),
        ({"softcap": -1.0}, "softcap must be a finite number >= 0, got -1.0"),
        ({"routed_scale": float("nan")}, "routed_scale must be a finite number >= 0"),
        ({"bias": torch.ones(5)}, r"bias must have shape \(E,\) = \(6\), got \(5,\)"),
        ({"bias": torch.ones(6).bfloat16()}, "bias must be one of float32, got torch.bfloat16"),
        ({"num_groups": 4}, "num_groups must divide the 6 experts, got 4"),
        ({"num_groups": 0}, "num_groups must be from 1 to 6, got 0"),
        ({"topk_groups": 2}, "topk_groups must be from 1 to 1, got 2"),
        ({"num_groups": 6}, "topk_groups must be enough groups of 1 experts for top_k = 2, got 1"),
        ({"jitter": 1.0, "seed": 1}, "jitter must be below 1, got 1.0"),
        ({"jitter": 0.1}, "seed must be an int when jitter is not 0, got None"),
        ({"jitter": 0.1, "seed": 1.5}, "seed must be an int, got float"),
        ({"jitter": 0.1, "seed": 2**64}, "seed must be from -9223372036854775808 to 18446744073709551615"),
        ({"backend": "tpu"}, "names no backend: 'tpu'; allowed are"),
        ({"backend": "cuda"}, "cannot run on backend 'cuda'"),
        ({"logits": torch.ones(2, 6).double(), "backend": "cpu"}, "logits is torch.float64"),
    ],
)
def test_bad_input(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.moe_gate(**{"logits": torch.ones(2, 6), "top_k": 2, **arguments})
