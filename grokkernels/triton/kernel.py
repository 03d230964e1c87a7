"""`@kernel`: triton.jit with the habits of this column, and the one door through which every launch goes.

- Integers and floats are annotated (`rows: tl.int64`, `eps: tl.float32`) and never specialised on their values: a
  kernel is compiled once per dtype, per `tl.constexpr` and per alignment of its pointers, whatever the lengths.
  Widths of a model (C, D, E) are constexpr, numbers of tokens never.
- `PRECISION`, where a kernel has it, is filled in: how float32 operands of `tl.dot` are multiplied so that float32
  means float32 (three tf32 products on NVIDIA, exact elsewhere).
- Inside `executing(function)` launches go to `function` instead: tests run them as PTX, tools compile them ahead of
  time for GPUs that are not there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from grokkernels.triton import INTERPRETED, interpreter, untested

if INTERPRETED:
    interpreter.mend()
if (words := untested()) is not None:
    warnings.warn(words, stacklevel=1)

# Options of a launch that are the compiler's, not the kernel's.
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
# Those of every launch: a * b + c may round once. (Said aloud because releases of Triton differ in what they assume.)
ALWAYS = {"enable_fp_fusion": True}
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """One launch: which kernel, how many programs, its arguments by name (constexpr among them), compiler options."""

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def signature(self) -> dict[str, str]:
        """The type of each parameter as the compiler knows it: "*bf16", "i64", "constexpr"."""
        return {name: self._type(name, value) for name, value in self.arguments.items()}

    def _type(self, name: str, value: Any) -> str:
        if value is None or name in self.kernel.constexprs:
            return "constexpr"
        if isinstance(value, torch.Tensor):
            return "*" + TYPES[value.dtype]
        return self.kernel.annotations[name]

    def aligned(self) -> list[str]:
        """The pointers on 16-byte boundaries; a tensor without memory ("meta") counts as one that has it."""
        pointers = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        return [name for name, value in pointers.items() if value.is_meta or value.data_ptr() % 16 == 0]


Executor = Callable[[Launch], None]
_executor: Executor | None = None


def executor() -> Executor | None:
    """What launches go to instead of a device; None outside `executing`."""
    return _executor


@contextmanager
def executing(function: Executor) -> Iterator[None]:
    """Every launch goes to `function` inside."""
    global _executor
    before, _executor = _executor, function
    try:
        yield
    finally:
        _executor = before


@dataclass(frozen=True, eq=False)
class Kernel:
    """A Triton kernel; `kernel[grid](...)` launches it."""

    jit: Any
    parameters: tuple[str, ...]
    annotations: dict[str, str]
    constexprs: frozenset[str]

    @property
    def name(self) -> str:
        return self.jit.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.launch(grid, *arguments, **named)

    def launch(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        if 0 in grid:
            return
        options = {key: named.pop(key) for key in OPTIONS if key in named}
        values = {**dict(zip(self.parameters, arguments, strict=False)), **named}
        if "PRECISION" in self.constexprs:
            values["PRECISION"] = "tf32x3" if torch.version.hip is None else "ieee"
        if values.keys() != set(self.parameters):
            raise TypeError(f"{self.name} is launched with {sorted(values.keys() ^ set(self.parameters))} amiss")
        if _executor is not None:
            ordered = {name: values[name] for name in self.parameters}
            _executor(Launch(self, grid, ordered, options))
            return
        device = next(value.device for value in values.values() if isinstance(value, torch.Tensor))
        if device.type == "cpu":
            self.jit[grid](**values, **options)
            return
        with torch.device(device), getattr(torch, device.type).device(device):
            triton.set_allocator(_scratch)
            self.jit[grid](**values, **options, **ALWAYS)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Global memory for tensor descriptors made inside a kernel."""
    return torch.empty(size, dtype=torch.int8)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorates a kernel."""
    parameters = tuple(function.__code__.co_varnames[: function.__code__.co_argcount])
    annotations = {name: str(word).removeprefix("tl.") for name, word in function.__annotations__.items()}
    constexprs = frozenset(name for name, word in annotations.items() if word == "constexpr")
    canonical = {name: triton.runtime.jit._normalize_ty(word) for name, word in annotations.items()}
    numbers = [name for name in parameters if name in annotations and name not in constexprs]
    unknown = [name for name in parameters if name not in annotations and not name.endswith("_ptr")]
    if unknown:
        raise TypeError(
            f"{function.__name__}: {unknown} are no pointers (x_ptr) and have no type, as in `rows: tl.int64`"
        )
    jit = triton.jit(function, do_not_specialize=numbers)
    return Kernel(jit, parameters, {name: canonical[name] for name in numbers}, constexprs)
