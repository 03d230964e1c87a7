"""The random numbers of the Triton column are those of the reference, to the bit."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl

from grokkernels.reference.philox import uniform as reference
from grokkernels.triton.kernel import kernel
from grokkernels.triton.philox import uniform


@kernel
def uniform_kernel(index_ptr, out_ptr, seed: tl.int64, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(out_ptr + at, uniform(tl.load(index_ptr + at), seed))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_numbers_of_the_reference(seed: int) -> None:
    """At small and at any 64-bit indices."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (512,), generator=torch.Generator().manual_seed(0))
    index = torch.cat((torch.arange(512), drawn))
    out = torch.empty(1024)
    uniform_kernel[(1,)](index, out, seed, COUNT=1024)
    assert torch.equal(out, reference(index, seed))
