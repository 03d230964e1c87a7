"""Philox4x32-10, counter-based random numbers (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

The numbers depend on the counter and the key alone, so every backend draws the same ones in any order.
"""

from __future__ import annotations

import torch

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def philox_4x32(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four counter words (int64 tensors holding 32 bits) and two key words -> four random words, likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # An int64 product wraps, which keeps all 64 bits; the mask undoes the sign of the shift.
        left, right = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (right >> 32) & MASK ^ c1 ^ k0, right & MASK, (left >> 32) & MASK ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def uniform(index: torch.Tensor, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """One number in [0, 1) for each int64 index: the top 24 bits of the first word, times 2^-24.

    The counter is (low word of index, high word of index, 0, 0), the key the two words of the 64-bit seed.
    """
    zero = torch.zeros_like(index)
    key = (seed & MASK, (seed >> 32) & MASK)
    word = philox_4x32((index & MASK, (index >> 32) & MASK, zero, zero), key)[0]
    return (word >> 8).to(dtype) * 2.0**-24
