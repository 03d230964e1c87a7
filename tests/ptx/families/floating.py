"""Float arithmetic in f16, bf16, their pairs, f32 and f64; approximations are computed exactly, then rounded."""

from __future__ import annotations

import numpy as np

from ..decode import Form, family
from ..numerics import add_odd, canonical, flush, fma, fma64, pack, unpack
from ..types import TYPES, Type

HALVES = ("f16", "f16x2", "bf16", "bf16x2")


def _check(form: Form, type: Type, *allowed: str) -> None:
    if type.name not in allowed:
        raise form.unknown(f"type .{type.name}")


def _finish(y: np.ndarray, type: Type, mode: str, ftz: bool, saturate: bool, relu: bool) -> np.ndarray:
    """Float64 results -> the register: clamped, rounded once, flushed."""
    if saturate:
        y = np.where(np.isnan(y), 0.0, np.clip(y, 0.0, 1.0))
    if relu:
        y = np.where(y < 0, 0.0, y)
    value = pack(y, type, mode)
    return flush(value) if ftz and type.name == "f32" else value


class _Modifiers:
    """Rounding, .ftz, .sat and .relu, each where the type has it."""

    def __init__(self, form: Form, type: Type) -> None:
        self.type = type
        self.mode = form.take("rn", "rz", "rm", "rp") or "rn"
        if type.name in HALVES and self.mode != "rn":
            raise form.unknown(f".{self.mode}.{type.name}")
        self.ftz = form.flag("ftz")
        if self.ftz and type.name not in ("f32", "f16", "f16x2"):
            raise form.unknown(f".ftz.{type.name}")
        self.saturate = form.flag("sat")
        if self.saturate and type.name not in ("f32", "f16", "f16x2"):
            raise form.unknown(f".sat.{type.name}")
        self.relu = type.name in HALVES and form.flag("relu")
        self.plain = self.mode == "rn" and not (self.ftz or self.saturate or self.relu)

    def input(self, x: np.ndarray) -> np.ndarray:
        x = unpack(x, self.type)
        if not self.ftz:
            return x
        return flush(x, 2.0**-126 if self.type.name == "f32" else 2.0**-14)

    def output(self, y: np.ndarray) -> np.ndarray:
        value = _finish(y, self.type, self.mode, self.ftz, self.saturate, self.relu)
        if self.ftz and self.type.name != "f32":
            small = np.abs(unpack(value, self.type)) < 2.0**-14
            bits = np.ascontiguousarray(value).view(np.uint16).reshape(small.shape)
            return np.where(small, bits & np.uint16(0x8000), bits).view(value.dtype).reshape(value.shape)
        return value


def binary(form: Form, type: Type):
    """add, sub, mul"""
    _check(form, type, *HALVES, "f32", "f64")
    m = _Modifiers(form, type)
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)
    native = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[form.name]
    if m.plain and type.name == "f32":
        return lambda b: write(b, canonical(native(x(b), y(b))))
    if m.plain and type.name == "f64":
        return lambda b: write(b, native(x(b), y(b)))
    if type.name == "f64":
        raise form.unknown(f".{m.mode}.f64")
    exact = {"add": add_odd, "sub": lambda u, v: add_odd(u, -v), "mul": np.multiply}[form.name]

    def run(b):
        u, v = x(b), y(b)
        write(b, m.output(exact(m.input(np.broadcast_to(u, b.shape)), m.input(np.broadcast_to(v, b.shape)))))

    return run


@family("fma")
def fused_family(form: Form):
    (type,) = form.types(1)
    return fused(form, type)


def fused(form: Form, type: Type):
    """a * b + c, rounded once"""
    _check(form, type, *HALVES, "f32", "f64")
    if not any(mode in form.rest for mode in ("rn", "rz", "rm", "rp")):
        raise form.unknown("a form without rounding")
    m = _Modifiers(form, type)
    form.count(4)
    x, y, z, write = *(form.reader(i, type) for i in (1, 2, 3)), form.writer(0, type)
    if type.name == "f64":
        if not m.plain:
            raise form.unknown(f".{m.mode}.f64")
        return lambda b: write(b, fma64(*np.broadcast_arrays(x(b), y(b), z(b))))

    def run(b):
        u, v, w = (m.input(np.broadcast_to(r(b), b.shape)) for r in (x, y, z))
        write(b, m.output(fma(u, v, w)))

    return run


def divide(form: Form, type: Type):
    """div.rn, and the approximations .approx and .full"""
    _check(form, type, "f32", "f64")
    approximate = form.take("approx", "full")
    if approximate is None:
        form.need("rn")
    elif type.name == "f64":
        raise form.unknown(f".{approximate}.f64")
    ftz = form.flag("ftz")
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)

    def run(b):
        u, v = x(b), y(b)
        if ftz:
            u, v = flush(u), flush(v)
        q = u / v
        q = canonical(q) if type.name == "f32" else q
        write(b, flush(q) if ftz else q)

    return run


