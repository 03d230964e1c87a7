"""What a case is: arguments for an op, made from a seed, with the reason for their sizes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any

import torch

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    `build(generator)` returns the keyword arguments. A float64 tensor among them stands for "in the dtype under
    test" and is rounded to it; a float32 tensor is float32 in every run (weights of a gate, rotary tables, an lse);
    integer tensors and plain values pass as they are. `call` is the `builder` that made the case, and with what.
    """

    name: str
    build: Callable[[torch.Generator], Arguments]
    why: str = ""
    call: tuple[Callable[..., Case], tuple[Any, ...], dict[str, Any]] | None = field(default=None, compare=False)

    def arguments(self, draw: int = 0) -> Arguments:
        """The arguments, the same on every call; another `draw` has other numbers of the same kind."""
        return self.build(torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + draw))


def builder(function: Callable[..., Case]) -> Callable[..., Case]:
    """Decorates what makes cases from sizes and options: others, like those in the table, can be drawn from it."""

    @wraps(function)
    def build(*sizes: Any, **options: Any) -> Case:
        return replace(function(*sizes, **options), call=(build, sizes, options))

    return build


@dataclass(frozen=True)
class Table:
    """The cases of one op, and how to call and judge it.

    `grad` names the arguments whose gradients are judged. `op` takes `backend=`, `reference` does not.
    `architectures` are those for which the CUDA column has kernels of their own.
    """

    op: Callable[..., Any]
    reference: Callable[..., Any]
    grad: tuple[str, ...]
    cases: tuple[Case, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    architectures: tuple[str, ...] = ("sm_80",)

    @property
    def name(self) -> str:
        return self.op.__name__

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        assert len(names) == len(set(names)), f"{self.name}: two cases share a name"


def normal(
    generator: torch.Generator, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Normal numbers in float64 (see Case), or in float32 where the argument always is."""
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * std).to(dtype)
