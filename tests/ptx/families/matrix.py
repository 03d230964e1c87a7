"""Matrix instructions of one warp: ldmatrix, stmatrix, movmatrix, mma.sync.

A layout is an index: (lanes x elements per lane) -> (rows, columns). All are from the PTX ISA, "Warp-level matrix
instructions"; group = lane >> 2 and t = lane & 3 are its groupID and threadID_in_group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..decode import Form, Kind, Step, family
from ..numerics import FP8, from_bf16, pack, tf32_values
from ..types import TYPES, Fault

LANE = np.arange(32)
GROUP, T = LANE >> 2, LANE & 3


def whole_warps(b) -> np.ndarray:
    """(warps,): those that execute; a part of a warp cannot."""
    warps = b.mask.reshape(-1, 32)
    active = warps.any(1)
    if not warps[active].all():
        raise Fault("a matrix instruction of a part of a warp")
    return active


def fragment_index(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """`rows`, `columns` (32, elements): where each lane's elements lie -> index (shape) into the flat fragments."""
    index = np.full(shape, -1)
    index[rows, columns] = np.arange(rows.size).reshape(rows.shape)
    assert (index >= 0).all()
    return index


@dataclass(frozen=True)
class Fragment:
    """Element `e` of a lane is at (rows[lane, e], columns[lane, e])."""

    rows: np.ndarray
    columns: np.ndarray
    shape: tuple[int, int]

    @property
    def index(self) -> np.ndarray:
        return fragment_index(self.rows, self.columns, self.shape)


def _broadcast(rows, columns, shape) -> Fragment:
    rows, columns = np.broadcast_arrays(rows, columns)
    return Fragment(rows.copy(), columns.copy(), shape)


