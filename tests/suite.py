"""What every op is held to, written once: a test file names its case table and inherits these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from grokkernels import dispatch, native
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.fences import APART, LAYOUTS, SHARING, Fence, held, layout_of


@dataclass(frozen=True)
class Backend:
    """A backend to test, at a given CPU level or as a given architecture."""

    name: str
    level: str | None = None

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name}-{self.level}"

    @contextmanager
    def active(self) -> Iterator[str]:
        with judge.at_level(self.level):
            yield self.name


def backends(table: Table) -> list[Backend]:
    """Every backend that judges this table here: the CPU one once per level that the machine has, the emulated one once
    per architecture that has kernels of its own, Triton's (interpreted where there is no GPU), and the CUDA one where
    there is a GPU."""
    names = ["cpu"]
    if "cuda" in dispatch.ROWS[table.name].supports:
        names += ["emulated", *(["cuda"] if native.cuda is not None and torch.cuda.is_available() else [])]
    if "triton" in dispatch.ROWS[table.name].supports:
        names.append("triton")
    return [Backend(name, level) for name in names for level in judge.levels(table, name)]


def cpu_backends() -> list[Backend]:
    """The CPU backend at every level that this machine has."""
    assert native.module is not None, native.load_error
    return [Backend("cpu", level) for level in native.module.cpu_levels()]


class _Recorder(TorchDispatchMode):
    """Keeps the native functions called inside, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "grokkernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def native_calls(function: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The calls of torch.ops.grokkernels.* that `function` makes, its backward pass included."""
    with _Recorder() as recorder:
        function()
    return recorder.calls


def tensors_among(value: Any) -> list[torch.Tensor]:
    """The tensors in the arguments of a native function, in order."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_among(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def called_with_one_misaligned(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], which: int | None
) -> list[torch.Tensor]:
    """What a native function returns and what it leaves in its arguments, copies of which lie between fences; number
    `which` of the tensors is misaligned."""
    tensors = {str(i): tensor for i, tensor in enumerate(tensors_among(args))}
    fence = Fence(tensors, {} if which is None else {str(which): "misaligned"})
    placed = iter(fence.arguments.values())

    def replaced(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [replaced(part) for part in value]
        return next(placed) if isinstance(value, torch.Tensor) else value

    with judge.nan_outputs():
        results = function(*replaced(args), **kwargs)
    mutable = function._schema.is_mutable
    assert fence.intact() != mutable or not tensors
    return [*judge.tensors_of(results), *(fence.arguments.values() if mutable else ())]


def smallest_tensor(case: Case) -> int:
    """The elements of the smallest tensor among a case's arguments."""
    return min(value.numel() for value in case.arguments().values() if isinstance(value, torch.Tensor))


def called(
    table: Table, arguments: dict[str, Any], backend: str, layout: str, dense: bool
) -> list[torch.Tensor | None]:
    """Outputs and gradients of a call in a layout, or of the same numbers in dense tensors."""

    def values(name: str, value: Any) -> Any:
        return held(value, layout_of(layout, name)) if isinstance(value, torch.Tensor) else value

    fence = Fence({name: values(name, value) for name, value in arguments.items()}, "fenced" if dense else layout)
    outputs, gradients, _ = judge.run(
        lambda **kw: table.op(**kw, backend=backend),
        fence.arguments,
        table.grad,
        None,
        lambda name, cotangent: fence.place(name, values(name, cotangent)),
    )
    assert fence.intact()
    return [*outputs, *gradients]


def device_cases(table: Table) -> list[Case]:
    """The smallest case that has elements, and the smallest whose rows are whole vectors of every dtype."""

    def floats(case: Case) -> list[torch.Tensor]:
        return [t for t in case.arguments().values() if isinstance(t, torch.Tensor) and t.is_floating_point()]

    sizes = {case: sum(t.numel() for t in floats(case)) for case in table.cases if smallest_tensor(case) > 1}
    ordered = sorted(sizes, key=sizes.__getitem__)
    whole = (case for case in ordered if all(t.shape[-1] % 8 == 0 for t in floats(case) if t.dim() > 1))
    return list(dict.fromkeys([ordered[0], next(whole, ordered[0])]))


