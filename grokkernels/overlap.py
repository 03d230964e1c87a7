"""Which elements of tensors share memory: what an op that writes into its arguments has to refuse."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from operator import itemgetter

import torch


def check_apart(written: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> None:
    """No element of a written tensor is an element of another tensor, nor twice its own.

    Errors: ValueError with the names of the two. Tensors without memory to look at (meta, or while tracing) pass.
    """
    spans = []
    for tensors in (written, read):
        for name, tensor in tensors.items():
            if not _has_memory(tensor) or tensor.numel() == 0:
                continue
            begin = tensor.data_ptr()
            if tensor.is_contiguous():
                end = begin + tensor.nbytes
            else:
                shape, strides = tensor.shape, tensor.stride()
                if tensors is written and _lies_on_itself(shape, strides):
                    raise ValueError(
                        f"{name} must not lie on itself, as it is written to; got shape {tuple(shape)} with strides "
                        f"{strides}"
                    )
                end = begin + _reach(shape, strides) * tensor.element_size()
            spans.append((begin, end, name, tensor))
    spans.sort(key=_begin)
    furthest = 0
    for i, (begin, end, name, tensor) in enumerate(spans):
        if begin < furthest:
            for _, other_end, before, other in spans[:i]:
                if begin < other_end and (name in written or before in written) and _share_memory(other, tensor):
                    raise ValueError(
                        f"{before} and {name} must not share memory, as {before if before in written else name} is "
                        f"written to; got {name} {begin - other.data_ptr()} bytes after {before}"
                    )
        furthest = max(furthest, end)


_begin = itemgetter(0)


@lru_cache(1024)  # the same few geometries come again and again
def _reach(shape: torch.Size, strides: tuple[int, ...]) -> int:
    """Elements from the first one's place to that past the last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _has_memory(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)  # not fake, not functional
    return plain and not tensor.is_meta and torch._C._has_storage(tensor)


@lru_cache(1024)
def _lies_on_itself(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    dims = sorted(((stride, size - 1) for stride, size in zip(strides, shape, strict=True) if size > 1), reverse=True)
    # Two elements are in one place if their differences along the dims, not all of them 0, add up to nothing: of the
    # outermost difference it may be said that it is positive.
    return any(
        _reaches(0, [(stride, 1, most), *((inner, -reach, reach) for inner, reach in dims[i + 1 :])])
        for i, (stride, most) in enumerate(dims)
    )


def _share_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    distance = b.data_ptr() - a.data_ptr()
    return _meet(a.shape, a.stride(), a.element_size(), b.shape, b.stride(), b.element_size(), distance)


@lru_cache(1024)
def _meet(
    a: torch.Size, a_strides: tuple[int, ...], a_bytes: int,
    b: torch.Size, b_strides: tuple[int, ...], b_bytes: int, distance: int,
) -> bool:  # fmt: skip
    """Whether tensors of these shapes, strides and sizes of an element meet, b beginning `distance` bytes after a."""
    dims = [(stride * a_bytes, 0, size - 1) for stride, size in zip(a_strides, a, strict=True)]
    dims += [(stride * b_bytes, 1 - size, 0) for stride, size in zip(b_strides, b, strict=True)]
    if a_bytes == b_bytes and distance % a_bytes == 0:
        return _reaches(distance // a_bytes, [(step // a_bytes, low, high) for step, low, high in dims])
    return _reaches(distance, [*dims, (1, 1 - b_bytes, a_bytes - 1)])


def _reaches(target: int, terms: list[tuple[int, int, int]]) -> bool:
    """Whether target is a sum of step * n over the terms (step, low, high), n an integer from low to high."""
    bounds: dict[int, tuple[int, int]] = {}
    for step, low, high in terms:
        before = bounds.get(step, (0, 0))
        bounds[step] = (before[0] + low, before[1] + high)
    steps = sorted((step for step in bounds if step), reverse=True)
    # Of the terms from each on: the least and the greatest sum, and what all sums are multiples of.
    rest = [(0, 0, 0)]
    for step in reversed(steps):
        low, high = bounds[step]
        least, greatest, unit = rest[-1]
        rest.append((least + step * low, greatest + step * high, gcd(unit, step)))
    rest.reverse()

    def search(i: int, left: int) -> bool:
        least, greatest, unit = rest[i]
        if not least <= left <= greatest or (unit and left % unit):
            return False
        if i == len(steps):
            return left == 0
        step, (low, high) = steps[i], bounds[steps[i]]
        least, greatest, _ = rest[i + 1]
        first, last = max(low, -((greatest - left) // step)), min(high, (left - least) // step)
        return any(search(i + 1, left - step * n) for n in range(first, last + 1))

    return search(0, target)
