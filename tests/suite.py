"""What every op is held to, written once: a test file names its case table and inherits these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from grokkernels import dispatch, native
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.fences import LAYOUTS


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


def smallest_tensor(case: Case) -> int:
    """The elements of the smallest tensor among a case's arguments."""
    return min(value.numel() for value in case.arguments().values() if isinstance(value, torch.Tensor))


class CaseTableTests:
    """The float64 rule, layouts, opcheck and torch.compile over one case table."""

    table: ClassVar[Table]

    def test_float64_rule(self, case: Case, dtype: torch.dtype, backend: Backend) -> None:
        with backend.active() as name:
            verdict = judge.judge(self.table, case, dtype, name)
        assert verdict.passed, f"{verdict.where}: {verdict.ratio:.3g} times what the float64 rule allows"

    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "fenced"])
    def test_layouts(self, case: Case, layout: str) -> None:
        verdict = judge.judge(self.table, case, torch.float32, "cpu", layout=layout)
        assert verdict.passed, f"{verdict.where}: {verdict.ratio:.3g} times what the float64 rule allows"

    @pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "fenced"])
    def test_layouts_on_triton(self, layout: str) -> None:
        """On the two smallest cases that have elements: the launchers ask for contiguous tensors in one way for all."""
        sizes = {case: smallest_tensor(case) for case in self.table.cases}
        for case in sorted((c for c in sizes if sizes[c] > 1), key=sizes.__getitem__)[:2]:
            verdict = judge.judge(self.table, case, torch.float32, "triton", layout=layout)
            assert verdict.passed, f"{case.name}, {verdict.where}: {verdict.ratio:.3g} times what the rule allows"

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


def _with_grad(function: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as leaves; floating tensors ask for gradients where the function has a derivative."""
    differentiable = dispatch.FUNCTIONS[function.name().split("::")[1].split(".")[0]].differentiable

    def leaf(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [leaf(part) for part in value]
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().clone().requires_grad_(differentiable and value.is_floating_point())

    return tuple(leaf(value) for value in args)
