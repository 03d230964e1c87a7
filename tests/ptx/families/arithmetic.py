"""Integer and logic instructions, and comparisons of everything; float forms go on to `floating`."""

from __future__ import annotations

import numpy as np

from ..decode import Form, family
from ..numerics import flush, unpack
from ..types import SIGNED, TYPES, UNSIGNED, Fault, Type
from . import floating

INTEGERS = "u16 s16 u32 s32 u64 s64"
FLOATS = "f16 f16x2 bf16 bf16x2 f32 f64"


def is_float(type: Type) -> bool:
    return type.kind in "fh"


def mul_high(x: np.ndarray, y: np.ndarray, type: Type) -> np.ndarray:
    """The upper half of the product, which has twice the bits."""
    if type.size < 8:
        wide = (SIGNED if type.kind == "s" else UNSIGNED)[2 * type.size]
        return (x.astype(wide) * y.astype(wide) >> wide(type.bits)).astype(type.dtype)
    u, v = x.astype(np.uint64), y.astype(np.uint64)
    low32, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    ul, uh, vl, vh = u & low32, u >> shift, v & low32, v >> shift
    cross = (ul * vl >> shift) + (uh * vl & low32) + (ul * vh & low32)
    high = uh * vh + (uh * vl >> shift) + (ul * vh >> shift) + (cross >> shift)
    if type.kind == "s":
        high = high - np.where(x < 0, v, np.uint64(0)) - np.where(y < 0, u, np.uint64(0))
    return high.astype(np.uint64).view(type.dtype)


def multiply(form: Form, type: Type):
    """Which part of the product `.lo`, `.hi` or `.wide` asks for: (function, type of the result)."""
    part = form.need("lo", "hi", "wide")
    if part == "lo":
        return np.multiply, type
    if part == "hi":
        return lambda x, y: mul_high(x, y, type), type
    if type.size == 8:
        raise form.unknown(".wide of 64 bits")
    wide = TYPES[f"{type.kind}{2 * type.bits}"]
    return lambda x, y: x.astype(wide.dtype) * y.astype(wide.dtype), wide


def _saturate(x, y, f):
    """.sat, for s32 only."""
    exact = f(x.astype(np.int64), y.astype(np.int64))
    return np.clip(exact, -(1 << 31), (1 << 31) - 1).astype(np.int32)


@family("add", "sub")
def add(form: Form):
    (type,) = form.types(1)
    if is_float(type):
        return floating.binary(form, type)
    if form.flag("cc"):
        return _carry(form, type, carry_in=False, carry_out=True)
    f = np.add if form.name == "add" else np.subtract
    saturate = form.flag("sat")
    if type.name not in INTEGERS.split() or (saturate and type.name != "s32"):
        raise form.unknown(f"type .{type.name}")
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)
    if saturate:
        return lambda b: write(b, _saturate(x(b), y(b), f))
    return lambda b: write(b, f(x(b), y(b)))


@family("addc", "subc")
def addc(form: Form):
    type = form.type()
    return _carry(form, type, carry_in=True, carry_out=form.flag("cc"))


def _carry(form: Form, type: Type, carry_in: bool, carry_out: bool):
    if type.name not in ("u32", "s32", "u64", "s64"):
        raise form.unknown(f"type .{type.name}")
    form.count(3)
    unsigned = TYPES[f"u{type.bits}"]
    x, y, write = form.reader(1, unsigned), form.reader(2, unsigned), form.writer(0, unsigned)
    return lambda b: write(b, with_carry(b, x(b), y(b), form.name.startswith("sub"), carry_in, carry_out))


def with_carry(b, x, y, subtract: bool, carry_in: bool, carry_out: bool):
    """x ± y ± the carry, all unsigned; sets the lanes' carry (of a subtraction: the borrow)."""
    if carry_in and b.carry is None:
        raise Fault("the carry is read before it is written")
    c = b.carry.astype(x.dtype) if carry_in else np.zeros(b.lanes, x.dtype)
    if subtract:
        first = x - y
        out = first - c
        carry = (x < y) | (first < c)
    else:
        first = x + y
        out = first + c
        carry = (first < x) | (out < first)
    if carry_out:
        before = np.zeros(b.lanes, np.bool_) if b.carry is None else b.carry
        b.carry = np.where(b.mask, carry, before)
    return out


