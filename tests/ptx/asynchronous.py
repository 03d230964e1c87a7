"""What is on its way: cp.async, in groups of each thread's own; bulk copies and wgmma have files of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bulk import Bulk
from .types import Fault
from .wgmma import Wgmmas

if TYPE_CHECKING:
    from .block import Block


@dataclass
class Copies:
    """One cp.async of several lanes: offsets into shared and global bytes, `valid` of `size` bytes are read."""

    lanes: np.ndarray
    destination: np.ndarray
    source: np.ndarray
    size: int
    valid: np.ndarray
    group: np.ndarray

    def select(self, chosen: np.ndarray) -> Copies:
        return Copies(
            self.lanes[chosen], self.destination[chosen], self.source[chosen], self.size, self.valid[chosen],
            self.group[chosen],
        )  # fmt: skip


class Asynchronous:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.copies: list[Copies] = []
        self.committed = np.zeros(block.lanes, np.int64)
        """How many groups each thread has committed."""
        self.arrivals: list[tuple[int, int]] = []
        """Lanes whose copies so far an mbarrier waits for, and where it is."""
        self.bulk = Bulk(block)
        self.wgmmas = Wgmmas(block)

    def copy(self, destination: np.ndarray, source: np.ndarray, size: int, valid: np.ndarray) -> None:
        """The active lanes' addresses; takes effect now or later, as the launch wants it."""
        b = self.block
        if (valid < 0).any() or (valid > size).any():
            raise Fault(f"a source size beyond {size}")
        to = b.shared.offsets(destination, size, size)
        reads = valid > 0
        begin = np.zeros_like(source)
        begin[reads] = b.globals.offsets(source[reads], size, size) if (valid[reads] == size).all() else 0
        for part in np.unique(valid[reads]):
            some = valid == part
            begin[some] = b.globals.offsets(source[some], int(part), 1)
            b.globals.offsets(source[some], 1, size)
        lanes = b.active_ids(None)
        copies = Copies(lanes, to, begin, size, valid, self.committed[lanes])
        if not b.launch.delay_copies:
            self._perform(copies)
            return
        b.shared.data[to[:, None] + np.arange(size)] = 0xFF
        if b.launch.rng is not None:
            now = b.launch.rng.random(lanes.size) < 0.5
            self._perform(copies.select(now))
            copies = copies.select(~now)
        self.copies.append(copies)

    def _perform(self, copies: Copies) -> None:
        b, size = self.block, copies.size
        if not copies.lanes.size:
            return
        b.wrote_shared(copies.destination, size, copies.lanes)
        word = min(size, 8)
        if (copies.valid == size).all():
            at = np.arange(size // word)
            loaded = b.globals.views[word][(copies.source // word)[:, None] + at]
            b.shared.views[word][(copies.destination // word)[:, None] + at] = loaded
            return
        data = np.zeros((copies.lanes.size, size), np.uint8)
        for part in np.unique(copies.valid[copies.valid > 0]):
            some = copies.valid == part
            data[some, :part] = b.globals.data[copies.source[some][:, None] + np.arange(part)]
        b.shared.data[copies.destination[:, None] + np.arange(size)] = data

    def commit(self) -> None:
        """cp.async.commit_group of the active lanes."""
        self.committed = self.committed + self.block.mask
        self._some()

    def wait(self, left: int) -> None:
        """cp.async.wait_group of the active lanes: all but their `left` latest groups are there."""
        self._some()
        done = np.where(self.block.mask, self.committed - left, 0)
        self._arrive(lambda c: c.group < done[c.lanes])

    def wait_all(self) -> None:
        """cp.async.wait_all: also what was not committed."""
        mask = self.block.mask
        self._arrive(lambda c: mask[c.lanes])

    def _some(self) -> None:
        """With a seed: whatever is on its way may arrive at any time."""
        rng = self.block.launch.rng
        if rng is not None:
            self._arrive(lambda c: rng.random(c.lanes.size) < 0.25)

    def _arrive(self, which) -> None:
        rest = []
        for copies in self.copies:
            chosen = which(copies)
            self._perform(copies.select(chosen))
            if not chosen.all():
                rest.append(copies.select(~chosen))
        self.copies = rest

    def advance(self) -> bool:
        """Nobody can run: lets something arrive that lanes may be waiting for; whether there was anything."""
        if self.arrivals:
            lane, address = self.arrivals.pop(0)
            self._arrive(lambda c: c.lanes == lane)
            self.block.mbarriers.arrive(address)
            return True
        return self.bulk.advance()

    def arrive_after(self, addresses: np.ndarray, increments: bool) -> None:
        """cp.async.mbarrier.arrive of the active lanes; without .noinc it expects one arrival more, its own."""
        for lane, address in zip(self.block.active_ids(None).tolist(), addresses.tolist(), strict=True):
            barrier = self.block.mbarriers.find(address)
            if increments:
                barrier.pending += 1
            self.arrivals.append((lane, address))
        if not self.block.launch.delay_copies:
            while self.arrivals:
                self.advance()

    def finish(self) -> None:
        """The block has ended."""
        self.bulk.finish()
