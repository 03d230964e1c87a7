"""adamw against its case table, and the optimizer against torch.optim.AdamW."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import grokkernels
from grokkernels import native
from grokkernels.ops.adamw import adamw, global_norm
from grokkernels.optim import AdamW
from grokkernels.testing import judge
from grokkernels.testing.cases import adamw as cases
from tests.suite import CaseTableTests

SHAPES = ((40, 30), (17,), (0,), (), (3, 4, 5))
X = torch.zeros(3)
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


def stepped(optimizer: type, **options) -> dict:
    """The state dict of an optimizer after a step."""
    params = parameters()
    made = optimizer(params, **options)
    set_grads(params, 0)
    made.step()
    return made.state_dict()


def changed(key: str, value) -> dict:
    """AdamW's state dict after a step, with one entry of its second parameter's state replaced."""
    saved = stepped(AdamW)
    saved["state"][1][key] = value
    return saved


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (stepped(torch.optim.AdamW, amsgrad=True), "amsgrad=True is not supported by this AdamW, only False"),
        (
            stepped(torch.optim.Adam, weight_decay=0.1),
            "state_dict is Adam's: the weight_decay 0.1 of its group 0 goes into the gradients",
        ),
        (stepped(torch.optim.SGD), "is no AdamW's: its group 0 has no betas, eps"),
        (
            stepped(torch.optim.NAdam),
            r"\['state'\]\[0\] must have step, exp_avg, exp_avg_sq and nothing else, got .*mu",
        ),
        (stepped(torch.optim.Adamax), r"\['state'\]\[0\] must have step, exp_avg, exp_avg_sq and nothing else, got "),
        (
            changed("exp_avg", torch.zeros(1)),
            r"\[1\]\['exp_avg'\] must have the shape of its parameter, \(17,\), got \(1,\)",
        ),
        (changed("exp_avg_sq", torch.zeros(())), r"\['exp_avg_sq'\] must have the shape .*, \(17,\), got \(\)"),
        (changed("exp_avg", torch.zeros(17, dtype=torch.int64)), "a tensor of floating-point numbers, got torch.int64"),
        (changed("exp_avg", 0.0), "a tensor of floating-point numbers, got float"),
        (changed("step", torch.tensor(-5.0)), r"\['step'\] must be a whole number >= 0, got -5.0"),
        (changed("step", float("nan")), r"\['step'\] must be a whole number >= 0, got nan"),
        (changed("step", torch.ones(17)), r"\['step'\] must be 1-element, got shape \(17,\)"),
        ({"model": {}, "optimizer": {}}, "must have the keys state and param_groups, got model, optimizer"),
        ({"state": {}, "param_groups": []}, "different number of parameter groups"),
    ],
)
def test_state_of_another_kind_is_refused(saved: dict, words: str) -> None:
    """In one sentence, and nothing of it is taken over."""
    params = parameters()
    optimizer = AdamW(params, lr=0.5)
    set_grads(params, 1)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][i][k], t) for i, s in before["state"].items() for k, t in s.items())


def test_state_of_adam_without_decay_is_taken() -> None:
    """Without decay both are one algorithm."""
    optimizer = AdamW(parameters())
    optimizer.load_state_dict(stepped(torch.optim.Adam))
    assert optimizer.param_groups[0]["weight_decay"] == 0
    assert optimizer.state_dict()["param_groups"][0]["decoupled_weight_decay"] is True


def test_hooks_around_loading() -> None:
    """What a hook before loading returns is what is loaded; a hook after it has the last word."""
    params = parameters(torch.bfloat16)
    optimizer, saved = AdamW(params), stepped(AdamW)
    doubled = copy.deepcopy(saved)
    for state in doubled["state"].values():
        state["exp_avg"] *= 2
    optimizer.register_load_state_dict_pre_hook(lambda _, __: doubled)
    optimizer.register_load_state_dict_post_hook(lambda o: o.state[params[1]]["step"].fill_(7))
    optimizer.load_state_dict({})
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], 2 * saved["state"][0]["exp_avg"])
    assert [optimizer.state[p]["step"] for p in params] == [1, 7, 1, 1, 1]


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


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_keep_their_settings(copied) -> None:
    """A copy goes on as its original does, with parameters of its own."""
    params = parameters()
    original = AdamW(params, max_norm=2.0, backend="cpu")
    set_grads(params, 0)
    original.step()
    optimizer = copied(original)
    assert (optimizer.max_norm, optimizer.backend, optimizer.skipped_steps) == (2.0, "cpu", 0)
    theirs = optimizer.param_groups[0]["params"]
    for several in (params, theirs):
        set_grads(several, 1)
    original.step()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, theirs, strict=True))


def test_the_constructor_is_torchs() -> None:
    """The same names, defaults and positions; what is ours alone comes by name."""
    theirs = inspect.signature(torch.optim.AdamW).parameters
    ours = inspect.signature(AdamW).parameters
    positions = [[p.name for p in both.values() if p.kind is p.POSITIONAL_OR_KEYWORD] for both in (theirs, ours)]
    assert positions[0] == positions[1]
    assert {name: p.default for name, p in theirs.items()} == {name: ours[name].default for name in theirs}
    groups = [type_(parameters()).state_dict()["param_groups"][0] for type_ in (torch.optim.AdamW, AdamW)]
    assert groups[0] == groups[1]


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True},
        {"fused": False, "foreach": True},
        {"foreach": False, "capturable": True},
        {"amsgrad": False, "differentiable": False},
        {"lr": torch.tensor(1e-3)},
        {"lr": torch.tensor([1e-3], dtype=torch.float64), "foreach": True},
        {"betas": (torch.tensor([0.9], dtype=torch.float64), torch.tensor(0.999, dtype=torch.float64))},
    ],
)
def test_options_that_change_nothing(options: dict) -> None:
    params, plain = parameters(), parameters()
    for several, optimizer in ((params, AdamW(params, **options)), (plain, AdamW(plain))):
        set_grads(several, 0)
        optimizer.step()
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-10)


def test_groups_are_added_whole_or_not_at_all() -> None:
    params = parameters()
    optimizer = AdamW(params[:2])
    for wrong, words in (
        ({"params": params[2:], "amsgrad": True}, "amsgrad=True is not supported"),
        ({"params": params[2:], "lr": -1.0}, "lr must be a finite number >= 0, got -1.0"),
        ({"params": [params[2], params[3], params[2]]}, r"params\[2\] of a parameter group is params\[0\] again"),
        ({"params": params[1:]}, "some parameters appear in more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=words), pytest.warns() if "again" in words else contextlib.nullcontext():
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    set_grads(params, 0)
    optimizer.step()
    assert len(optimizer.state) == len(params)


def test_hooks_around_a_step_and_a_grad_scaler() -> None:
    """A scaler that finds an infinity leaves the step out; hooks are called around those that are made."""
    params = parameters()
    optimizer, calls = AdamW(params, fused=True), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plain = parameters()
    set_grads(params, 0, scale=4.0)
    set_grads(plain, 0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()
    AdamW(plain).step()
    assert calls == ["before", "after"]
    torch.testing.assert_close(params, plain)
    params[1].grad[3] = torch.inf
    scaler.step(optimizer)
    assert calls == ["before", "after"]


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
        ({"amsgrad": True}, "amsgrad=True is not supported by this AdamW, only False: the largest second moment"),
        ({"differentiable": True}, "differentiable=True is not supported by this AdamW, only False: the step has no"),
        ({"lr": torch.ones(2)}, r"Tensor lr must be 1-element, got shape \(2,\)"),
        ({"lr": torch.ones(1), "capturable": True}, "lr as a Tensor is not supported for capturable=True"),
        ({"betas": (torch.ones(2), 0.9)}, r"Tensor betas\[0\] must be 1-element, got shape \(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            AdamW([p], **arguments)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        AdamW([p], fused=True, foreach=True)


@pytest.mark.parametrize("backend", ["cpu", "emulated"])
def test_shared_memory_is_refused(backend: str) -> None:
    """Several threads would write to it at once."""
    buffer = torch.ones(12)
    for params in ((buffer, buffer[:5]), (buffer[:7], buffer[6:]), (buffer[5:], buffer[:6])):
        optimizer = AdamW([torch.nn.Parameter(p) for p in params], backend=backend)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="must not share memory, as one of them is written to"):
            optimizer.step()
        assert torch.equal(buffer, torch.ones(12))
    beside = AdamW([torch.nn.Parameter(p) for p in (buffer[6:], buffer[:6])], backend=backend)
    for p in beside.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    beside.step()
    assert (buffer < 1).all()


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
        ({"exp_avgs": [X], "exp_avg_sqs": [X]}, "must be tensors of their own, one is given twice"),
    ],
)
def test_bad_input(change: dict, words: str) -> None:
    lists = {name: [torch.zeros(3)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises((TypeError, ValueError), match=words):
        grokkernels.adamw(**{**lists, "steps": [torch.zeros(())], **change})


@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton", "reference"])
def test_tensors_that_share_memory(backend: str) -> None:
    """An element updated twice, or read as a gradient while it is updated, is refused before anything is written."""
    memory = torch.arange(100.0)
    lists = [memory[0:10], memory[10:20], memory[20:30], memory[30:40]]
    other = [memory[40:50], memory[50:60], memory[60:70], memory[70:80]]
    for shared in (0, 1, 2, 3):
        clash = list(other)
        clash[shared] = memory[5:15] if shared == 1 else memory[25:35]
        before = memory.clone()
        steps = [torch.tensor(0.0), torch.tensor(0.0)]
        with pytest.raises((ValueError, RuntimeError), match=r"must not share memory, as .* is written to"):
            adamw(*([one, two] for one, two in zip(lists, clash, strict=True)), steps, backend=backend)
        assert torch.equal(memory, before)
    step = torch.tensor(0.0)
    with pytest.raises((ValueError, RuntimeError), match=r"steps.0. and steps.1. must not share memory"):
        adamw(*([one, two] for one, two in zip(lists, other, strict=True)), [step, step.view(())], backend=backend)
    adamw(*([one, two] for one, two in zip(lists, other, strict=True)), [step, step.clone()], backend=backend)