_FUNCTIONS = {
    "rcp": lambda x: 1.0 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@family(*_FUNCTIONS)
def function(form: Form):
    """rcp and sqrt have an exact form (.rn); all have .approx, which is computed as exactly as float64 can."""
    (type,) = form.types(1)
    name = form.name
    if name in ("ex2", "tanh"):
        _check(form, type, "f32", *HALVES)
    elif name in ("rcp", "sqrt", "rsqrt"):
        _check(form, type, "f32", "f64")
    else:
        _check(form, type, "f32")
    if form.take("rn") is not None:
        if name not in ("rcp", "sqrt"):
            raise form.unknown(f"{name}.rn")
    else:
        form.need("approx")
    ftz = form.flag("ftz")
    form.count(2)
    x, write, f = form.reader(1, type), form.writer(0, type), _FUNCTIONS[name]

    def run(b):
        value = x(b)
        if ftz and type.name == "f32":
            value = flush(value)
        # In float64 a quotient or root has more than twice the bits of float32, so that a second rounding is harmless.
        out = pack(f(unpack(np.broadcast_to(value, b.shape), type)), type)
        write(b, flush(out) if ftz and type.name == "f32" else out)

    return run


def _signs(type: Type) -> tuple[type, int]:
    """The word that holds the type's bits, and its sign bits."""
    signs = {2: 0x8000, 4: 0x80008000 if type.name.endswith("x2") else 0x80000000, 8: 1 << 63}
    return TYPES[f"u{type.bits}"].dtype, signs[type.size]


def sign(form: Form, type: Type):
    """abs, neg: of the sign bit alone"""
    _check(form, type, *HALVES, "f32", "f64")
    ftz = form.flag("ftz")
    form.count(2)
    word, bits = _signs(type)
    x, write = form.reader(1, TYPES[f"b{type.bits}"]), form.writer(0, TYPES[f"b{type.bits}"])
    if ftz and type.name not in ("f32", "f16", "f16x2"):
        raise form.unknown(f".ftz.{type.name}")
    if ftz and type.name != "f32":
        raise form.unknown(f".ftz.{type.name}")
    f = (lambda v: v & word(~bits & ((1 << type.bits) - 1))) if form.name == "abs" else (lambda v: v ^ word(bits))

    def run(b):
        out = f(x(b))
        write(b, flush(out.view(np.float32)).view(word) if ftz else out)

    return run


@family("copysign")
def copysign(form: Form):
    """d = b with the sign of a"""
    (type,) = form.types(1)
    _check(form, type, "f32", "f64")
    form.count(3)
    a, magnitude, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)
    return lambda b: write(b, np.copysign(magnitude(b), a(b)))


def extreme(form: Form, type: Type):
    """min, max: a number wins over NaN, unless .NaN; -0 is below +0."""
    _check(form, type, *HALVES, "f32", "f64")
    ftz, nan = form.flag("ftz"), form.flag("NaN")
    signed = form.flag("xorsign")
    if signed:
        form.need("abs")
    form.count(3)
    x, y, write = form.reader(1, type), form.reader(2, type), form.writer(0, type)
    upper = form.name == "max"

    def run(b):
        u, v = (unpack(np.broadcast_to(r(b), b.shape), type) for r in (x, y))
        if ftz:
            least = 2.0**-126 if type.name == "f32" else 2.0**-14
            u, v = flush(u, least), flush(v, least)
        negative = np.signbit(u) ^ np.signbit(v)
        if signed:
            u, v = np.abs(u), np.abs(v)
        both = np.where(np.signbit(u) if upper else np.signbit(v), v, u)
        best = np.where(u == v, both, np.where((u > v) == upper, u, v))
        best = np.where(np.isnan(u), v, np.where(np.isnan(v), u, best))
        if nan:
            best = np.where(np.isnan(u) | np.isnan(v), np.nan, best)
        if signed:
            best = np.copysign(best, np.where(negative, -1.0, 1.0))
        write(b, pack(best, type))

    return run


@family("testp")
def testp(form: Form):
    (type,) = form.types(1)
    _check(form, type, "f32", "f64")
    what = form.need("finite", "infinite", "number", "notanumber", "normal", "subnormal")
    form.count(2)
    x, write = form.reader(1, type), form.writer(0, "pred")
    tiny = np.finfo(type.dtype).tiny

    def run(b):
        v = x(b)
        size = np.abs(v)
        truth = {
            "finite": np.isfinite(v),
            "infinite": np.isinf(v),
            "number": ~np.isnan(v),
            "notanumber": np.isnan(v),
            "normal": np.isfinite(v) & (size >= tiny),
            "subnormal": (size < tiny) & (size > 0),
        }[what]
        write(b, truth)

    return run
