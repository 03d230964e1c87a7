"""Bulk copies (cp.async.bulk, and of tensors): issued by one thread, arriving whenever they like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .memory import TensorMap
from .types import Fault

if TYPE_CHECKING:
    from .block import Block


@dataclass
class Load:
    """On its way to shared memory: `run` brings it and tells the mbarrier."""

    run: Callable[[], None]


@dataclass
class Store:
    """On its way to global memory: `read` takes the bytes from shared memory, `write` then puts them."""

    lane: int
    group: int
    read: Callable[[], np.ndarray]
    write: Callable[[np.ndarray], None]
    taken: np.ndarray | None = None


class Bulk:
    def __init__(self, block: Block) -> None:
        self.block = block
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        self.committed = np.zeros(block.lanes, np.int64)

    # To shared memory

    def load(self, destination: int, source: int, nbytes: int, barrier: int) -> None:
        b = self.block
        self._aligned(destination, source, nbytes)
        into = b.shared.bytes_at(destination, nbytes, 16)
        out = b.globals.bytes_at(source, nbytes, 16)
        if b.proxies is not None:
            b.proxies.overwritten(slice(destination - b.shared.first, destination - b.shared.first + nbytes))
        self._issue(into, lambda: np.copyto(into, out), nbytes, barrier)

    def load_tensor(self, destination: int, map: TensorMap, coordinates: tuple[int, ...], barrier: int) -> None:
        b = self.block
        tile = Tile(map, coordinates)
        if destination % 128:
            raise Fault(f"a tensor tile at shared {destination:#x}, which is not 128-byte aligned")
        b.shared.bytes_at(destination, tile.nbytes, 16)
        into = b.shared.data
        offsets = tile.shared_offsets(destination, b.shared.first)

        def run():
            words = np.zeros((offsets.size, map.itemsize), np.uint8)
            source, inside = tile.elements()
            words[inside] = self._global_bytes(source[inside], map.itemsize)
            into[offsets[:, None] + np.arange(map.itemsize)] = words

        poison = offsets[:, None] + np.arange(map.itemsize)
        if b.proxies is not None:
            b.proxies.overwritten(poison)
        if b.launch.delay_copies:
            into[poison] = 0xFF
        self._issue(None, run, tile.nbytes, barrier)

    def _global_bytes(self, address: np.ndarray, itemsize: int) -> np.ndarray:
        offset = self.block.globals.offsets(address, itemsize, itemsize)
        return self.block.globals.data[offset[:, None] + np.arange(itemsize)]

    def _issue(self, into: np.ndarray | None, copy: Callable[[], None], nbytes: int, barrier: int) -> None:
        b = self.block
        b.mbarriers.find(barrier)

        def run():
            copy()
            b.mbarriers.complete(barrier, nbytes)

        if not b.launch.delay_copies or (b.launch.rng is not None and b.launch.rng.random() < 0.3):
            run()
            return
        if into is not None:
            into[:] = 0xFF
        self.loads.append(Load(run))

    def advance(self) -> bool:
        """One load arrives; whether there was one."""
        if not self.loads:
            return False
        rng = self.block.launch.rng
        self.loads.pop(0 if rng is None else int(rng.integers(len(self.loads)))).run()
        return True

    # To global memory

    def store(self, destination: int, source: int, nbytes: int, add: np.dtype | None = None) -> None:
        b = self.block
        self._aligned(source, destination, nbytes)
        out = b.shared.bytes_at(source, nbytes, 16)
        into = b.globals.bytes_at(destination, nbytes, 16)
        b.proxies.read(slice(source - b.shared.first, source - b.shared.first + nbytes), self._issuer())

        def write(taken):
            into[:] = taken if add is None else (into.view(add) + taken.view(add)).view(np.uint8)

        self._queue(lambda: out.copy(), write)

    def store_tensor(
        self, source: int, map: TensorMap, coordinates: tuple[int, ...], add: np.dtype | None = None
    ) -> None:
        b = self.block
        tile = Tile(map, coordinates)
        if source % 128:
            raise Fault(f"a tensor tile at shared {source:#x}, which is not 128-byte aligned")
        b.shared.bytes_at(source, tile.nbytes, 16)
        offsets = tile.shared_offsets(source, b.shared.first)[:, None] + np.arange(map.itemsize)
        b.proxies.read(offsets, self._issuer())

        def write(taken):
            address, inside = tile.elements()
            offset = b.globals.offsets(address[inside], map.itemsize, map.itemsize)[:, None] + np.arange(map.itemsize)
            words = taken[inside]
            if add is not None:
                words = (np.ascontiguousarray(b.globals.data[offset]).view(add) + words.view(add)).view(np.uint8)
            b.globals.data[offset] = words

        self._queue(lambda: b.shared.data[offsets].copy(), write)

    def _issuer(self) -> int:
        return int(self.block.active_ids(None)[0])

    def _queue(self, read: Callable[[], np.ndarray], write: Callable[[np.ndarray], None]) -> None:
        b = self.block
        lane = self._issuer()
        store = Store(lane, int(self.committed[lane]), read, write)
        if b.launch.delay_copies:
            self.stores.append(store)
        else:
            write(read())

    def commit(self) -> None:
        self.committed = self.committed + self.block.mask

    def wait(self, left: int, read_only: bool) -> None:
        """The active lanes' groups but the latest `left` have been read, and unless `read_only`, written."""
        mask, rest = self.block.mask, []
        for store in self.stores:
            if mask[store.lane] and store.group < self.committed[store.lane] - left:
                if store.taken is None:
                    store.taken = store.read()
                if not read_only:
                    store.write(store.taken)
                    continue
            rest.append(store)
        self.stores = rest

    def finish(self) -> None:
        if self.loads:
            raise Fault(f"the block ends while {len(self.loads)} bulk copies are on their way to its shared memory")
        for store in self.stores:
            if store.taken is None:
                raise Fault("the block ends while a bulk copy may still read its shared memory: no wait_group.read")
            store.write(store.taken)

    def _aligned(self, shared: int, other: int, nbytes: int) -> None:
        if nbytes % 16 or nbytes <= 0:
            raise Fault(f"a bulk copy of {nbytes} bytes")


