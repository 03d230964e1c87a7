"""cvt: between integers, between floats, across, and the packed narrow floats."""

from __future__ import annotations

import numpy as np

from ..decode import Form, family
from ..numerics import FP8, flush, fp8_encode, pack, round_to, unpack
from ..types import TYPES, UNSIGNED, Type

_INTEGER_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@family("cvt")
def cvt(form: Form):
    if form.flag("pack"):
        return _pack_integers(form)
    to, source = form.types(2)
    if to.name.endswith("x2") or source.name.endswith("x2"):
        return _packed(form, to, source)
    if to.kind in "us" and source.kind in "us":
        return _integers(form, to, source)
    if to.kind in "us":
        return _to_integer(form, to, source)
    if source.kind in "us":
        return _from_integer(form, to, source)
    return _floats(form, to, source)


def _limits(type: Type) -> tuple[int, int]:
    return (-(1 << type.bits - 1), (1 << type.bits - 1) - 1) if type.kind == "s" else (0, (1 << type.bits) - 1)


def _clamp(value: np.ndarray, to: Type) -> np.ndarray:
    """An integer of any type -> the nearest that `to` has."""
    low, high = _limits(to)
    own = np.iinfo(value.dtype)
    return np.clip(value, max(low, own.min), min(high, own.max)).astype(to.dtype)


def _integers(form: Form, to: Type, source: Type):
    saturate = form.flag("sat")
    form.count(2)
    x, write = form.reader(1, source, wide=True), form.writer(0, to, wide=True)
    if saturate:
        return lambda b: write(b, _clamp(x(b), to))
    return lambda b: write(b, x(b).astype(to.dtype))


def _to_integer(form: Form, to: Type, source: Type):
    """Out of range gives the nearest integer; NaN gives 0, and for 64 bits on either side 1 << (bits - 1)."""
    if source.name not in ("f16", "bf16", "f32", "f64"):
        raise form.unknown(f"type .{source.name}")
    mode = form.need(*_INTEGER_ROUND)
    ftz = form.flag("ftz")
    form.flag("sat")
    form.count(2)
    x, write = form.reader(1, source), form.writer(0, to, wide=True)
    low, high = _limits(to)
    nan = 1 << (to.bits - 1) if source.name == "f64" or to.size == 8 else 0
    nan_value = np.array(nan, UNSIGNED[to.size]).view(to.dtype)

    def run(b):
        value = unpack(x(b), source)
        if ftz:
            value = flush(value)
        value = _INTEGER_ROUND[mode](value)
        inside = (value >= low) & (value < float(high) + 1)
        out = np.where(inside, value, 0.0).astype(to.dtype)
        out = np.where(inside, out, np.where(value < 0, np.array(low, to.dtype), np.array(high, to.dtype)))
        write(b, np.where(np.isnan(value), nan_value, out).astype(to.dtype))

    return run


def _from_integer(form: Form, to: Type, source: Type):
    if to.name not in ("f16", "bf16", "f32", "f64"):
        raise form.unknown(f"type .{to.name}")
    mode = form.need("rn", "rz", "rm", "rp")
    saturate = form.flag("sat")
    form.count(2)
    if source.size == 8 and (mode != "rn" or to.size == 2):
        raise form.unknown(f".{mode}.{to.name} of 64 bits")
    x, write = form.reader(1, source, wide=True), form.writer(0, to)

    def run(b):
        value = x(b)
        if source.size == 8 and to.name == "f32":
            out = value.astype(np.float32)
        else:
            out = pack(value.astype(np.float64), to, mode)
        write(b, np.clip(out, 0, 1) if saturate else out)

    return run


def _floats(form: Form, to: Type, source: Type):
    names = ("f16", "bf16", "tf32", "f32", "f64")
    if to.name not in names or source.name not in names or source.name == "tf32":
        raise form.unknown(f"type .{to.name}.{source.name}")
    whole = form.take(*_INTEGER_ROUND)
    mode = form.take("rn", "rz", "rm", "rp", "rna")
    if mode == "rna" and to.name != "tf32":
        raise form.unknown(f".rna.{to.name}")
    widening = to.size > source.size or to.name == source.name
    if to.name in ("tf32", "bf16", "f16") and source.name != to.name and mode is None:
        raise form.unknown("a form without rounding")
    if not widening and mode is None and to.name != source.name and whole is None:
        raise form.unknown("a form without rounding")
    ftz, saturate, relu = form.flag("ftz"), form.flag("sat"), form.flag("relu")
    satfinite = form.flag("satfinite")
    form.count(2)
    x, write = form.reader(1, source), form.writer(0, "b32" if to.name == "tf32" else to)

    def run(b):
        value = unpack(np.broadcast_to(x(b), b.shape), source)
        if ftz and source.name == "f32":
            value = flush(value)
        if whole is not None:
            value = _INTEGER_ROUND[whole](value)
        if saturate:
            value = np.where(np.isnan(value), 0.0, np.clip(value, 0.0, 1.0))
        if relu:
            value = np.where(value < 0, 0.0, value)
        if satfinite:
            rounded = round_to(value, to.name, mode or "rn")
            largest = np.where(np.isnan(value), 0, round_to(np.full(value.shape, 1e300), to.name, "rz"))
            value = np.where(np.isinf(rounded), np.copysign(largest, value), rounded)
        out = pack(value, to, mode or "rn")
        write(b, flush(out) if ftz and to.name == "f32" else out)

    return run


