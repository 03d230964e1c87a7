"""From an instruction to something that runs: a registry of families, and the tools they decode with.

A family takes the modifiers that it knows out of a `Form`, one by one; whatever is left when it is done is unknown,
and unknown is an error. What it returns is called once per execution with the block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from .parser import Address, Immediate, Instruction, Negated, Operand, Pair, Register, Sink, Special, Symbol, Vector
from .types import SIGNED, TYPES, UNSIGNED, PtxError, Type, UnknownInstruction

if TYPE_CHECKING:
    from .block import Block

Run = Callable[["Block"], None]
Read = Callable[["Block"], np.ndarray]
Write = Callable[["Block", np.ndarray], None]


class Kind(Enum):
    PLAIN = 0
    """Every lane for itself."""
    COLLECTIVE = 1
    """The lanes that `members` names (all of the warp if None) meet first."""
    SCHEDULE = 2
    """Decides itself which lanes go on: gets the lanes, which already stand behind the instruction."""
    BARRIER = 3
    """The lanes of the warp meet first; then as SCHEDULE."""
    BRANCH = 4
    EXIT = 5


@dataclass
class Step:
    """A decoded instruction."""

    instruction: Instruction
    run: Run
    kind: Kind = Kind.PLAIN
    members: Read | None = None
    target: int = -1
    warpgroup: bool = False
    """COLLECTIVE of four warps."""

    def __post_init__(self) -> None:
        guard = self.instruction.guard
        self.guard = -1 if guard is None else guard.index
        self.negated = self.instruction.guard_negated


_FAMILIES: dict[str, Callable[[Form], Step | Run]] = {}


def family(*names: str):
    """Registers a decoder for opcodes whose first part is one of the names."""

    def register(decoder):
        for name in names:
            assert name not in _FAMILIES, name
            _FAMILIES[name] = decoder
        return decoder

    return register


def decode(instruction: Instruction) -> Step:
    decoder = _FAMILIES.get(instruction.parts[0])
    form = Form(instruction)
    if decoder is None:
        raise form.unknown(f"instruction {instruction.parts[0]!r}")
    step = decoder(form)
    if form.rest:
        raise form.unknown("modifier " + ", ".join(f".{m}" for m in form.rest))
    return step if isinstance(step, Step) else Step(instruction, step)


class Form:
    """The modifiers and operands of an instruction that is being decoded."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.name = instruction.parts[0]
        self.rest = list(instruction.parts[1:])
        self.operands = instruction.operands

    def unknown(self, what: str) -> UnknownInstruction:
        i = self.instruction
        return UnknownInstruction(f"line {i.line}: `{i.text}`: {what} is not known")

    def types(self, count: int) -> list[Type]:
        """Takes the last `count` modifiers, which must be types."""
        names, self.rest = self.rest[-count:], self.rest[:-count]
        if len(names) < count or any(n not in TYPES for n in names):
            raise self.unknown(f"type {'.'.join(names)!r}")
        return [TYPES[n] for n in names]

    def type(self, allowed: str | None = None) -> Type:
        """The last modifier; `allowed` lists type names."""
        (type,) = self.types(1)
        if allowed is not None and type.name not in allowed.split():
            raise self.unknown(f"type .{type.name}")
        return type

    def take(self, *names: str) -> str | None:
        """Takes the first modifier that is among the names; None if there is none."""
        for at, part in enumerate(self.rest):
            if part in names:
                return self.rest.pop(at)
        return None

    def flag(self, name: str) -> bool:
        return self.take(name) is not None

    def need(self, *names: str) -> str:
        """Takes one that must be there."""
        found = self.take(*names)
        if found is None:
            raise self.unknown(f"a form without any of {', '.join('.' + n for n in names)}")
        return found

    def count(self, *allowed: int) -> int:
        if len(self.operands) not in allowed:
            raise self.unknown(f"a form with {len(self.operands)} operands")
        return len(self.operands)

    def reader(self, at: int | Operand, type: Type | str, wide: bool = False) -> Read:
        """How to read an operand as (lanes,) or a scalar of the type; `wide`: from a wider register, its low bits."""
        operand = self.operands[at] if isinstance(at, int) else at
        type = TYPES[type] if isinstance(type, str) else type
        if isinstance(operand, Register):
            return self._register_reader(operand, type, wide)
        if isinstance(operand, Negated) and type.kind == "p":
            inner = self._register_reader(operand.operand, type, False)
            return lambda b: ~inner(b)
        if isinstance(operand, Immediate):
            value = self._immediate(operand, type)
            return lambda b: value
        if isinstance(operand, Special):
            name = operand.name
            return lambda b: b.special(name).astype(type.dtype, copy=False)
        if isinstance(operand, Symbol):
            name = operand.name
            return lambda b: np.array(b.address_of(name), np.uint64).astype(type.dtype)
        if isinstance(operand, Address) and isinstance(operand.base, Symbol):
            name, offset = operand.base.name, operand.offset
            return lambda b: np.array(b.address_of(name) + offset, np.uint64).astype(type.dtype)
        raise self.unknown(f"operand {operand}")

    def _register_reader(self, register: Register, type: Type, wide: bool) -> Read:
        index, dtype = register.index, type.dtype
        if (type.kind == "p") != (register.type.kind == "p"):
            raise self.unknown(f"{register.name}, a .{register.type.name} register, as .{type.name},")
        if type.kind == "p":
            return lambda b: b.value(index)
        if register.type.size == type.size:
            return lambda b: b.value(index).view(dtype)
        if wide and register.type.size > type.size:
            narrow = UNSIGNED[type.size]
            return lambda b: b.value(index).astype(narrow).view(dtype)
        raise self.unknown(f"{register.name}, a .{register.type.name} register, as .{type.name},")

    def _immediate(self, operand: Immediate, type: Type) -> np.ndarray:
        value = operand.value
        if type.kind == "p":
            return np.array(bool(value))
        if isinstance(value, float):
            if operand.bits is None and type.kind == "f":
                return np.array(value, type.dtype)
            if operand.size == type.size and type.kind in "fb":
                return np.array(operand.bits, UNSIGNED[type.size]).view(type.dtype)
            raise self.unknown(f"a float literal as .{type.name}")
        if type.kind == "f":
            raise self.unknown(f"an integer literal as .{type.name}")
        return np.array(value % (1 << type.bits), UNSIGNED[type.size]).view(type.dtype)

    def constant(self, at: int) -> int:
        """An operand that must be an integer literal."""
        operand = self.operands[at]
        if not isinstance(operand, Immediate) or not isinstance(operand.value, int):
            raise self.unknown(f"operand {at}, which is no integer literal,")
        return operand.value

    def writer(self, at: int | Operand, type: Type | str, wide: bool = False) -> Write:
        """How to write (lanes,) of the type; `wide`: into a wider register, extended by sign or by zeros."""
        operand = self.operands[at] if isinstance(at, int) else at
        type = TYPES[type] if isinstance(type, str) else type
        if isinstance(operand, Sink):
            return lambda b, value: None
        if not isinstance(operand, Register):
            raise self.unknown(f"destination {operand}")
        index, size = operand.index, operand.type.size
        if (type.kind == "p") != (operand.type.kind == "p"):
            raise self.unknown(f"{operand.name}, a .{operand.type.name} register, as .{type.name},")
        storage = np.bool_ if type.kind == "p" else UNSIGNED[size]
        if size == type.size:

            def write(b, value):
                value = np.asarray(value)
                if value.shape != b.shape:
                    value = np.ascontiguousarray(np.broadcast_to(value, b.shape))
                b.put(index, value.view(storage))

            return write
        if wide and size > type.size and type.kind != "p":
            extended = SIGNED[size] if type.kind == "s" else UNSIGNED[size]
            raw = type.dtype if type.kind in "us" else UNSIGNED[type.size]

            def write_wide(b, value):
                value = np.ascontiguousarray(np.broadcast_to(value, b.shape))
                b.put(index, value.view(raw).astype(extended).view(storage))

            return write_wide
        raise self.unknown(f"{operand.name}, a .{operand.type.name} register, as .{type.name},")

    def vector(self, at: int | Operand) -> tuple[Operand, ...]:
        """The parts of a vector operand; a single operand is a vector of one."""
        operand = self.operands[at] if isinstance(at, int) else at
        return operand.items if isinstance(operand, Vector) else (operand,)

    def address(self, at: int, coordinates: bool = False) -> Read:
        """How to compute an address operand: int64, (lanes,) or a scalar."""
        operand = self.operands[at]
        if not isinstance(operand, Address) or (operand.coordinates is not None) != coordinates:
            raise self.unknown(f"operand {at}, which is no address,")
        base, offset = operand.base, np.int64(operand.offset)
        if isinstance(base, Register):
            if base.type.size not in (4, 8):
                raise self.unknown(f"an address in {base.name}")
            index = base.index
            return lambda b: b.value(index).astype(np.int64) + offset
        if isinstance(base, Symbol):
            name = base.name
            return lambda b: np.array(b.address_of(name), np.int64) + offset
        if isinstance(base, Immediate) and isinstance(base.value, int):
            value = np.array(base.value + operand.offset, np.int64)
            return lambda b: value
        raise self.unknown(f"address {operand}")

    def pair(self, at: int) -> tuple[Operand, Operand | None]:
        """`d|p`, or `d` alone."""
        operand = self.operands[at]
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)


def bad(instruction: Instruction, why: str) -> PtxError:
    return PtxError(f"line {instruction.line}: `{instruction.text}`: {why}")
