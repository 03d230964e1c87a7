"""The scalar types of PTX, and the errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


class PtxError(Exception):
    """The text or the program is wrong; the message names the line."""


class UnknownInstruction(PtxError):
    """An instruction, modifier, type or operand that the interpreter does not know: never a guess."""


class Fault(Exception):
    """What an instruction found wrong while it ran; the interpreter adds the line and raises a PtxError."""


@dataclass(frozen=True)
class Type:
    """`kind`: u, s, b (bits), p (predicate), f (a float that numpy has), h (one that it lacks, or a pair: as bits)."""

    name: str
    kind: str
    size: int
    dtype: type

    @property
    def bits(self) -> int:
        return 8 * self.size


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}

TYPES = {
    f"{kind}{8 * size}": Type(f"{kind}{8 * size}", kind, size, (SIGNED if kind == "s" else UNSIGNED)[size])
    for kind in "usb"
    for size in (1, 2, 4, 8)
}
TYPES |= {
    name: Type(name, kind, size, dtype)
    for name, kind, size, dtype in (
        ("f32", "f", 4, np.float32),
        ("f64", "f", 8, np.float64),
        ("f16", "f", 2, np.float16),
        ("bf16", "h", 2, np.uint16),
        ("f16x2", "h", 4, np.uint32),
        ("bf16x2", "h", 4, np.uint32),
        ("tf32", "h", 4, np.uint32),
        ("e4m3x2", "h", 2, np.uint16),
        ("e5m2x2", "h", 2, np.uint16),
        ("pred", "p", 1, np.bool_),
    )
}
