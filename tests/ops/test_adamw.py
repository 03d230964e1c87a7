"""adamw against its case table, and the optimizer against torch.optim.AdamW."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.ops.adamw import global_norm
from grokkernels.optim import AdamW
from grokkernels.testing import judge
from grokkernels.testing.cases import adamw as cases
from tests.suite import CaseTableTests

SHAPES = ((40, 30), (17,), (0,), (), (3, 4, 5))
OPTIONS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}


class TestCases(CaseTableTests):
    table = cases.TABLE


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=5),
    max_norm=st.sampled_from([None, 1.0]),
    steps_made=st.integers(0, 50),
    dtype=st.sampled_from(cases.TABLE.dtypes),
)
def test_drawn_shapes(sizes: list[int], max_norm: float | None, steps_made: int, dtype: torch.dtype) -> None:
    """One tensor with enough elements that no single lucky rounding of the reference decides is always there."""
    shapes = [(64, 32), *((size + 64 if size else 0,) for size in sizes)]
    verdict = judge.judge(
        cases.TABLE, cases.case(*shapes, steps_made=steps_made, lr=0.1, max_norm=max_norm), dtype, "cpu"
    )
    assert verdict.passed, verdict


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in SHAPES]


def set_grads(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def groups_of(params: list[torch.nn.Parameter]) -> list[dict]:
    return [{"params": params[:2], "weight_decay": 0.3, "lr": 0.02}, {"params": params[2:], "betas": (0.7, 0.9)}]


@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton", "reference"])
def test_ten_steps_equal_torch(max_norm: float | None, backend: str) -> None:
    """The float64 rule over ten steps: torch.optim.AdamW in float64 is the oracle, in float32 the measure."""
    theirs, oracle, ours = parameters(), parameters(torch.float64), parameters()
    optimizers = [
        torch.optim.AdamW(groups_of(theirs), **OPTIONS),
        torch.optim.AdamW(groups_of(oracle), **OPTIONS),
        AdamW(groups_of(ours), **OPTIONS, max_norm=max_norm, backend=backend),
    ]
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 10) for o in optimizers]
    for step in range(10):
        for params in (theirs, oracle, ours):
            set_grads(params, step)
        for p, wide in zip(ours, oracle, strict=True):
            wide.grad = p.grad.double()
        before = [p.grad.clone() for p in ours]
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(oracle, max_norm)
            torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        assert all(torch.equal(p.grad, b) for p, b in zip(ours, before, strict=True)), "gradients were written to"
        if max_norm is not None:
            torch.testing.assert_close(optimizers[2].grad_norm.double(), norm, rtol=1e-6, atol=0)
    assert (optimizers[2].grad_norm is None) == (max_norm is None)

    def everything(optimizer: torch.optim.Optimizer, key: str | None) -> torch.Tensor:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return torch.cat([(p if key is None else optimizer.state[p][key]).detach().flatten() for p in params])

    for key in (None, "exp_avg", "exp_avg_sq", "step"):
        low, exact, got = (everything(optimizer, key) for optimizer in optimizers)
        assert judge.ratio(got, low, exact.double(), few=got.numel() < judge.FEW) <= 1, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_keep_float32_state(dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = AdamW(params, **OPTIONS)
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    for p in params:
        assert p.dtype == dtype
        assert {t.dtype for t in optimizer.state[p].values()} == {torch.float32}
    other = AdamW(parameters(dtype), **OPTIONS)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert all(torch.equal(optimizer.state[p][k], other.state[q][k]) for k in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("first", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second", [AdamW, torch.optim.AdamW])
def test_state_dict_round_trip(first: type, second: type) -> None:
    """State saved by one optimizer, through a file, goes on in the other as if nothing had happened."""
    straight, params = parameters(), parameters()
    whole, before = first(straight, **OPTIONS), first(params, **OPTIONS)
    for step in range(2):
        set_grads(straight, step)
        set_grads(params, step)
        whole.step()
        before.step()
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = second(params, lr=1.0)
    after.load_state_dict(torch.load(file))
    for step in range(2, 4):
        set_grads(straight, step)
        set_grads(params, step)
        whole.step()
        after.step()
    torch.testing.assert_close(params, straight)
    assert set(after.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert after.state[params[0]]["step"] == 4


def test_amsgrad_state_is_refused() -> None:
    saved = torch.optim.AdamW(parameters(), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad=True, which this optimizer does not have"):
        AdamW(parameters()).load_state_dict(saved)


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norm_not_finite(value: float, backend: str) -> None:
    """With a max_norm the step is skipped and counted; without one the parameter becomes NaN, as in PyTorch."""
    params = parameters()
    optimizer = AdamW(params, max_norm=1.0, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    kept = copy.deepcopy([params, [dict(optimizer.state[p]) for p in params]])
    params[1].grad[3] = value
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert not optimizer.grad_norm.isfinite()
    for p, q, state in zip(params, *kept, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][k], state[k]) for k in state)
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(p.isfinite().all() for p in params)
    free = AdamW(params, backend=backend)
    params[1].grad[3] = value
    free.step()
    assert params[1][3].isnan()


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_missing_gradients_and_closure(backend: str) -> None:
    """A parameter without gradient has no state and counts its own steps; the closure's loss is returned."""
    params = parameters()
    optimizer = AdamW(params, max_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm == 0
    assert not optimizer.state

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().square().sum()
    assert optimizer.step(closure) == before
    set_grads(params, 0)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_mixed_dtypes_in_one_group(backend: str) -> None:
    params = [*parameters(), *parameters(torch.bfloat16, seed=1)]
    apart = copy.deepcopy(params)
    set_grads(params, 0)
    set_grads(apart, 0)
    together, *alone = (AdamW(p, backend=backend) for p in (params, apart[: len(SHAPES)], apart[len(SHAPES) :]))
    for optimizer in (together, *alone):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, apart, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_layouts(backend: str) -> None:
    """Transposed parameters are updated where they lie, gradients in another layout are read as they are, and
    parameters with gaps go to the reference, or are refused when a native backend is asked for."""
    generator = torch.Generator().manual_seed(0)
    dense, grad = torch.randn(6, 9, generator=generator), torch.randn(6, 9, generator=generator)
    expected = torch.nn.Parameter(dense.clone())
    expected.grad = grad
    torch.optim.AdamW([expected]).step()
    for p, g, dense_backend in (
        (dense.t().contiguous().t(), grad.t().contiguous().t(), backend),
        (dense.t().contiguous().t(), grad, backend),
        (dense.clone(), grad.t().contiguous().t(), backend),
        (torch.stack([dense, dense], -1)[..., 0], grad, None),
    ):
        p = p.requires_grad_()
        p.grad = g
        strides = p.stride()
        AdamW([p], backend=dense_backend).step()
        torch.testing.assert_close(p, expected)
        assert p.stride() == strides
    with pytest.raises(ValueError, match=r"params\[0\] has gaps or overlaps in memory"):
        AdamW([p], backend=backend).step()


def test_threads_do_not_change_the_norm() -> None:
    grads = [torch.randn(30000), torch.randn(8193), torch.randn(5)]
    norm = global_norm(grads, backend="cpu")
    torch.set_num_threads(1)
    assert torch.equal(global_norm(grads, backend="cpu"), norm)
    torch.testing.assert_close(norm, torch.cat(grads).norm())


def test_more_tensors_than_a_launch_takes() -> None:
    """The device's tables hold 384 step counts and 64 tensors of one dtype: a launch for each of them that is begun."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(i % 7, generator=generator).to(cases.TABLE.dtypes[i % 3]) for i in range(400)]
    grads = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
    states = [[torch.zeros(p.shape) for p in params] for _ in range(2)]
    results = {}
    for backend in ("cpu", "emulated", "triton"):
        copies = copy.deepcopy([params, *states])
        steps = [torch.tensor(float(i)) for i in range(400)]
        native.emulated.reset_counters()
        norm = grokkernels.adamw(copies[0], grads, *copies[1:], steps, lr=0.1, max_norm=1.0, backend=backend)
        assert steps == [i + 1 for i in range(400)]
        results[backend] = norm, *copies
        # 343 tensors have elements, 114 or 115 to a dtype: 2 launches each for the norm and for the update.
        assert native.emulated.counters()["launches"] == (3 * 2 + 1 + 2 + 3 * 2 if backend == "emulated" else 0)
    torch.testing.assert_close(results["triton"], results["cpu"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results["emulated"], results["cpu"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", cases.TABLE.dtypes)
def test_alignment_changes_nothing_on_the_device(dtype: torch.dtype) -> None:
    """Parameters cut out of one buffer begin anywhere: element by element, the same bits."""
    generator = torch.Generator().manual_seed(0)
    size = 8192 + 77
    numbers = [torch.randn(size, generator=generator) for _ in range(4)]
    results = []
    for offset in (0, 1, 4):
        param, grad, first, second = (torch.full((size + offset + 9,), torch.nan) for _ in range(4))
        buffers = [param.to(dtype), grad.to(dtype), first, second]
        views = [buffer[offset : offset + size] for buffer in buffers]
        for view, number in zip(views, numbers, strict=True):
            view.copy_(number)
        views[3].abs_()
        norm = grokkernels.adamw(
            *([view] for view in views), [torch.tensor(2.0)], lr=0.1, max_norm=1.0, backend="emulated"
        )
        results.append([norm, *views])
        assert all(int(buffer.isnan().sum()) == offset + 9 for buffer in buffers)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
def test_nothing_to_update(backend: str) -> None:
    """Empty lists and tensors without elements; the latter count their steps all the same."""
    with grokkernels.use(backend):
        assert global_norm([]) == 0
        assert grokkernels.adamw([], [], [], [], []) is None
        assert grokkernels.adamw([], [], [], [], [], max_norm=1.0) == 0
        lists, step = [[torch.zeros(0, 3)] for _ in range(4)], torch.tensor(4.0)
        assert grokkernels.adamw(*lists, [step], max_norm=1.0) == 0
        assert step == 5
        params = parameters()
        AdamW(params, max_norm=1.0).step()
    overload = getattr(torch.ops.grokkernels.adamw, "native" if backend == "cpu" else backend)
    overload([], [], [], [], [], torch.ones(()), 0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, False)


def test_autograd_sees_the_change() -> None:
    """A value saved for a backward pass before the step may not be used after it."""
    p = torch.nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_keep_their_settings() -> None:
    params = parameters()
    optimizer = copy.deepcopy(AdamW(params, max_norm=2.0, backend="cpu"))
    assert (optimizer.max_norm, optimizer.backend, optimizer.skipped_steps) == (2.0, "cpu", 0)


def test_refused() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(ValueError, match="AdamW takes dense gradients only"):
        AdamW([p], max_norm=1.0).step()
    for arguments, words in (
        ({"lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"eps": float("nan")}, "eps must be a finite number >= 0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number >= 0"),
        ({"max_norm": -1.0}, "max_norm must be a finite number >= 0"),
    ):
        with pytest.raises(ValueError, match=words):
            AdamW([p], **arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"grads": []}, "grads must have one tensor for each of params, 1, got 0"),
        ({"grads": [torch.ones(2)]}, r"grads\[0\] must have the shape of params\[0\], \(3,\), got \(2,\)"),
        ({"grads": [torch.ones(3).bfloat16()]}, r"grads\[0\] must have the dtype of params\[0\]"),
        ({"params": [torch.ones(3, dtype=torch.int32)]}, r"params\[0\] must be one of float32"),
        ({"exp_avgs": [torch.ones(3).double()], "backend": "cpu"}, r"exp_avgs\[0\] is torch.float64; the moments"),
        ({"steps": [torch.ones(1)]}, r"steps\[0\] must be a 0-d float32 tensor on cpu"),
        ({"norm": torch.ones(1), "max_norm": 1.0}, "norm must be a 0-d float32 tensor on cpu"),
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\), got 1.0"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    lists = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.adamw(**{**lists, "steps": [torch.zeros(())], **change})
