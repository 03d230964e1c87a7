"""Tensors whose offsets need more than 32 bits: where they lie, what lies around them, and that they take no memory."""

from __future__ import annotations

import resource

import pytest
import torch

from grokkernels.testing.fences import Fence

SHAPES = ((), (7,), (0, 4), (5, 33), (3, 400), (2, 64, 8), (300, 17), (1, 1), (65, 1, 2, 9), (5000,))


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """The offset of every element from the first."""
    places = torch.zeros(tensor.shape, dtype=torch.int64)
    for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        places += (torch.arange(size) * stride).view([-1 if i == d else 1 for i in range(tensor.dim())])
    return places.flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_far_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """An offset that is cut to 32 bits, signed or not, leads to address space that is there and holds nothing."""
    tensor = torch.randint(0, 2, shape).to(dtype)
    for seed in range(12):
        fence = Fence({"x": tensor}, f"far {seed}")
        x = fence.arguments["x"]
        assert torch.equal(x, tensor)
        assert x.storage_offset() >= 2**31
        assert fence.intact()
        places = _places(x)
        if not any(1 < size <= 300 for size in shape) or tensor.numel() == 0:
            continue
        large = places[places >= 2**31]
        assert large.numel()
        assert x.storage_offset() + int(large.max()) < x.untyped_storage().nbytes() // x.element_size()
        cut = torch.cat([large.int().long(), large[large >= 2**32] % 2**32])
        around = (cut[:, None] - places[None, :]).abs()
        assert int(around.min()) > 64, seed


@pytest.mark.parametrize("step", [-1, 1])
def test_a_write_beside_a_far_tensor_is_seen(step: int) -> None:
    for seed in range(6):
        fence = Fence({"x": torch.ones(4, 5)}, f"far {seed}")
        x = fence.arguments["x"]
        last = x.storage_offset() + 3 * x.stride(0) + 4 * x.stride(1)
        x.as_strided((1,), (1,), last + 1 if step == 1 else x.storage_offset() - 1).zero_()
        assert not fence.intact()


def test_far_tensors_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(16):
        assert Fence({str(n): torch.ones(64, 256, dtype=torch.int64) for n in range(8)}, f"far {seed}").intact()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024
