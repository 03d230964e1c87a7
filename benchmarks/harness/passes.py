"""From a function of tensors to the call that is timed: forward alone, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness.peers import Absent
from grokkernels.testing import judge

DIRECTIONS = ("forward", "forward + backward")
DTYPES = (torch.float32, torch.bfloat16)


def forward_or_both(
    function: Callable[..., Any] | Absent, tensors: Sequence[torch.Tensor], direction: str
) -> Callable[[], Any] | Absent:
    """The call: what `function` gives, or the gradients of all `tensors` from a cotangent of ones and minus ones."""
    if isinstance(function, Absent):
        return function
    if direction == "forward":
        return lambda: function(*tensors)
    leaves = [tensor.detach().clone().requires_grad_(True) for tensor in tensors]
    cotangents: list[torch.Tensor] = []

    def call() -> tuple[torch.Tensor, ...]:
        outputs = [out for out in judge.tensors_of(function(*leaves)) if out.requires_grad]
        if not cotangents:
            generator = torch.Generator().manual_seed(0)
            cotangents.extend(
                torch.randint(0, 2, out.shape, generator=generator).mul(2).sub(1).to(out.device, out.dtype)
                for out in outputs
            )
        return torch.autograd.grad(outputs, leaves, cotangents)

    return call
