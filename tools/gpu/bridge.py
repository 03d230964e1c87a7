"""A plugin of pytest by which tests written for CPU tensors ask the kernels of a GPU.

tests/ops hands CPU tensors to the backends `emulated` and `triton`. Here `.emulated` is answered by the CUDA column and
`.triton` by the kernels that Triton compiled, each on copies in the GPU's memory; what they wrote comes back. A copy
has the strides and the misalignment of what it was made from.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from grokkernels import dispatch, native
from grokkernels import triton as triton_column

# Where the kernels are; "cpu" lets the CPU column answer, for a test of this file.
HOME = os.environ.get("GROKKERNELS_BRIDGE", "cuda")


def moved(tensor: torch.Tensor, home: str) -> torch.Tensor:
    """A copy on a device that lies there as the tensor does here."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=home)
    span = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr() % 16 // tensor.element_size()
    memory = torch.empty(first + span, dtype=tensor.dtype, device=home)
    memory[first:].copy_(tensor.as_strided((span,), (1,), tensor.storage_offset()))
    return memory.as_strided(tensor.shape, tensor.stride(), first)


def across(function: Callable[..., Any], schema: torch._C.FunctionSchema, home: str) -> Callable[..., Any]:
    """`function`, called with copies on the device; arguments that the schema says it writes are written here too."""

    def call(*args: Any) -> Any:
        there = [_each(value, lambda t: moved(t, home)) for value in args]
        result = function(*there)
        for argument, mine, theirs in zip(schema.arguments, args, there, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                _written_back(mine, theirs)
        return _each(result, lambda t: t.cpu())

    return call


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(part, change) for part in value)
    return value


def _written_back(mine: Any, theirs: Any) -> None:
    if isinstance(mine, torch.Tensor):
        mine.copy_(theirs)
    elif isinstance(mine, (list, tuple)):
        for one, other in zip(mine, theirs, strict=True):
            _written_back(one, other)


class _Stand:
    """What tests ask of the emulated device, as far as a GPU has an answer: launches are counted, schedules and the
    number of multiprocessors are its own, bank conflicts are not seen."""

    def __init__(self) -> None:
        self._launches: Counter[str] = Counter()

    def _note(self, name: str, *shape: object) -> bool:
        self._launches[name] += 1
        return True

    def reset_counters(self) -> None:
        self._launches.clear()
        if native.cuda is not None:
            native.cuda.set_watch(self._note)

    def counters(self) -> dict[str, int]:
        return {"launches": self._launches.total(), "bank_conflicts": 0, "blocks": 1, "matrix_multiplies": 1}

    def architecture(self) -> int:
        return 80

    def seed(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("set_"):
            return lambda *values: None
        raise AttributeError(f"a GPU has no '{name}'")


def pytest_configure(config: object) -> None:
    """Puts the bridge in place: once, for the whole process."""
    assert native.emulated is None, "the emulated device is loaded: `.emulated` has its own kernels"
    native.emulated = _Stand()  # type: ignore[assignment]
    library = torch.library.Library("grokkernels", "IMPL")
    pytest_configure.library = library  # type: ignore[attr-defined]  (what it registers lasts as long as it does)
    for name in dispatch.FUNCTIONS:
        overloads = getattr(torch.ops.grokkernels, name)
        if "emulated" in overloads.overloads():
            library.impl(f"{name}.emulated", across(overloads.native, overloads.emulated._schema, HOME), "CPU")
    if HOME == "cpu":
        return
    launcher = triton_column.launcher

    def bridged(op: str, function: str) -> Callable[..., Any]:
        schema = getattr(torch.ops.grokkernels, function).triton._schema
        return across(launcher(op, function), schema, HOME)

    triton_column.launcher = bridged  # type: ignore[assignment]
    triton_column.device_reason = lambda device: None  # type: ignore[assignment]
