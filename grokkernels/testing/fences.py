"""Inputs between fences: the memory before and after each tensor is NaN, and must be so afterwards."""

from __future__ import annotations

import random
from collections.abc import Mapping

import torch

from grokkernels.testing.case import Arguments

# Layouts of elements that have places of their own, and of such as share them: those of a view, and those that the
# gradient of a mean over rows and of a sum over everything have.
APART = ("fenced", "padded_rows", "strided", "transposed", "misaligned")
SHARING = ("expanded", "overlapping", "pooled", "summed")
LAYOUTS = APART + SHARING
_MARGIN = 64  # elements on either side: a cache line and more, so that a vector load past the end meets NaN

# How the tensors lie: all in one layout, or each by its name in its own, and the others "fenced".
Layout = str | Mapping[str, str]


def layout_of(layout: Layout, name: str) -> str:
    """The layout of one tensor. Either inputs or cotangents share places: where both did, the same rounding error would
    be made again and again, and a sum over rows had all of them instead of their mean."""
    if not isinstance(layout, str):
        return layout.get(name, "fenced")
    if layout not in SHARING:
        return layout
    if name.startswith("cotangent"):
        return {"pooled": "expanded", "summed": "summed"}.get(layout, "fenced")
    return layout if layout in ("expanded", "overlapping") else "fenced"


def held(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor with numbers that the layout can hold: where places are shared, those of the first elements."""
    strides, _ = _strides_and_offset(tensor, layout)
    if not _shares(tensor, strides):
        return tensor
    places = _places(tensor, strides)
    _, which = places.unique(return_inverse=True)
    return tensor.flatten()[which].view(tensor.shape)


class Fence:
    """Copies of the tensor arguments laid into poisoned memory of a device.

    layout: "fenced" is contiguous; "padded_rows" leaves poison between the rows of the last dim; "strided" leaves
    poison between any two elements; "transposed" stores the dims in reverse order (tensors of two dims and more);
    "misaligned" is contiguous and begins one element after a multiple of 16 bytes; "expanded" has a stride of 0 in the
    dim before the last (of a vector: in its only one), "summed" in all; in "overlapping" a row begins in the middle of
    the one before; "drawn N" is any order of the dims, gaps, strides of 0, overlaps and offset, drawn from the seed N.
    Integers are not expanded, nor do they overlap. The numbers must be such as the layout can hold: see `held`.
    """

    def __init__(self, arguments: Arguments, layout: Layout = "fenced", device: str = "cpu") -> None:
        self._device = device
        self._layout = layout
        self._memory: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.arguments: Arguments = {
            name: self.place(name, value) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }

    def place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of the tensor in the layout that this name has."""
        strides, offset = _strides_and_offset(tensor, layout_of(self._layout, name))
        memory = _poison(_extent(tensor, strides) + offset + 2 * _MARGIN, tensor, self._device)
        view = memory.as_strided(tensor.shape, strides, _MARGIN + offset)
        if _shares(tensor, strides):
            memory[_places(tensor, strides).to(self._device) + _MARGIN + offset] = tensor.flatten().to(self._device)
        else:
            view.copy_(tensor)
        self._memory.append((memory, memory.clone()))
        return view

    def intact(self) -> bool:
        """Whether neither the inputs nor the memory around them changed."""
        return all(
            torch.equal(torch.nan_to_num(now.double(), nan=1e30), torch.nan_to_num(before.double(), nan=1e30))
            for now, before in self._memory
        )


def _poison(numel: int, like: torch.Tensor, device: str) -> torch.Tensor:
    if like.is_floating_point():
        return torch.full((numel,), float("nan"), dtype=like.dtype, device=device)
    if like.dtype == torch.bool:
        return torch.ones(numel, dtype=torch.bool, device=device)
    return torch.full((numel,), torch.iinfo(like.dtype).max, dtype=like.dtype, device=device)


def _strides_and_offset(tensor: torch.Tensor, layout: str) -> tuple[list[int], int]:
    dims, floating = tensor.dim(), tensor.is_floating_point()
    if layout.startswith("drawn "):
        return _drawn(tensor, random.Random(layout))
    if layout == "summed" and floating:
        return [0] * dims, 0
    order = list(range(dims)) if layout == "transposed" else list(reversed(range(dims)))
    strides = [1] * dims
    step = 2 if layout == "strided" else 1
    for count, d in enumerate(order):
        strides[d] = step
        step *= max(tensor.shape[d], 1)
        if count == 0 and layout == "padded_rows":
            step += 16
        if count == 0 and layout == "overlapping" and floating:
            step = max(step // 2, 1)
        if count == min(1, dims - 1) and layout == "expanded" and floating:
            step, strides[d] = step // max(tensor.shape[d], 1), 0
    return strides, int(layout == "misaligned")


def _drawn(tensor: torch.Tensor, rng: random.Random) -> tuple[list[int], int]:
    """Strides mostly such as views have: the order of the dims kept, or any; gaps between rows, steps within them."""
    dims, floating = tensor.dim(), tensor.is_floating_point()
    order = list(reversed(range(dims)))
    if rng.random() < 0.3:
        rng.shuffle(order)
    strides, step = [1] * dims, rng.choice([1] * 7 + [2, 3])
    for d in order:
        strides[d] = step
        step *= max(tensor.shape[d], 1)
        kind = rng.random()
        if kind < 0.2:
            step += rng.choice([1, 8, 16, 40])  # a gap, also one that no vector fits into
        elif floating and kind < 0.35:
            strides[d], step = 0, strides[d]
        elif floating and kind < 0.42:
            step = max(step - rng.randrange(step), 1)
    return strides, rng.choice([0, 0, 0, 1, 2, 3, 4, 7, 8])


def _extent(tensor: torch.Tensor, strides: list[int]) -> int:
    """Elements from the first place to the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))


def _places(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """The place of every element, one after another."""
    return torch.arange(_extent(tensor, strides)).as_strided(tensor.shape, strides).flatten()


def _shares(tensor: torch.Tensor, strides: list[int]) -> bool:
    """Whether elements may share places: whether a stride reaches less far than what lies within it."""
    reach = 0
    for stride, size in sorted(zip(strides, tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return tensor.numel() > 0
        reach += (size - 1) * stride
    return False
