"""Inputs between fences: the memory before and after each tensor is NaN, and must be so afterwards."""

from __future__ import annotations

import torch

from grokkernels.testing.case import Arguments

LAYOUTS = ("fenced", "padded_rows", "strided", "transposed")
_MARGIN = 64  # elements on either side: a cache line and more, so that a vector load past the end meets NaN


def _poison(numel: int, like: torch.Tensor, device: str) -> torch.Tensor:
    if like.is_floating_point():
        return torch.full((numel,), float("nan"), dtype=like.dtype, device=device)
    if like.dtype == torch.bool:
        return torch.ones(numel, dtype=torch.bool, device=device)
    return torch.full((numel,), torch.iinfo(like.dtype).max, dtype=like.dtype, device=device)


class Fence:
    """Copies of the tensor arguments laid into poisoned memory of a device.

    layout: "fenced" is contiguous; "padded_rows" leaves poison between the rows of the last dim; "strided" leaves
    poison between any two elements; "transposed" stores the dims in reverse order (tensors of two dims and more).
    """

    def __init__(self, arguments: Arguments, layout: str = "fenced", device: str = "cpu") -> None:
        self._device = device
        self.arguments: Arguments = {}
        self._memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, value in arguments.items():
            self.arguments[name] = self._place(value, layout) if isinstance(value, torch.Tensor) else value

    def _place(self, tensor: torch.Tensor, layout: str) -> torch.Tensor:
        strides = [1] * tensor.dim()
        order = range(tensor.dim()) if layout == "transposed" else reversed(range(tensor.dim()))
        step = 2 if layout == "strided" else 1
        for count, d in enumerate(order):
            strides[d] = step
            step *= max(tensor.shape[d], 1)
            if layout == "padded_rows" and count == 0:
                step += 16
        memory = _poison(step + 2 * _MARGIN, tensor, self._device)
        view = memory.as_strided(tensor.shape, strides, _MARGIN)
        view.copy_(tensor)
        self._memory.append((memory, memory.clone()))
        return view

    def intact(self) -> bool:
        """Whether neither the inputs nor the memory around them changed."""
        return all(
            torch.equal(torch.nan_to_num(now.double(), nan=1e30), torch.nan_to_num(before.double(), nan=1e30))
            for now, before in self._memory
        )