@family("mul")
def mul(form: Form):
    (type,) = form.types(1)
    if is_float(type):
        return floating.binary(form, type)
    if type.name not in INTEGERS.split():
        raise form.unknown(f"type .{type.name}")
    f, result = multiply(form, type)
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, result)
    return lambda b: write(b, f(x(b), y(b)))


@family("mad")
def mad(form: Form):
    (type,) = form.types(1)
    if is_float(type):
        return floating.fused(form, type)
    if type.name not in INTEGERS.split():
        raise form.unknown(f"type .{type.name}")
    f, result = multiply(form, type)
    saturate = form.flag("sat")
    carry_out = form.flag("cc")
    form.count(4)
    x, y = form.reader(1, type), form.reader(2, type)
    if carry_out:
        return _mad_carry(form, type, f, x, y, False, True)
    z, write = form.reader(3, result), form.writer(0, result)
    if saturate:
        return lambda b: write(b, _saturate(f(x(b), y(b)), z(b), np.add))
    return lambda b: write(b, f(x(b), y(b)) + z(b))


@family("madc")
def madc(form: Form):
    type = form.type("u32 s32 u64 s64")
    f, result = multiply(form, type)
    if result is not type:
        raise form.unknown(".wide")
    form.count(4)
    return _mad_carry(form, type, f, form.reader(1, type), form.reader(2, type), True, form.flag("cc"))


def _mad_carry(form: Form, type: Type, f, x, y, carry_in: bool, carry_out: bool):
    unsigned = TYPES[f"u{type.bits}"]
    z, write = form.reader(3, unsigned), form.writer(0, unsigned)
    product = lambda b: np.broadcast_to(f(x(b), y(b)), b.shape).view(unsigned.dtype)  # noqa: E731
    return lambda b: write(b, with_carry(b, product(b), z(b), False, carry_in, carry_out))


@family("mul24", "mad24")
def mul24(form: Form):
    type = form.type("u32 s32")
    form.need("lo")
    form.count(3 if form.name == "mul24" else 4)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)
    z = form.reader(3, type) if form.name == "mad24" else None
    low = lambda v: (v << 8) >> 8  # noqa: E731
    return lambda b: write(b, low(x(b)) * low(y(b)) + (0 if z is None else z(b)))


@family("div", "rem")
def div(form: Form):
    (type,) = form.types(1)
    if is_float(type):
        if form.name == "rem":
            raise form.unknown(f"type .{type.name}")
        return floating.divide(form, type)
    if type.name not in INTEGERS.split():
        raise form.unknown(f"type .{type.name}")
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)

    def run(b):
        n, d = np.broadcast_arrays(x(b), y(b))
        if (b.compress(d) == 0).any():
            raise Fault("a division by zero")
        d = np.where(d == 0, type.dtype(1), d)
        r = np.fmod(n, d)
        write(b, r if form.name == "rem" else (n - r) // d)

    return run


@family("min", "max")
def extreme(form: Form):
    (type,) = form.types(1)
    if is_float(type):
        return floating.extreme(form, type)
    if type.name not in INTEGERS.split():
        raise form.unknown(f"type .{type.name}")
    relu = form.flag("relu")
    form.count(3)
    f = np.minimum if form.name == "min" else np.maximum
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)
    if relu:
        return lambda b: write(b, np.maximum(f(x(b), y(b)), 0).astype(type.dtype))
    return lambda b: write(b, f(x(b), y(b)))


@family("abs", "neg")
def sign(form: Form):
    (type,) = form.types(1)
    if is_float(type):
        return floating.sign(form, type)
    if type.kind != "s" or type.size == 1:
        raise form.unknown(f"type .{type.name}")
    form.count(2)
    f = np.abs if form.name == "abs" else np.negative
    x, write = form.reader(1, type), form.writer(0, type)
    return lambda b: write(b, f(x(b)))


