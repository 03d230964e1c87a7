"""Memory: the host arena that stands for global memory, and the windows through which a block sees each space."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .types import Fault

GLOBAL_FIRST = 1 << 33
"""Above 32 bits, so that a pointer that lost its upper half is out of bounds."""
SHARED_FIRST = 1024
"""Shared addresses begin here: a null shared pointer is out of bounds, and 1024-byte alignment stays possible."""
LOCAL_FIRST = 64
SPACE_BIT = 48
GENERIC = {"global": 0, "shared": 1 << SPACE_BIT, "local": 2 << SPACE_BIT, "param": 3 << SPACE_BIT}
"""Where the spaces lie among generic addresses: a global address, of at most 48 bits, is its own generic address."""
FENCE = 256


@dataclass(frozen=True)
class TensorMap:
    """What a CUtensorMap describes: dimensions innermost first, as the driver has them; strides in bytes."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int
    dtype: np.dtype | None = None


class Memory:
    """Global memory. Allocations lie between fences; touching a byte outside of them is an error."""

    def __init__(self) -> None:
        self.data = np.full(1 << 16, 0xFF, np.uint8)
        self.valid = np.zeros(1 << 16, np.bool_)
        self.used = FENCE
        self.maps: list[TensorMap] = []
        self.symbols: dict[int, tuple[object, dict[str, int]]] = {}
        """By id of a module, which is kept alive: its variables' addresses."""

    def alloc(self, nbytes: int) -> int:
        """The address of new memory, 256-byte aligned; it starts as 0xFF bytes, which are NaN in every format."""
        begin, end = self.used, self.used + nbytes
        self.used = -(-end // FENCE) * FENCE + FENCE
        if self.used > self.data.size:
            size = max(2 * self.data.size, -(-self.used // FENCE) * FENCE)
            more = size - self.data.size
            self.data = np.concatenate([self.data, np.full(more, 0xFF, np.uint8)])
            self.valid = np.concatenate([self.valid, np.zeros(more, np.bool_)])
        self.valid[begin:end] = True
        return GLOBAL_FIRST + begin

    def put(self, array: np.ndarray) -> int:
        """Copies an array in; returns its address."""
        array = np.ascontiguousarray(array)
        address = self.alloc(array.nbytes)
        begin = address - GLOBAL_FIRST
        self.data[begin : begin + array.nbytes] = array.reshape(-1).view(np.uint8)
        return address

    def get(self, address: int, dtype, shape) -> np.ndarray:
        """A copy of an array that lies at an address."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        begin = address - GLOBAL_FIRST
        if begin < 0 or not self.valid[begin : begin + nbytes].all() or begin + nbytes > self.data.size:
            raise IndexError(f"{nbytes} bytes at {address:#x} were never allocated")
        return self.data[begin : begin + nbytes].copy().view(dtype).reshape(shape)

    def tensor_map(self, address: int, shape, strides, box, itemsize: int, swizzle: int = 0, dtype=None) -> bytes:
        """128 bytes to pass where a kernel takes a CUtensorMap by value.

        Dimensions innermost first; `strides` in bytes for the outer dimensions only, as cuTensorMapEncodeTiled takes
        them; `swizzle` is 0, 32, 64 or 128. Outside the tensor, zeros are read and nothing is written.
        Only a reduction asks for the `dtype`: float32, float64 or an integer.
        """
        if len(strides) != len(shape) - 1 or len(box) != len(shape) or swizzle not in (0, 32, 64, 128):
            raise ValueError(f"no tensor map: {shape=} {strides=} {box=} {swizzle=}")
        if address % 16 or any(s % 16 for s in strides) or box[0] * itemsize % 16:
            raise ValueError("a tensor map wants a 16-byte aligned address, strides and inner box")
        if swizzle and box[0] * itemsize != swizzle:
            raise ValueError(f"an inner box of {box[0] * itemsize} bytes under a swizzle of {swizzle} is not known")
        kind = None if dtype is None else np.dtype(dtype)
        if kind is not None and (kind.itemsize != itemsize or kind == np.float16):
            raise ValueError(f"elements of {itemsize} bytes are not {kind}")
        self.maps.append(TensorMap(address, tuple(shape), (itemsize, *strides), tuple(box), itemsize, swizzle, kind))
        return struct.pack("<8sQ", b"tensmap!", len(self.maps) - 1).ljust(128, b"\xff")

    def find_map(self, raw: bytes) -> TensorMap:
        """The description behind the 128 bytes that `tensor_map` gave."""
        magic, index = struct.unpack_from("<8sQ", raw)
        if magic != b"tensmap!" or index >= len(self.maps):
            raise Fault("the bytes of a tensor map that are not from Memory.tensor_map")
        return self.maps[index]

    def window(self) -> Window:
        return Window("global", self.data, GLOBAL_FIRST, self.valid)


class Window:
    """Bytes at consecutive addresses from `first`; `valid` marks those that may be touched (None: all)."""

    def __init__(self, name: str, data: np.ndarray, first: int, valid: np.ndarray | None = None) -> None:
        self.name, self.data, self.first, self.valid = name, data, first, valid
        self.views = {size: data[: data.size // size * size].view(f"u{size}") for size in (1, 2, 4, 8)}

    def offsets(self, address: np.ndarray, nbytes: int, align: int) -> np.ndarray:
        """Addresses (any shape) of accesses of `nbytes` each -> offsets into the bytes, all of them checked."""
        offset = address - self.first
        if align > 1 and (address & (align - 1)).any():
            at = int(address[address % align != 0][0])
            raise Fault(f"misaligned {self.name} access of {nbytes} bytes at {at:#x}")
        bad = (offset < 0) | (offset > self.data.size - nbytes)
        if not bad.any() and self.valid is not None:
            bad = ~(self.valid[offset] & self.valid[offset + nbytes - 1])
        if bad.any():
            at = int(address[bad][0])
            raise Fault(f"{self.name} access of {nbytes} bytes out of bounds at {at:#x} ({at - self.first:+d})")
        return offset

    def load(self, address: np.ndarray, size: int, count: int = 1) -> np.ndarray:
        """(k,) addresses -> (k, count) unsigned ints of `size` bytes."""
        offset = self.offsets(address, size * count, size * count)
        return self.views[size][(offset // size)[:, None] + np.arange(count)]

    def store(self, address: np.ndarray, values: np.ndarray) -> None:
        """(k,) addresses and (k, count) unsigned ints."""
        size, count = values.dtype.itemsize, values.shape[1]
        offset = self.offsets(address, size * count, size * count)
        self.views[size][(offset // size)[:, None] + np.arange(count)] = values

    def bytes_at(self, address: int, nbytes: int, align: int = 1) -> np.ndarray:
        """A view of one run of bytes."""
        at = int(self.offsets(np.array([address], np.int64), max(nbytes, 1), align)[0])
        if self.valid is not None and not self.valid[at : at + nbytes].all():
            raise Fault(f"{self.name} access of {nbytes} bytes out of bounds at {address:#x}")
        return self.data[at : at + nbytes]


class LocalWindow:
    """Local memory: (lanes, bytes), every lane sees its own row from LOCAL_FIRST."""

    def __init__(self, lanes: int, nbytes: int) -> None:
        self.width = -(-max(nbytes, 1) // 16) * 16
        self.nbytes = nbytes
        self.flat = Window("local", np.full(lanes * self.width, 0xFF, np.uint8), 0)

    def rows(self, address: np.ndarray, lanes: np.ndarray, nbytes: int) -> np.ndarray:
        offset = address - LOCAL_FIRST
        bad = (offset < 0) | (offset + nbytes > self.nbytes)
        if bad.any():
            raise Fault(f"local access of {nbytes} bytes out of bounds at {int(address[bad][0]):#x}")
        return offset + lanes * self.width

    def load(self, address: np.ndarray, lanes: np.ndarray, size: int, count: int) -> np.ndarray:
        return self.flat.load(self.rows(address, lanes, size * count), size, count)

    def store(self, address: np.ndarray, lanes: np.ndarray, values: np.ndarray) -> None:
        self.flat.store(self.rows(address, lanes, values.dtype.itemsize * values.shape[1]), values)
