"""From functions of tensors to the calls that are timed: forward alone, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness.peers import Absent
from grokkernels.testing import judge

FORWARD, BOTH = DIRECTIONS = ("forward", "forward + backward")
DTYPES = (torch.float32, torch.bfloat16)


def calls(
    functions: Mapping[str, Callable[..., Any] | Absent], tensors: Sequence[torch.Tensor], direction: str
) -> dict[str, Callable[[], Any] | Absent]:
    """Each contender's call on the same tensors."""
    return {name: call(function, tensors, direction) for name, function in functions.items()}


def call(
    function: Callable[..., Any] | Absent, tensors: Sequence[torch.Tensor], direction: str
) -> Callable[[], Any] | Absent:
    """What `function` gives, or the gradients of all `tensors` from a cotangent of ones and minus ones."""
    if isinstance(function, Absent):
        return function
    if direction == FORWARD:
        return lambda: function(*tensors)
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in tensors]
    cotangents: list[torch.Tensor] = []

    def both() -> tuple[torch.Tensor, ...]:
        outputs = [out for out in judge.tensors_of(function(*leaves)) if out.requires_grad]
        if not cotangents:
            generator = torch.Generator().manual_seed(0)
            drawn = (torch.randint(0, 2, out.shape, generator=generator, device="cpu") for out in outputs)
            signs = (ones.mul(2).sub(1) for ones in drawn)
            cotangents.extend(sign.to(out.device, out.dtype) for sign, out in zip(signs, outputs, strict=True))
        return torch.autograd.grad(outputs, leaves, cotangents)

    return both


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