@family("sad")
def sad(form: Form):
    """|a - b| + c"""
    type = form.type(INTEGERS)
    form.count(4)
    x, y, z, write = *(form.reader(i, type) for i in (1, 2, 3)), form.writer(0, type)

    def run(b):
        u, v = x(b), y(b)
        write(b, np.where(u < v, v - u, u - v) + z(b))

    return run


@family("and", "or", "xor", "not", "cnot")
def logic(form: Form):
    type = form.type("pred b16 b32 b64")
    form.count(2 if form.name in ("not", "cnot") else 3)
    x, write = form.reader(1, type), form.writer(0, type)
    if form.name == "not":
        return lambda b: write(b, ~x(b))
    if form.name == "cnot":
        return lambda b: write(b, (x(b) == 0).astype(type.dtype))
    f = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[form.name]
    y = form.reader(2, type)
    return lambda b: write(b, f(x(b), y(b)))


@family("lop3")
def lop3(form: Form):
    """Any function of three bits: bit (4a + 2b + c) of the table says it."""
    form.type("b32")
    form.count(5)
    table = form.constant(4)
    x, y, z, write = *(form.reader(i, "b32") for i in (1, 2, 3)), form.writer(0, "b32")

    def run(b):
        u, v, w = x(b), y(b), z(b)
        out = np.zeros(b.lanes, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (u if i & 4 else ~u) & (v if i & 2 else ~v) & (w if i & 1 else ~w)
        write(b, out)

    return run


@family("shl", "shr")
def shift(form: Form):
    """Amounts beyond the width act as the width."""
    type = form.type("b16 b32 b64" if form.name == "shl" else "b16 b32 b64 u16 u32 u64 s16 s32 s64")
    form.count(3)
    x, amount, write = form.reader(1, type), form.reader(2, "u32"), form.writer(0, type)
    f = np.left_shift if form.name == "shl" else np.right_shift
    width, dtype = np.uint32(type.bits), type.dtype

    def run(b):
        value, n = x(b), amount(b)
        beyond = n >= width
        if not beyond.any():
            write(b, f(value, n.astype(dtype)))
            return
        shifted = f(value, np.where(beyond, 0, n).astype(dtype))
        fill = value >> dtype(type.bits - 1) if type.kind == "s" else np.array(0, dtype)
        write(b, np.where(beyond, fill, shifted))

    return run


@family("shf")
def funnel(form: Form):
    """shf.l d, a, b, c: the upper word of b:a << c; shf.r: the lower word of b:a >> c."""
    direction, mode = form.need("l", "r"), form.need("clamp", "wrap")
    form.type("b32")
    form.count(4)
    low, high, amount, write = *(form.reader(i, "u32") for i in (1, 2, 3)), form.writer(0, "u32")

    def run(b):
        n = amount(b)
        n = (np.minimum(n, np.uint32(32)) if mode == "clamp" else n & np.uint32(31)).astype(np.uint64)
        both = low(b).astype(np.uint64) | high(b).astype(np.uint64) << np.uint64(32)
        value = both << n >> np.uint64(32) if direction == "l" else both >> n
        if direction == "l":
            value = np.where(n == 32, low(b).astype(np.uint64), value)
        write(b, value.astype(np.uint32))

    return run


def _field(bits: int, position: np.ndarray, length: np.ndarray, dtype) -> np.ndarray:
    """Ones in `length` bits from `position`, cut at the word's end."""
    one, zero, full = dtype(1), dtype(0), dtype((1 << bits) - 1)
    ones = np.where(length >= bits, full, (one << np.minimum(length, bits - 1).astype(dtype)) - one)
    return np.where(position >= bits, zero, ones << np.minimum(position, bits - 1).astype(dtype))


@family("bfe")
def bfe(form: Form):
    type = form.type("u32 s32 u64 s64")
    form.count(4)
    unsigned = UNSIGNED[type.size]
    x, position, length = form.reader(1, f"u{type.bits}"), form.reader(2, "u32"), form.reader(3, "u32")
    write = form.writer(0, f"u{type.bits}")

    def run(b):
        value, p, n = x(b), position(b) & np.uint32(255), length(b) & np.uint32(255)
        field = _field(type.bits, p, n, unsigned)
        inside = np.minimum(p, type.bits - 1).astype(unsigned)
        out = (value & field) >> inside
        if type.kind == "s":
            last = np.clip(p.astype(np.int64) + n - 1, 0, type.bits - 1).astype(unsigned)
            negative = (n > 0) & ((value >> last & unsigned(1)) != 0)
            out = np.where(negative, out | ~(field >> inside), out)
        write(b, out)

    return run


@family("bfi")
def bfi(form: Form):
    type = form.type("b32 b64")
    form.count(5)
    x, y, position, length = (
        form.reader(1, type), form.reader(2, type), form.reader(3, "u32"), form.reader(4, "u32")
    )  # fmt: skip
    write = form.writer(0, type)

    def run(b):
        p, n = position(b) & np.uint32(255), length(b) & np.uint32(255)
        field = _field(type.bits, p, n, type.dtype)
        moved = x(b) << np.minimum(p, type.bits - 1).astype(type.dtype)
        write(b, (y(b) & ~field) | (moved & field))

    return run


def highest_bit(x: np.ndarray) -> np.ndarray:
    """The place of the highest one of an unsigned word, -1 if there is none."""
    out = np.full(np.shape(x), -1, np.int64)
    rest = x.astype(np.uint64)
    for step in (32, 16, 8, 4, 2, 1):
        above = rest >> np.uint64(step) != 0
        out += np.where(above, step, 0)
        rest = np.where(above, rest >> np.uint64(step), rest)
    return out + (rest != 0)


@family("bfind")
def bfind(form: Form):
    """The place of the highest bit that differs from the sign; 0xFFFFFFFF if none. .shiftamt: shifts to get it up."""
    type = form.type("u32 s32 u64 s64")
    shift = form.flag("shiftamt")
    form.count(2)
    x, write = form.reader(1, type), form.writer(0, "u32")

    def run(b):
        value = x(b)
        value = np.where(value < 0, ~value, value) if type.kind == "s" else value
        place = highest_bit(value.view(UNSIGNED[type.size]))
        write(b, np.where(place < 0, -1, type.bits - 1 - place if shift else place).astype(np.int32).view(np.uint32))

    return run


@family("clz")
def clz(form: Form):
    type = form.type("b32 b64")
    form.count(2)
    x, write = form.reader(1, type), form.writer(0, "u32")
    return lambda b: write(b, (type.bits - 1 - highest_bit(x(b))).astype(np.uint32))


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8).reshape(-1, x.dtype.itemsize)


