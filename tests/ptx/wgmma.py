"""wgmma: matrix products of a warpgroup (four warps) that read shared memory and write registers until waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .bulk import swizzle
from .types import Fault

if TYPE_CHECKING:
    from .block import Block
    from .registers import Promise

WARPGROUP = 128


@dataclass(frozen=True)
class Descriptor:
    """A shared matrix: "Matrix descriptor format" of the PTX ISA, wgmma.

    Bits 0-13 start address, 16-29 leading and 32-45 stride byte offset, all >> 4; 49-51 base offset; 62-63 swizzle.
    """

    start: int
    leading: int
    stride: int
    swizzle: int

    @staticmethod
    def decode(bits: int) -> Descriptor:
        known = 0x3FFF | 0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62
        if bits & ~known:
            raise Fault(f"a matrix descriptor {bits:#018x} with bits that mean nothing")
        if bits >> 49 & 7:
            raise Fault("a matrix descriptor's base offset is not known: patterns must start where they repeat")
        return Descriptor(
            (bits & 0x3FFF) << 4, (bits >> 16 & 0x3FFF) << 4, (bits >> 32 & 0x3FFF) << 4, (0, 128, 64, 32)[bits >> 62]
        )

    def addresses(self, rows: int, k: int, itemsize: int, mn_major: bool) -> np.ndarray:
        """(rows, k): where each element lies; `rows` counts M of A or N of B.

        "Strides" and "Shared memory matrix layout" of the PTX ISA, in units of 16 bytes that hold T elements, and
        the same as the canonical layouts in CUTLASS's mma_sm90_desc.hpp, with W = swizzle / 16 units in a line:
          K-major:          ((8, m), (T, 2)) : ((W T, SBO), (1, T)); without swizzle ((T, SBO), (1, LBO))
          MN-major:         ((T, W, m), (8, k)) : ((1, T, LBO), (W T, SBO)); without swizzle ((1, SBO), (T, LBO))
        The swizzle is then applied to the address.
        """
        i, j = np.arange(rows)[:, None], np.arange(k)[None, :]
        unit = 16 // itemsize
        line = self.swizzle or 16
        if not mn_major:
            within = self.leading if not self.swizzle else 16
            at = i % 8 * line + i // 8 * self.stride + j // unit * within + j % unit * itemsize
        elif self.swizzle:
            per_line = line // itemsize
            at = i % per_line * itemsize + i // per_line * self.leading + j % 8 * line + j // 8 * self.stride
        else:
            at = i % unit * itemsize + i // unit * self.stride + j % 8 * 16 + j // 8 * self.leading
        return swizzle(self.start + at, self.swizzle)


@dataclass
class Wgmma:
    """One product of one warpgroup. `run` computes (elements per lane, 128) bits; they are visible once released."""

    group: int
    lanes: slice
    compute: Callable[[], list[np.ndarray]]
    promises: list[Promise]
    results: list[np.ndarray] | None = None

    def execute(self) -> None:
        """Registers show the result only after the wait, however early it is computed."""
        if self.results is None:
            self.results = self.compute()

    def release(self) -> None:
        self.execute()
        for promise, result in zip(self.promises, self.results, strict=True):
            full = np.zeros(promise.mask.size, result.dtype)
            full[self.lanes] = result
            promise.result = full


@dataclass
class _State:
    """Of one warpgroup."""

    open: list[Wgmma] = field(default_factory=list)
    committed: int = 0
    fenced: bool = False


class Wgmmas:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.groups = [_State() for _ in range(-(-block.lanes // WARPGROUP))]

    def active(self) -> list[int]:
        """The warpgroups that execute; a part of one cannot."""
        mask = self.block.mask
        if mask.size % WARPGROUP:
            raise Fault(f"a block of {mask.size} threads has no whole warpgroups")
        parts = mask.reshape(-1, WARPGROUP)
        active = parts.any(1)
        if not parts[active].all():
            raise Fault("a wgmma instruction of a part of a warpgroup")
        return np.flatnonzero(active).tolist()

    def fence(self) -> None:
        for w in self.active():
            self.groups[w].fenced = True

    def issue(
        self, warpgroup: int, compute: Callable[[list[Wgmma]], list[np.ndarray]], promises: list[Promise]
    ) -> None:
        state = self.groups[warpgroup]
        if not state.fenced:
            raise Fault("no wgmma.fence came before the first wgmma")
        lanes = slice(warpgroup * WARPGROUP, (warpgroup + 1) * WARPGROUP)
        earlier = list(state.open)

        def after_earlier():
            # They may be summands of this one.
            for other in earlier:
                other.execute()
            return compute(earlier)

        state.open.append(Wgmma(state.committed, lanes, after_earlier, promises))
        launch = self.block.launch
        if not launch.delay_copies or (launch.rng is not None and launch.rng.random() < 0.3):
            state.open[-1].execute()

    def commit(self) -> None:
        for w in self.active():
            self.groups[w].committed += 1

    def wait(self, left: int) -> None:
        for w in self.active():
            state = self.groups[w]
            while state.open and state.open[0].group < state.committed - left:
                state.open.pop(0).release()
