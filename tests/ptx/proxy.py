"""Whether a fence.proxy.async stands between a write to shared memory and what reads it by the asynchronous proxy.

wgmma and bulk copies do not see st.shared, stmatrix or cp.async until the writer, or whoever issues the reader, has
executed that fence ("Proxies" and "Causality order" of the PTX ISA). On a GPU its absence is a rare wrong number.
"""

from __future__ import annotations

import numpy as np

from .parser import Kernel
from .types import Fault


def is_needed(kernel: Kernel) -> bool:
    """Only kernels with such readers pay for the books."""
    return any(
        i.opcode.startswith("wgmma.mma_async") or ("bulk" in i.parts and "bulk_group" in i.parts)
        for i in kernel.instructions
    )


class Proxies:
    """Per byte of shared memory: at which step, and by whom, it was last written by ordinary means."""

    def __init__(self, nbytes: int, lanes: int) -> None:
        self.written_at = np.full(nbytes, -1, np.int64)
        self.writer = np.zeros(nbytes, np.int32)
        self.fenced_at = np.full(lanes, -1, np.int64)
        self.latest = -1
        """When the last write was, of any byte: mostly that is long ago, and nothing else need be looked at."""

    def write(self, offsets: np.ndarray, nbytes: int, lanes: np.ndarray, step: int) -> None:
        """(k,) offsets of `nbytes` each, by the lanes (k,)."""
        self.latest = step
        at = offsets[:, None] + np.arange(nbytes)
        self.written_at[at] = step
        self.writer[at] = lanes[:, None]

    def overwritten(self, at: np.ndarray | slice) -> None:
        """By the asynchronous proxy itself."""
        self.written_at[at] = -1

    def fence(self, mask: np.ndarray, step: int) -> None:
        self.fenced_at = np.where(mask, step, self.fenced_at)

    def read(self, at: np.ndarray | slice, readers: np.ndarray | slice | int) -> None:
        """Bytes that the asynchronous proxy reads on behalf of the lanes `readers`."""
        by_readers = np.min(self.fenced_at[readers])
        if self.latest <= by_readers:
            return
        fenced = np.maximum(self.fenced_at[self.writer[at]], by_readers)
        bad = self.written_at[at] > fenced
        if bad.any():
            writer = int(self.writer[at][bad][0])
            raise Fault(f"thread {writer} wrote what this reads, and no fence.proxy.async came between")