_POPULATION = np.array([bin(i).count("1") for i in range(256)], np.uint32)
_REVERSED = np.array([int(f"{i:08b}"[::-1], 2) for i in range(256)], np.uint8)


@family("popc")
def popc(form: Form):
    type = form.type("b32 b64")
    form.count(2)
    x, write = form.reader(1, type), form.writer(0, "u32")
    return lambda b: write(b, _POPULATION[_bytes(np.broadcast_to(x(b), b.shape))].sum(1, dtype=np.uint32))


@family("brev")
def brev(form: Form):
    type = form.type("b32 b64")
    form.count(2)
    x, write = form.reader(1, type), form.writer(0, type)

    def run(b):
        turned = _REVERSED[_bytes(np.broadcast_to(x(b), b.shape))][:, ::-1]
        write(b, np.ascontiguousarray(turned).view(type.dtype).reshape(-1))

    return run


@family("dp4a")
def dp4a(form: Form):
    """Four byte products and a 32-bit sum."""
    left, right = form.types(2)
    if left.name not in ("u32", "s32") or right.name not in ("u32", "s32"):
        raise form.unknown(f"type .{left.name}.{right.name}")
    form.count(4)
    x, y, z, write = *(form.reader(i, "b32") for i in (1, 2, 3)), form.writer(0, "b32")

    def parts(v, type, b):
        return _bytes(np.broadcast_to(v, b.shape)).view(np.int8 if type.kind == "s" else np.uint8).astype(np.int64)

    def run(b):
        dot = (parts(x(b), left, b) * parts(y(b), right, b)).sum(1)
        write(b, (dot + z(b).astype(np.int64)).astype(np.uint64).astype(np.uint32))

    return run


COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNSIGNED_COMPARE = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def comparison(form: Form, type: Type):
    """Takes the comparison; (x, y) -> truth. Of floats, the ordered are false on NaN, the unordered (`equ`) true."""
    names = [*COMPARE, *UNSIGNED_COMPARE, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"]
    name = form.need(*names)
    if not is_float(type):
        if name in UNSIGNED_COMPARE and type.kind == "u":
            name = UNSIGNED_COMPARE[name]
        if name not in COMPARE or (type.kind == "b" and name not in ("eq", "ne")):
            raise form.unknown(f".{name}.{type.name}")
        return COMPARE[name]
    ftz = form.flag("ftz")

    def run(x, y):
        if type.kind == "h":
            x, y = unpack(x, type), unpack(y, type)
        if ftz and type.name == "f32":
            x, y = flush(x), flush(y)
        unordered = np.isnan(x) | np.isnan(y)
        if name in ("num", "nan"):
            return unordered if name == "nan" else ~unordered
        base = name[:2]
        return COMPARE[base](x, y) & ~unordered if name == base else COMPARE[base](x, y) | unordered

    return run


@family("setp")
def setp(form: Form):
    """p|q = (a cmp b) bool c | !(a cmp b) bool c"""
    (type,) = form.types(1)
    compare = comparison(form, type)
    combine = form.take("and", "or", "xor")
    form.count(3 if combine is None else 4)
    x, y = form.reader(1, type), form.reader(2, type)
    with_predicate = None if combine is None else form.reader(3, "pred")
    f = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor, None: None}[combine]
    first, second = form.pair(0)
    write = form.writer(first, "pred")
    write_second = None if second is None else form.writer(second, "pred")
    pairs = type.name.endswith("x2")
    if pairs and second is None:
        raise form.unknown("one predicate for two comparisons")

    def run(b):
        truth = compare(x(b), y(b))
        c = None if with_predicate is None else with_predicate(b)
        if pairs:
            truth = np.broadcast_to(truth, (*b.shape, 2))
            a, other = truth[:, 0], truth[:, 1]
        else:
            a, other = truth, ~truth
        write(b, a if c is None else f(a, c))
        if write_second is not None:
            write_second(b, other if c is None else f(other, c))

    return run


@family("set")
def set_(form: Form):
    """d = a cmp b, as all ones or 1.0"""
    result, type = form.types(2)
    if result.name not in ("u32", "s32", "f32", "f16x2", "bf16x2", "u16", "s16", "f16", "bf16"):
        raise form.unknown(f"type .{result.name}")
    compare = comparison(form, type)
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, result)
    pairs = type.name.endswith("x2")
    if pairs != (result.name.endswith("x2") or (result.size == 4 and pairs)):
        raise form.unknown(f".{result.name}.{type.name}")
    one = {"f16": 0x3C00, "f16x2": 0x3C00, "bf16": 0x3F80, "bf16x2": 0x3F80, "f32": 0x3F800000}.get(result.name, -1)
    word = UNSIGNED[2 if pairs else result.size]

    def run(b):
        truth = np.broadcast_to(compare(x(b), y(b)), (*b.shape, 2) if pairs else b.shape)
        value = np.where(truth, np.array(one % (1 << 8 * np.dtype(word).itemsize), word), word(0))
        write(b, np.ascontiguousarray(value).view(result.dtype).reshape(b.shape))

    return run
