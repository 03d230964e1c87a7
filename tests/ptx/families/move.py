"""Moving bits: mov with packing and unpacking, cvta, selp, and where an address points."""

from __future__ import annotations

import numpy as np

from ..decode import Form, family
from ..memory import GENERIC, SPACE_BIT
from ..parser import Address, Register, Special, Symbol, Vector
from ..types import TYPES, Fault


@family("mov")
def mov(form: Form):
    type = form.type()
    form.count(2)
    destination, source = form.operands
    if isinstance(source, Vector):
        return _pack(form, type)
    if isinstance(destination, Vector):
        return _unpack(form, type)
    if isinstance(source, Register) and isinstance(destination, Register) and source.type.size == type.size:
        return _copy(form, type)
    if isinstance(source, Special):
        read, name = form.reader(1, type), source.name
        if name.startswith(("%clock", "%globaltimer")):
            return _plain(form, type, lambda b: np.broadcast_to(read(b), b.shape))
    if isinstance(source, (Symbol, Address)) and type.size < 4:
        raise form.unknown(f"an address as .{type.name}")
    return _plain(form, type, form.reader(1, type))


def _plain(form: Form, type, read):
    write = form.writer(0, type)
    return lambda b: write(b, read(b))


def _copy(form: Form, type):
    """A register to a register, whatever it holds: also what a wgmma has not computed yet, or nothing at all."""
    form.reader(1, type)
    form.writer(0, type)
    source, destination = form.operands[1].index, form.operands[0].index
    return lambda b: b.copy(destination, source)


def _part(form: Form, type, count: int):
    if type.size % count or type.size // count not in (1, 2, 4):
        raise form.unknown(f".{type.name} of {count} parts")
    return TYPES[f"b{type.bits // count}"]


def _pack(form: Form, type):
    """mov.b32 d, {low, high}"""
    items = form.vector(1)
    part = _part(form, type, len(items))
    reads = [form.reader(item, part) for item in items]
    write = form.writer(0, TYPES[f"b{type.bits}"])
    wide = f"u{type.size}"

    def run(b):
        value = np.zeros(b.lanes, wide)
        for i, read in enumerate(reads):
            value |= read(b).astype(wide) << np.array(i * part.bits, wide)
        write(b, value)

    return run


def _unpack(form: Form, type):
    """mov.b32 {low, high}, a"""
    items = form.vector(0)
    part = _part(form, type, len(items))
    read = form.reader(1, TYPES[f"b{type.bits}"])
    writes = [form.writer(item, part) for item in items]

    def run(b):
        value = read(b)
        for i, write in enumerate(writes):
            write(b, (value >> np.array(i * part.bits, value.dtype)).astype(part.dtype))

    return run


@family("selp")
def selp(form: Form):
    type = form.type()
    form.count(4)
    a, c, p, write = form.reader(1, type), form.reader(2, type), form.reader(3, "pred"), form.writer(0, type)
    return lambda b: write(b, np.where(p(b), a(b), c(b)))


@family("slct")
def slct(form: Form):
    """d = c >= 0 ? a : b"""
    form.flag("ftz")
    type, by = form.types(2)
    if by.name not in ("s32", "f32"):
        raise form.unknown(f"type .{by.name}")
    form.count(4)
    a, c, x, write = form.reader(1, type), form.reader(2, type), form.reader(3, by), form.writer(0, type)
    return lambda b: write(b, np.where(x(b) >= 0, a(b), c(b)))


@family("cvta")
def cvta(form: Form):
    """To and from generic addresses: the spaces lie at fixed places among them."""
    to = form.flag("to")
    space = form.need("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param").split("::")[0]
    type = form.type("u64 u32")
    form.count(2)
    if type.name == "u32":
        raise form.unknown("a 32-bit generic address")
    read, write = form.reader(1, "u64"), form.writer(0, "u64")
    first, shift = np.uint64(GENERIC["global" if space == "const" else space]), np.uint64(SPACE_BIT)

    def run(b):
        value = read(b)
        if (b.compress(value >> shift) != (first >> shift if to else 0)).any():
            raise Fault(f"an address that is not in {space} memory")
        write(b, value - first if to else value + first)

    return run


@family("isspacep")
def isspacep(form: Form):
    space = form.need("global", "shared", "shared::cta", "shared::cluster", "local", "const", "param").split("::")[0]
    form.count(2)
    if space == "const":
        raise form.unknown("constant memory's window")
    read, write = form.reader(1, "u64"), form.writer(0, "pred")
    window = np.uint64(GENERIC[space] >> SPACE_BIT)
    return lambda b: write(b, read(b) >> np.uint64(SPACE_BIT) == window)


@family("mapa")
def mapa(form: Form):
    """A cluster is one block, whose shared memory has the same addresses in the cluster."""
    window = form.take("shared::cluster")
    type = form.type("u32 u64")
    form.count(3)
    if window is None and type.size != 8:
        raise form.unknown("a generic address of 32 bits")
    read, rank, write = form.reader(1, type), form.reader(2, "u32"), form.writer(0, type)

    def run(b):
        if (b.compress(rank(b)) != 0).any():
            raise Fault("a block beyond the cluster of one")
        write(b, read(b))

    return run


@family("prmt")
def prmt(form: Form):
    """Picks 4 of 8 bytes; bit 3 of a selector repeats the byte's sign instead."""
    mode = form.take("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    form.type("b32")
    form.count(4)
    if mode is not None:
        raise form.unknown(f"mode .{mode}")
    low, high, selector, write = (*(form.reader(i, "u32") for i in (1, 2, 3)), form.writer(0, "u32"))

    def run(b):
        both = low(b).astype(np.uint64) | high(b).astype(np.uint64) << np.uint64(32)
        chosen = selector(b).astype(np.uint64)
        value = np.zeros(b.lanes, np.uint64)
        for i in range(4):
            nibble = (chosen >> np.uint64(4 * i)) & np.uint64(15)
            byte = (both >> ((nibble & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            value |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        write(b, value.astype(np.uint32))

    return run
