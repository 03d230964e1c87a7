"""The registers of a block: their bits in all lanes, which of them nobody has written, and which are in flight."""

from __future__ import annotations

import numpy as np

from .parser import Register
from .types import Fault


class Promise:
    """A register's value of which a wgmma still has to compute some lanes, those of `mask`.

    The other lanes are as before, which can be a promise too. Copying a register copies the promise: `source`.
    """

    def __init__(
        self,
        mask: np.ndarray,
        before: np.ndarray | Promise,
        source: Promise | None = None,
        result: np.ndarray | None = None,
    ) -> None:
        self.mask, self.before, self.source, self.result = mask, before, source, result

    def pending(self) -> np.ndarray:
        """Which lanes are not computed yet."""
        if self.result is not None:
            own = np.zeros_like(self.mask)
        else:
            own = self.mask if self.source is None else self.source.pending() & self.mask
        return own | (self.before.pending() & ~self.mask) if isinstance(self.before, Promise) else own

    def current(self) -> np.ndarray:
        """The value as far as it is computed."""
        before = self.before.current() if isinstance(self.before, Promise) else self.before
        value = self.result if self.source is None else self.source.current()
        return before if value is None else np.where(self.mask, value, before)


class RegisterFile:
    """Values are (lanes,) arrays that are never changed in place. `mask` says which lanes are active."""

    def __init__(self, lanes: int, registers: list[Register]) -> None:
        self.lanes, self.shape = lanes, (lanes,)
        self.lane_ids = np.arange(lanes)
        self.mask = self.everyone = np.ones(lanes, np.bool_)
        self.full = True
        zero = {t: np.zeros(lanes, np.bool_ if t == 1 else f"u{t}") for t in (1, 2, 4, 8)}
        self.names = [r.name for r in registers]
        self.registers: list[np.ndarray] = [zero[r.type.size] for r in registers]
        self.unwritten: dict[int, np.ndarray] = {r.index: self.everyone for r in registers}
        self.odd = [True] * len(registers)
        """Registers that need a look before they are read: unwritten in some lane, or in flight."""
        self.in_flight: dict[int, Promise] = {}
        self.carry: np.ndarray | None = None

    def value(self, index: int) -> np.ndarray:
        """A register's bits in all lanes; unwritten in an active lane is an error."""
        if self.odd[index]:
            self._look(index)
        return self.registers[index]

    def _look(self, index: int) -> None:
        name = self.names[index]
        if index in self.in_flight and self._settle(index, "read"):
            del self.in_flight[index]
        holes = self.unwritten.get(index)
        if holes is not None and (holes & self.mask).any():
            raise Fault(f"{name} is read before it is written")
        self.odd[index] = index in self.in_flight or holes is not None

    def put(self, index: int, bits: np.ndarray) -> None:
        """Writes a register in the active lanes. Arrays in registers are never changed in place, so may be shared."""
        if self.odd[index]:
            if index in self.in_flight:
                if self._settle(index, "written"):
                    del self.in_flight[index]
                else:
                    self.in_flight[index] = Promise(self.mask, self.in_flight[index], result=bits)
            self._written(index)
        self.registers[index] = bits if self.full else np.where(self.mask, bits, self.registers[index])

    def _settle(self, index: int, what: str) -> bool:
        """A register in flight gets what is already computed; whether that is all. In an active lane it must be."""
        promise = self.in_flight[index]
        pending = promise.pending()
        if (pending & self.mask).any():
            name = self.names[index]
            raise Fault(f"{name} is {what} while a wgmma that writes it is in flight")
        self.registers[index] = promise.current()
        return not pending.any()

    def _written(self, index: int) -> None:
        if index in self.unwritten:
            left = self.unwritten[index] & ~self.mask
            if left.any():
                self.unwritten[index] = left
            else:
                del self.unwritten[index]
        self.odd[index] = index in self.in_flight or index in self.unwritten

    def peek(self, index: int) -> np.ndarray | Promise:
        """A register's value, or the promise of it if an active lane's is in flight."""
        promise = self.in_flight.get(index)
        if promise is None or not (promise.pending() & self.mask).any():
            return self.value(index)
        return promise

    def promise(self, index: int, source: Promise | None = None) -> Promise:
        """A value to come for the active lanes of a register: its own, or a copy of another's."""
        before = self.in_flight.get(index, self.registers[index])
        promise = self.in_flight[index] = Promise(self.mask, before, source)
        self._written(index)
        return promise

    def copy(self, destination: int, source: int) -> None:
        """A register to a register. Compilers copy what was never written, so that alone is no error: using it is."""
        if self.odd[source]:
            if source in self.in_flight:
                promise = self.peek(source)
                if isinstance(promise, Promise):
                    self.promise(destination, promise)
                    return
            holes = self.unwritten.get(source)
            if holes is not None and (holes & self.mask).any():
                self.put(destination, self.registers[source])
                before = self.unwritten.get(destination)
                self.unwritten[destination] = holes & self.mask if before is None else before | (holes & self.mask)
                self.odd[destination] = True
                return
        self.put(destination, self.value(source))

    def activate(self, mask: np.ndarray) -> None:
        """What runs from here on concerns these lanes."""
        self.full = bool(mask.all())
        self.mask = self.everyone if self.full else mask

    def compress(self, value: np.ndarray) -> np.ndarray:
        """(lanes, ...) or a scalar -> the active lanes'."""
        if value.shape[:1] != self.shape:
            value = np.broadcast_to(value, self.shape)
        return value if self.full else value[self.mask]

    def expand(self, value: np.ndarray) -> np.ndarray:
        """The active lanes' values -> (lanes, ...), zeros elsewhere."""
        if self.full:
            return value
        out = np.zeros((self.lanes, *value.shape[1:]), value.dtype)
        out[self.mask] = value
        return out