def fragment_a(k: int, per_register: int) -> Fragment:
    """A, 16 x k, row-major ("Matrix fragments for mma.m16n8k16", k8, k32: they are one rule).

    Registers come in the order (row group, row group + 8) then the next half of k; in a register lie `per_register`
    neighbours of a row.
    """
    e = np.arange(16 * k // 32)
    register, inside = e // per_register, e % per_register
    rows = GROUP[:, None] + 8 * (register & 1)
    columns = T[:, None] * per_register + inside + 4 * per_register * (register >> 1)
    return _broadcast(rows, columns, (16, k))


def fragment_b(k: int, per_register: int) -> Fragment:
    """B, k x 8, column-major: column group, `per_register` neighbours of a column in a register."""
    e = np.arange(8 * k // 32)
    register, inside = e // per_register, e % per_register
    rows = T[:, None] * per_register + inside + 4 * per_register * register
    return _broadcast(rows, GROUP[:, None], (k, 8))


def fragment_c() -> Fragment:
    """C and D, 16 x 8: (group, 2t), (group, 2t + 1), then the same of row group + 8."""
    e = np.arange(4)
    return _broadcast(GROUP[:, None] + 8 * (e >> 1), 2 * T[:, None] + (e & 1), (16, 8))


def _halves(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint16)


def _from_f16(words: np.ndarray) -> np.ndarray:
    return _halves(words).view(np.float16).astype(np.float64)


ELEMENTS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bf16": (2, lambda w: from_bf16(_halves(w)).astype(np.float64)),
    "f16": (2, _from_f16),
    "tf32": (1, lambda w: tf32_values(w).astype(np.float64)),
    "e4m3": (4, lambda w: FP8["e4m3"][np.ascontiguousarray(w).view(np.uint8)]),
    "e5m2": (4, lambda w: FP8["e5m2"][np.ascontiguousarray(w).view(np.uint8)]),
    "s8": (4, lambda w: np.ascontiguousarray(w).view(np.int8).astype(np.float64)),
    "u8": (4, lambda w: np.ascontiguousarray(w).view(np.uint8).astype(np.float64)),
}
"""Elements per register, and registers (..., r) -> float64 (..., r * per register). Exact for all."""

_SHAPES = {"bf16": (16, 8), "f16": (16, 8), "tf32": (8, 4)}
"""The k of each element type; (32, 16) for those of 8 bits."""


def stack(b, reads) -> np.ndarray:
    """Registers -> (warps, 32, registers)"""
    return np.stack([np.broadcast_to(r(b), b.shape) for r in reads], 1).reshape(b.warps, 32, len(reads))


@family("mma")
def mma(form: Form) -> Step:
    """mma.sync.aligned.m16n8k*.row.col: D = A B + C, summed in float64 and rounded once."""
    form.need("sync")
    form.need("aligned")
    shape = form.need("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32")
    form.need("row")
    form.need("col")
    saturate = form.flag("satfinite")
    k = int(shape.split("k")[1])
    kinds, form.rest = form.rest, []
    if len(kinds) != 4:
        raise form.unknown("." + ".".join(kinds))
    d_type, a_type, b_type, c_type = kinds
    integer = a_type in ("s8", "u8")
    allowed = {"s32"} if integer else {"f32", "f16"} if a_type in ("f16", "e4m3", "e5m2") else {"f32"}
    pairs = {"s8": ("s8", "u8"), "u8": ("s8", "u8"), "e4m3": ("e4m3", "e5m2"), "e5m2": ("e4m3", "e5m2")}
    if (
        a_type not in ELEMENTS
        or b_type not in pairs.get(a_type, (a_type,))
        or d_type != c_type
        or d_type not in allowed
        or k not in _SHAPES.get(a_type, (32, 16))
        or (saturate and not integer)
    ):
        raise form.unknown(f"{shape}.{'.'.join(kinds)}")
    form.count(4)
    per, to_values = ELEMENTS[a_type]
    to_b_values = ELEMENTS[b_type][1]
    a_layout, b_layout, c_layout = fragment_a(k, per), fragment_b(k, per), fragment_c()
    half = d_type == "f16"
    word = "b32" if half else d_type
    counts = [2 if half else 4, a_layout.rows.shape[1] // per, b_layout.rows.shape[1] // per, 2 if half else 4]
    vectors = [form.vector(i) for i in range(4)]
    if [len(v) for v in vectors] != counts:
        raise form.unknown(f"operands of {[len(v) for v in vectors]} registers")
    # A .tf32 or 8-bit operand lies in a .b32 register, a float register is as good.
    writes = [form.writer(item, word) for item in vectors[0]]
    reads_a, reads_b = ([form.reader(item, "b32") for item in vectors[i]] for i in (1, 2))
    reads_c = [form.reader(item, word) for item in vectors[3]]
    a_index, b_index, c_index = a_layout.index, b_layout.index, c_layout.index

    def run(b):
        whole_warps(b)
        w = b.warps
        left = to_values(stack(b, reads_a)).reshape(w, -1)[:, a_index]
        right = to_b_values(stack(b, reads_b)).reshape(w, -1)[:, b_index]
        c = stack(b, reads_c)
        c = (_from_f16(c) if half else c.astype(np.float64)).reshape(w, -1)[:, c_index]
        d = np.matmul(left, right) + c
        if integer:
            d = np.clip(d, -(2.0**31), 2.0**31 - 1) if saturate else d
        d = d[:, c_layout.rows, c_layout.columns].reshape(b.lanes, 4)
        if integer:
            out = d.astype(np.int64).astype(np.int32)
        elif half:
            out = pack(d.reshape(-1, 2), TYPES["f16x2"]).reshape(b.lanes, 2)
        else:
            out = pack(d, TYPES["f32"])
        for i, write in enumerate(writes):
            write(b, np.ascontiguousarray(out[:, i]))

    return Step(form.instruction, run, Kind.COLLECTIVE)


def _matrix_form(form: Form) -> tuple[int, bool]:
    """Takes .sync.aligned.m8n8.x*{.trans}.shared.b16: how many matrices, and whether transposed."""
    for modifier in ("sync", "aligned", "m8n8"):
        form.need(modifier)
    count = int(form.need("x1", "x2", "x4")[1:])
    trans = form.flag("trans")
    form.need("shared", "shared::cta")
    form.type("b16")
    form.count(2)
    return count, trans


def _row_addresses(b, address: np.ndarray, count: int, warps: np.ndarray) -> np.ndarray:
    """Lanes 8 i to 8 i + 7 give the addresses of the rows of matrix i -> (active warps * count * 8,)"""
    return np.broadcast_to(address, b.shape).reshape(-1, 32)[warps, : 8 * count].reshape(-1)


@family("ldmatrix")
def ldmatrix(form: Form) -> Step:
    """8 x 8 matrices of 16-bit elements: lane gets (group, 2t) and (group, 2t + 1) of each, or of its transpose."""
    count, trans = _matrix_form(form)
    items = form.vector(0)
    if len(items) != count:
        raise form.unknown(f"{len(items)} registers for .x{count}")
    address, writes = form.address(1), [form.writer(item, "b32") for item in items]

    def run(b):
        warps = whole_warps(b)
        at = _row_addresses(b, address(b), count, warps)
        at_bytes = b.shared.offsets(at, 16, 16)
        rows = b.shared.views[8][(at_bytes // 8)[:, None] + np.arange(2)].view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            rows = rows.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(rows).view(np.uint32).reshape(-1, count, 32)
        if words.shape[0] != b.warps:
            spread = np.zeros((b.warps, count, 32), np.uint32)
            spread[warps] = words
            words = spread
        for i, write in enumerate(writes):
            write(b, np.ascontiguousarray(words[:, i]).reshape(-1))

    return Step(form.instruction, run, Kind.COLLECTIVE)


@family("stmatrix")
def stmatrix(form: Form) -> Step:
    """The inverse of ldmatrix."""
    count, trans = _matrix_form(form)
    items = form.vector(1)
    if len(items) != count:
        raise form.unknown(f"{len(items)} registers for .x{count}")
    address, reads = form.address(0), [form.reader(item, "b32") for item in items]

    def run(b):
        warps = whole_warps(b)
        at = _row_addresses(b, address(b), count, warps)
        words = stack(b, reads)[warps].transpose(0, 2, 1)
        rows = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if trans:
            rows = rows.transpose(0, 1, 3, 2)
        offset = b.shared.offsets(at, 16, 16)
        b.shared.views[8][(offset // 8)[:, None] + np.arange(2)] = (
            np.ascontiguousarray(rows).view(np.uint64).reshape(-1, 2)
        )
        b.events += 1
        b.wrote_shared(offset, 16, (b.lane_ids.reshape(-1, 32)[warps, : 8 * count]).reshape(-1))

    return Step(form.instruction, run, Kind.COLLECTIVE)


@family("movmatrix")
def movmatrix(form: Form) -> Step:
    """Transposes an 8 x 8 matrix that lies in a warp's registers."""
    for modifier in ("sync", "aligned", "m8n8", "trans"):
        form.need(modifier)
    form.type("b16")
    form.count(2)
    read, write = form.reader(1, "b32"), form.writer(0, "b32")

    def run(b):
        whole_warps(b)
        words = np.ascontiguousarray(np.broadcast_to(read(b), b.shape)).view(np.uint16).reshape(-1, 8, 8)
        write(b, np.ascontiguousarray(words.transpose(0, 2, 1)).view(np.uint32).reshape(-1))

    return Step(form.instruction, run, Kind.COLLECTIVE)
