"""Philox4x32-10 as a device function, to the bit that of grokkernels/reference/philox.py and csrc/common/philox.h.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def uniform(index, seed):
    """index int64 of any shape, seed int64 -> one number in [0, 1) each, a multiple of 2^-24, float32.

    The counter is (low word, high word, 0, 0) of the index, the key the two words of the seed.
    """
    c0, c1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in range(10):  # a loop that stays one: its keys would fill an AMD GPU's scalar registers
        left, right = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = right ^ c1 ^ k0, c2 * 0xCD9E8D57, left ^ c3 ^ k1, c0 * 0xD2511F53
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return (c0 >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
