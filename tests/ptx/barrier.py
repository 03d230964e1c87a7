"""Barriers of the block (bar, barrier) and of a cluster of one block, counted in warps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .types import Fault

if TYPE_CHECKING:
    from .block import Block


@dataclass
class Barrier:
    """`expected` threads, None for all that have not exited."""

    waiting: np.ndarray
    expected: int | None = None
    arrived: int = 0
    """Threads: 32 for each warp that arrived."""
    chosen: np.ndarray | None = None
    """bar.red: whose predicate is true."""
    results: list[Callable[[], None]] = field(default_factory=list)


class Barriers:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.open: dict[int | str, Barrier] = {}

    def arrive(
        self,
        name: int | str,
        expected: int | None,
        waits: bool,
        predicate: np.ndarray | None = None,
        result: Callable[[Block, int, int], None] | None = None,
    ) -> None:
        """The active lanes, whole warps, arrive. `result(block, true, threads)` runs for the lanes when all have."""
        b = self.block
        barrier = self.open.get(name)
        if barrier is None:
            barrier = self.open[name] = Barrier(np.zeros(b.lanes, np.bool_), expected)
        if barrier.expected != expected:
            raise Fault(f"barrier {name}: {expected} threads expected here, {barrier.expected} elsewhere")
        if expected is not None and (expected % 32 or expected <= 0):
            raise Fault(f"barrier {name}: {expected} threads are no whole warps")
        mask = b.mask
        if (barrier.waiting & mask).any():
            raise Fault(f"barrier {name}: a thread arrives twice")
        barrier.arrived += 32 * int(b.active_warps().sum())
        if predicate is not None:
            chosen = np.broadcast_to(predicate, b.shape) & mask
            barrier.chosen = chosen if barrier.chosen is None else barrier.chosen | chosen
        if waits:
            barrier.waiting = barrier.waiting | mask
            b.wait(mask)
            if result is not None:
                barrier.results.append(lambda: self._deliver(barrier, mask, result))
        self._check(name)

    def _deliver(self, barrier: Barrier, mask: np.ndarray, result: Callable[[Block, int, int], None]) -> None:
        self.block.activate(mask)
        threads = int(self.block.alive().sum()) if barrier.expected is None else barrier.expected
        result(self.block, int(barrier.chosen.sum()), threads)

    def _check(self, name: int | str) -> None:
        b, barrier = self.block, self.open[name]
        expected = barrier.expected
        if expected is None:
            expected = 32 * int(b.alive().reshape(-1, 32).any(1).sum())
        if barrier.arrived > expected:
            raise Fault(f"barrier {name}: {barrier.arrived} threads arrived, {expected} were expected")
        if barrier.arrived == expected:
            del self.open[name]
            for result in barrier.results:
                result()
            b.resume(barrier.waiting)

    def exited(self) -> None:
        """Threads have exited: barriers of all threads may now be complete."""
        for name in [n for n, barrier in self.open.items() if barrier.expected is None]:
            self._check(name)