class Tile:
    """The box of a tensor map at some coordinates, innermost dimension first."""

    def __init__(self, map: TensorMap, coordinates: tuple[int, ...]) -> None:
        if len(coordinates) != len(map.shape):
            raise Fault(f"{len(coordinates)} coordinates for a tensor of {len(map.shape)} dimensions")
        self.map, self.coordinates = map, coordinates
        self.nbytes = int(np.prod(map.box)) * map.itemsize

    def _places(self) -> np.ndarray:
        """(dimensions, elements): where in the box, in the order of shared memory."""
        places = np.indices(self.map.box[::-1]).reshape(len(self.map.box), -1)
        return places[::-1]

    def elements(self) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the elements, and which of them the tensor has."""
        address = np.full(self.nbytes // self.map.itemsize, self.map.address, np.int64)
        inside = np.ones(address.size, np.bool_)
        for place, at, stride, size in zip(
            self._places(), self.coordinates, self.map.strides, self.map.shape, strict=True
        ):
            index = place + at
            address += index * stride
            inside &= (index >= 0) & (index < size)
        return address, inside

    def shared_offsets(self, address: int, first: int) -> np.ndarray:
        """Offsets into the bytes of shared memory; the swizzle is a matter of the address, not of the tile."""
        logical = address + np.arange(self.nbytes // self.map.itemsize) * self.map.itemsize
        return swizzle(logical, self.map.swizzle) - first


def swizzle(address: np.ndarray, span: int) -> np.ndarray:
    """The 16-byte unit within `span` bytes, xor the number of the 128-byte line ("Swizzling modes" of the PTX ISA).

    128: bits 4-6 ^= bits 7-9; 64: bits 4-5 ^= bits 7-8; 32: bit 4 ^= bit 7.
    """
    units = {0: 0, 32: 1, 64: 3, 128: 7}[span]
    return address ^ ((address >> 7 & units) << 4)
