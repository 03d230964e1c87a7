"""Which tensors share memory: against the places of all their elements."""

from __future__ import annotations

import random

import pytest
import torch

from grokkernels.overlap import check_apart

MEMORY = torch.zeros(1000)


def _drawn(rng: random.Random) -> torch.Tensor:
    dims = rng.randrange(5)
    shape = [rng.choice([1, 1, 2, 3, 4]) for _ in range(dims)]
    strides = [rng.choice([0, 1, 1, 2, 3, 4, 5, 8, 12, 16]) for _ in range(dims)]
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64])
    return MEMORY.view(dtype).as_strided(shape, strides, rng.randrange(60))


def _places(tensor: torch.Tensor) -> list[int]:
    """The byte at which each element begins."""
    numbers = torch.tensor(0)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers = numbers[..., None] + stride * torch.arange(size)
    return (tensor.data_ptr() + tensor.element_size() * numbers).flatten().tolist()


def _bytes(tensor: torch.Tensor) -> set[int]:
    return {place + i for place in _places(tensor) for i in range(tensor.element_size())}


def _refusal(written: dict[str, torch.Tensor], read: dict[str, torch.Tensor]) -> str:
    try:
        check_apart(written, read)
    except ValueError as error:
        return str(error)
    return ""


def test_drawn_tensors() -> None:
    rng = random.Random(1)
    seen = set()
    for _ in range(1500):
        a, b = _drawn(rng), _drawn(rng)
        twice, common = len(set(_places(a))) < a.numel(), bool(_bytes(a) & _bytes(b))
        refusal = _refusal({"a": a}, {"b": b})
        assert bool(refusal) == (twice or common), (a.shape, a.stride(), b.shape, b.stride(), refusal)
        assert not twice or "a must not lie on itself" in refusal
        assert not _refusal({}, {"a": a, "b": b})
        seen.add((twice, common))
    assert len(seen) == 4


def test_an_earlier_tensor_that_ends_later() -> None:
    wide, inside, after = MEMORY[:100], MEMORY[10:20], MEMORY[50:60]
    with pytest.raises(ValueError, match="wide and after must not share memory, as after is written to"):
        check_apart({"after": after}, {"wide": wide, "inside": inside})