class CaseTableTests:
    """The float64 rule, layouts, opcheck and torch.compile over one case table."""

    table: ClassVar[Table]

    def test_float64_rule(self, case: Case, dtype: torch.dtype, backend: Backend) -> None:
        with backend.active() as name:
            verdict = judge.judge(self.table, case, dtype, name)
        assert verdict.passed, f"{verdict.where}: {verdict.ratio:.3g} times what the float64 rule allows"

    @pytest.mark.parametrize("layout", [layout for layout in APART if layout not in ("fenced", "misaligned")])
    def test_layouts(self, case: Case, layout: str) -> None:
        verdict = judge.judge(self.table, case, torch.float32, "cpu", layout=layout)
        assert verdict.passed, f"{verdict.where}: {verdict.ratio:.3g} times what the float64 rule allows"

    def test_shared_layouts(self, case: Case) -> None:
        """Each case in one of the layouts that are read like others and only reach elsewhere."""
        layouts = ("misaligned", *SHARING)
        layout = layouts[self.table.cases.index(case) % len(layouts)]
        verdict = judge.settled(self.table, case, torch.float32, "cpu", layout)
        assert verdict.passed, f"{layout}, {verdict.where}: {verdict.ratio:.3g} times what the float64 rule allows"

    def test_layouts_on_devices(self, device: Backend) -> None:
        """The smallest case, and the smallest in whole vectors, in every layout: as the same numbers without gaps."""
        hopper = device.level == "sm_90"
        dtype = torch.bfloat16 if hopper else torch.float32
        *small, whole = device_cases(self.table)
        for cases, layouts in ((small, APART[1:]), ([whole], ("misaligned", "expanded") if hopper else LAYOUTS[1:])):
            for case, layout in product([] if hopper and cases is small else cases, layouts):
                arguments = judge.in_dtype(case.arguments(), dtype)
                with device.active() as name:
                    got, expected = (called(self.table, arguments, name, layout, dense) for dense in (False, True))
                for one, other in zip(got, expected, strict=True):
                    torch.testing.assert_close(one, other, equal_nan=True, msg=lambda m, at=layout: f"{at}: {m}")

    def test_each_tensor_misaligned(self, emulated: Backend) -> None:
        """Every tensor that a native function is given, what the forward pass keeps among them, begins between two
        vectors while the others do not: a kernel looks at each before it reads vectors. (Triton's compiler does so.)"""
        dtype = torch.bfloat16 if emulated.level == "sm_90" else torch.float32
        with emulated.active() as name:
            for case in device_cases(self.table):
                arguments = judge.in_dtype(case.arguments(), dtype)
                calls = native_calls(
                    lambda given=arguments: judge.run(
                        lambda **kw: self.table.op(**kw, backend=name), given, self.table.grad, None
                    )
                )
                for function, args, kwargs in calls:
                    expected = called_with_one_misaligned(function, args, kwargs, None)
                    for i in range(len(tensors_among(args))):
                        got = called_with_one_misaligned(function, args, kwargs, i)
                        for one, other in zip(got, expected, strict=True):
                            torch.testing.assert_close(one, other, equal_nan=True)

    def test_reference_is_an_oracle(self, case: Case) -> None:
        """In float64 the reference answers in float64 (what is float32 by contract stays so)."""
        outputs, _, _ = judge.run(self.table.reference, judge.in_float64(case.arguments()), self.table.grad, None)
        assert all(out.dtype == torch.float64 for out in outputs if out.is_floating_point())

    def test_opcheck(self, case: Case) -> None:
        """PyTorch's own checks of schema, shape function, autograd registration and AOT dispatch, on every native
        function that the case reaches."""
        arguments = judge.in_dtype(case.arguments(), torch.float32)
        calls = native_calls(
            lambda: judge.run(lambda **kw: self.table.op(**kw, backend="cpu"), arguments, self.table.grad, None)
        )
        for function, args, kwargs in calls:
            torch.library.opcheck(function, _with_grad(function, args), kwargs)

    def test_compile(self, case: Case) -> None:
        """torch.compile(fullgraph=True) traces the public function and changes nothing, gradients included."""
        torch._dynamo.reset()
        arguments = judge.in_dtype(case.arguments(), torch.float32)
        compiled = torch.compile(self.table.op, fullgraph=True, backend="aot_eager")
        eager_out, eager_grad, cotangents = judge.run(self.table.op, arguments, self.table.grad, None)
        out, grad, _ = judge.run(compiled, arguments, self.table.grad, cotangents)
        for one, other in zip([*eager_out, *eager_grad], [*out, *grad], strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)

    def test_forward_mode_is_refused(self, column: str) -> None:
        """A tangent is never dropped: there is no forward-mode derivative, and the call says so."""
        arguments, wanted = plain_arguments(self.table)
        floats = [k for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
        for name in wanted or floats:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
                with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                    self.table.op(**{**arguments, name: dual}, backend=column)

    def test_second_derivative_is_right_or_refused(self, column: str) -> None:
        """No term of it is dropped: it is the reference's, or an error."""
        arguments, wanted = plain_arguments(self.table)
        expected = _second_derivative(self.table.reference, arguments, wanted)
        try:
            got = _second_derivative(lambda **kw: self.table.op(**kw, backend=column), arguments, wanted)
        except NotImplementedError as error:
            assert f"{self.table.name.removesuffix('_varlen')} has no second derivative" in str(error)  # noqa: PT017
        else:
            torch.testing.assert_close(got, expected)

    def test_gradients_per_sample(self, column: str) -> None:
        """torch.vmap over torch.func.grad gives what a loop over autograd gives."""
        call = _Batch(self.table, column)
        if call.places:
            torch.testing.assert_close(vmap(grad(call.loss, call.places))(*call.both), call.loop(call.in_dims))
        else:  # it writes into its arguments
            with pytest.raises(RuntimeError, match="Batching rule"):
                vmap(call.loss)(*call.both)

    def test_transforms(self) -> None:
        """So it does where some arguments are the same for all samples, and with the gradient taken outside."""
        call = _Batch(self.table, "cpu")
        for place in call.places:
            in_dims = tuple(0 if i == place else None for i in range(len(call.both)))
            given = [both if dim == 0 else both[0] for both, dim in zip(call.both, in_dims, strict=True)]
            loop = call.loop(in_dims)
            torch.testing.assert_close(vmap(grad(call.loss, call.places), in_dims)(*given), loop)
            summed = [part if i == place else part.sum(0) for part, i in zip(loop, call.places, strict=True)]
            outside = grad(lambda *given: vmap(call.loss, in_dims)(*given).sum(), call.places)  # noqa: B023
            torch.testing.assert_close(list(outside(*given)), summed)

    @pytest.mark.parametrize("kind", ["meta", "fake"])
    def test_shapes_alone(self, kind: str) -> None:
        """Tensors without numbers: outputs and gradients have the shapes and dtypes of real ones."""
        arguments, wanted = plain_arguments(self.table)
        for given in (arguments, judge.in_float64(arguments)):  # the latter on the reference
            real_out, real_grad, _ = judge.run(self.table.op, given, wanted, None)
            mode = FakeTensorMode()
            move = mode.from_tensor if kind == "fake" else lambda tensor: tensor.to("meta")
            shapes = {name: move(v) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
            leaves = [shapes[name].requires_grad_() for name in wanted]
            with mode if kind == "fake" else nullcontext():
                out = judge.tensors_of(self.table.op(**shapes))
                gradient = torch.autograd.grad(_loss(out), leaves) if leaves else []
            for got, real in zip([*out, *gradient], [*real_out, *real_grad], strict=True):
                assert (got.shape, got.dtype) == (real.shape, real.dtype)


class _Batch:
    """Two samples of an op's plain arguments, stacked; a loss of one sample, and its gradients in a loop."""

    def __init__(self, table: Table, column: str) -> None:
        self.table, self.column = table, column
        samples = [plain_arguments(table, draw)[0] for draw in range(2)]
        self.rest = samples[0]
        self.names = [name for name, value in samples[0].items() if isinstance(value, torch.Tensor)]
        self.places = tuple(self.names.index(name) for name in plain_arguments(table)[1])
        self.both = [torch.stack([sample[name] for sample in samples]) for name in self.names]
        self.in_dims = (0,) * len(self.both)

    def loss(self, *tensors: torch.Tensor) -> torch.Tensor:
        given = {**self.rest, **dict(zip(self.names, tensors, strict=True))}
        return _loss(judge.tensors_of(self.table.op(**given, backend=self.column)))

    def loop(self, in_dims: tuple[int | None, ...]) -> tuple[torch.Tensor, ...]:
        """The gradients of each sample; an argument whose dim is None is the first sample's for all."""
        rows = []
        for i in range(2):
            leaves = [both[0 if dim is None else i].clone() for both, dim in zip(self.both, in_dims, strict=True)]
            wanted = [leaves[place].requires_grad_() for place in self.places]
            rows.append(torch.autograd.grad(self.loss(*leaves), wanted))
        return tuple(torch.stack(pair) for pair in zip(*rows, strict=True))


@cache
def _plain_case(table: Table) -> tuple[Case, tuple[str, ...]]:
    """The smallest case whose outputs are finite and whose gradients are not all zero; the arguments that have them."""

    def size(case: Case) -> int:
        return sum(value.numel() for value in case.arguments().values() if isinstance(value, torch.Tensor))

    for case in sorted((case for case in table.cases if smallest_tensor(case)), key=size):
        arguments = judge.in_dtype(case.arguments(), torch.float32)
        wanted = tuple(name for name in table.grad if isinstance(arguments.get(name), torch.Tensor))
        outputs, gradients, _ = judge.run(table.reference, arguments, wanted, None)
        if all(out.isfinite().all() for out in outputs) and all(g is not None and g.any() for g in gradients):
            return case, wanted
    raise AssertionError(f"{table.name} has no case with a gradient everywhere")


def plain_arguments(table: Table, draw: int = 0) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Arguments in float32 of a small case where every gradient is there, and the names of those that have one."""
    case, wanted = _plain_case(table)
    return judge.in_dtype(case.arguments(draw), torch.float32), wanted


def _loss(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A number that depends on every output, and not linearly: each gradient is nobody's constant."""
    floats = [out for out in outputs if out.is_floating_point()]
    return sum((out.square() * (i + 1)).sum() for i, out in enumerate(floats))


def _second_derivative(function: Callable[..., Any], arguments: dict[str, Any], wanted: tuple[str, ...]) -> Any:
    """The gradient of a penalty on the gradients; nothing where there are none."""
    leaves = {name: arguments[name].clone().requires_grad_() for name in wanted}
    loss = _loss(judge.tensors_of(function(**{**arguments, **leaves})))
    if not wanted:
        return loss.requires_grad
    first = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
    return torch.autograd.grad(_loss(first), list(leaves.values()), allow_unused=True)


def _with_grad(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as leaves; floating tensors ask for gradients where the function has a derivative."""
    native = dispatch.FUNCTIONS[function.name().split("::")[1].split(".")[0]]

    def leaf(value: Any, name: str) -> Any:
        if isinstance(value, (list, tuple)):
            return [leaf(part, name) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        wanted = native.differentiable and name not in native.constants and value.is_floating_point()
        return value.detach().clone().requires_grad_(wanted)

    return tuple(leaf(value, argument.name) for value, argument in zip(args, function._schema.arguments, strict=False))
