"""Objects of mbarrier: arrivals and bytes that are still to come, in phases.

They are kept beside shared memory; the 8 bytes there hold nothing that a program may look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .types import Fault

if TYPE_CHECKING:
    from .block import Block

LARGEST = (1 << 20) - 1


@dataclass
class Mbarrier:
    expected: int
    pending: int
    bytes: int = 0
    """Expected by expect_tx and not yet there; negative when they came first."""
    phase: int = 0


class Mbarriers:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.at: dict[int, Mbarrier] = {}

    def _check(self, address: int) -> None:
        self.block.shared.offsets(np.array([address], np.int64), 8, 8)

    def find(self, address: int) -> Mbarrier:
        self._check(address)
        if address not in self.at:
            raise Fault(f"no mbarrier was initialised at shared {address:#x}")
        return self.at[address]

    def init(self, address: int, count: int) -> None:
        self._check(address)
        if not 1 <= count <= LARGEST:
            raise Fault(f"an mbarrier of {count} arrivals")
        if address in self.at:
            raise Fault(f"the mbarrier at shared {address:#x} is initialised twice")
        self.at[address] = Mbarrier(count, count)

    def invalidate(self, address: int) -> None:
        self.find(address)
        del self.at[address]

    def arrive(self, address: int, count: int = 1, drop: bool = False) -> int:
        """Returns the phase that this arrival is part of: the state that test_wait takes."""
        barrier = self.find(address)
        phase = barrier.phase
        if not 1 <= count <= barrier.pending:
            raise Fault(f"{count} arrivals at an mbarrier that expects {barrier.pending} more")
        barrier.pending -= count
        if drop:
            barrier.expected -= count
        self._advance(barrier)
        return phase

    def expect(self, address: int, nbytes: int) -> None:
        barrier = self.find(address)
        barrier.bytes += nbytes
        if abs(barrier.bytes) > LARGEST:
            raise Fault(f"an mbarrier that expects {barrier.bytes} bytes")

    def complete(self, address: int, nbytes: int) -> None:
        barrier = self.find(address)
        barrier.bytes -= nbytes
        self._advance(barrier)

    def _advance(self, barrier: Mbarrier) -> None:
        self.block.events += 1
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.expected
            self.block.wake()

    def passed(self, address: int, parity: int) -> bool:
        """Whether the phase of this parity, the current or the one before, is complete."""
        return self.find(address).phase % 2 != parity

    def completed(self, address: int, phase: int) -> bool:
        return self.find(address).phase > phase