def _packed(form: Form, to: Type, source: Type):
    """d = {a to the upper half, b to the lower}, and the pairs of 8-bit floats from and to pairs of 16-bit ones."""
    mode = form.take("rn", "rz")
    if mode is None:
        raise form.unknown("a form without rounding")
    relu, satfinite = form.flag("relu"), form.flag("satfinite")
    narrow = to.name in ("e4m3x2", "e5m2x2")
    if (narrow or source.name in ("e4m3x2", "e5m2x2")) and mode != "rn":
        raise form.unknown(f".{mode}.{to.name}")
    if narrow and not satfinite:
        raise form.unknown("a form without .satfinite")
    if source.name in ("e4m3x2", "e5m2x2"):
        if to.name != "f16x2":
            raise form.unknown(f".{to.name}.{source.name}")
        form.count(2)
        x, write = form.reader(1, source), form.writer(0, to)
        table = FP8[source.name[:-2]]

        def widen(b):
            halves = np.ascontiguousarray(np.broadcast_to(x(b), b.shape)).view(np.uint8).reshape(-1, 2)
            value = table[halves]
            write(b, pack(np.where(value < 0, 0.0, value) if relu else value, to))

        return widen
    if narrow and source.name == "f16x2":
        form.count(2)
        x, write = form.reader(1, source), form.writer(0, to)
        return lambda b: write(b, _narrow(unpack(np.broadcast_to(x(b), b.shape), source), to, relu))
    if source.name != "f32" or to.name not in ("bf16x2", "f16x2", "e4m3x2", "e5m2x2"):
        raise form.unknown(f".{to.name}.{source.name}")
    form.count(3)
    if satfinite and not narrow:
        raise form.unknown(f".satfinite.{to.name}")
    high, low, write = form.reader(1, source), form.reader(2, source), form.writer(0, to)

    def run(b):
        pair = np.empty((b.lanes, 2), np.float32)
        pair[:, 0], pair[:, 1] = low(b), high(b)
        if narrow:
            write(b, _narrow(pair.astype(np.float64), to, relu))
            return
        if relu:
            pair = np.where(pair < 0, np.float32(0), pair)
        # Float32 is what `pack` rounds fastest to bfloat16.
        write(b, pack(pair if to.name == "bf16x2" and mode == "rn" else pair.astype(np.float64), to, mode))

    return run


def _narrow(pair: np.ndarray, to: Type, relu: bool) -> np.ndarray:
    if relu:
        pair = np.where(pair < 0, 0.0, pair)
    return np.ascontiguousarray(fp8_encode(pair, to.name[:-2])).view(np.uint16).reshape(-1)


def _pack_integers(form: Form):
    """cvt.pack.sat.s8.s32.b32 d, a, b, c: d = {low half or 0 of c, a, b}, each clamped."""
    form.need("sat")
    names, form.rest = form.rest, []
    if len(names) not in (2, 3) or names[1] != "s32" or names[0] not in ("s16", "u16", "s8", "u8"):
        raise form.unknown("." + ".".join(names))
    to = TYPES[names[0]]
    third = len(names) == 3
    if third != (to.size == 1):
        raise form.unknown("." + ".".join(names))
    form.count(4 if third else 3)
    x, y, write = form.reader(1, "s32"), form.reader(2, "s32"), form.writer(0, "b32")
    z = form.reader(3, "b32") if third else None
    word = UNSIGNED[to.size]

    def run(b):
        upper, lower = (_clamp(r(b), to).view(word).astype(np.uint32) for r in (x, y))
        value = upper << np.uint32(to.bits) | lower
        if z is not None:
            value = value | z(b) << np.uint32(16)
        write(b, value)

    return run
