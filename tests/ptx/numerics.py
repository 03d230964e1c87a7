"""Number formats and exactly rounded arithmetic, on numpy arrays.

Every float operation is computed in float64 so that one rounding follows: where float64 itself would round, the sum is
rounded to odd, which makes the second rounding harmless (Boldo and Melquiond, "Emulation of FMA and correctly rounded
sums: proved algorithms using rounding to odd", 2008).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .types import Type


@dataclass(frozen=True)
class Format:
    """`precision` counts the hidden bit; `lowest` is the exponent of the smallest normal number."""

    precision: int
    lowest: int
    largest: float


FORMATS = {
    "f32": Format(24, -126, float(np.finfo(np.float32).max)),
    "f16": Format(11, -14, 65504.0),
    "bf16": Format(8, -126, (2 - 2.0**-7) * 2.0**127),
    "tf32": Format(11, -126, (2 - 2.0**-10) * 2.0**127),
    "e4m3": Format(4, -6, 448.0),
    "e5m2": Format(3, -14, 57344.0),
}

_ROUND = {
    "rn": np.rint,
    "rz": np.trunc,
    "rm": np.floor,
    "rp": np.ceil,
    "rna": lambda x: np.copysign(np.floor(np.abs(x) + 0.5), x),
}


def round_to(x: np.ndarray, name: str, mode: str = "rn") -> np.ndarray:
    """Float64 values, rounded to the values that a format has; too large becomes infinite or the largest, by mode."""
    x = np.asarray(x, np.float64)
    form = FORMATS[name]
    finite = np.isfinite(x)
    safe = np.where(finite, x, 0.0)
    quantum = np.maximum(np.frexp(safe)[1], form.lowest + 1) - form.precision
    y = np.ldexp(_ROUND[mode](np.ldexp(safe, -quantum)), quantum)
    over = np.abs(y) > form.largest
    if over.any():
        to_largest = (mode == "rz") | ((mode == "rm") & (y > 0)) | ((mode == "rp") & (y < 0))
        y = np.where(over, np.copysign(np.where(to_largest, form.largest, np.inf), y), y)
    return np.where(finite, y, x)


def _fp8_values(name: str) -> np.ndarray:
    """What each of the 256 codes of e4m3 or e5m2 means (OCP 8-bit Floating Point Specification, section 5)."""
    form = FORMATS[name]
    mantissa_bits = form.precision - 1
    code = np.arange(256)
    exponent, mantissa = (code & 127) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    normal = np.ldexp(1 + mantissa / 2**mantissa_bits, exponent + form.lowest - 1)
    value = np.where(exponent > 0, normal, np.ldexp(mantissa / 2**mantissa_bits, form.lowest))
    if name == "e4m3":
        value[(code & 127) == 127] = np.nan
    else:
        top = exponent == 31
        value[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    return np.where(code >= 128, -value, value)


FP8 = {name: _fp8_values(name) for name in ("e4m3", "e5m2")}


def fp8_encode(x: np.ndarray, name: str) -> np.ndarray:
    """Float64 -> codes, to nearest, saturating (`.satfinite`, the only form there is); NaN is 0x7F."""
    form = FORMATS[name]
    y = np.clip(round_to(np.clip(x, -2 * form.largest, 2 * form.largest), name), -form.largest, form.largest)
    positive = FP8[name][:128]
    positive = positive[np.isfinite(positive)]
    code = np.searchsorted(positive, np.where(np.isnan(y), 0, np.abs(y))) | np.where(np.signbit(y), 128, 0)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)


def bf16(x: np.ndarray) -> np.ndarray:
    """Float values -> bfloat16 bits (uint16), to nearest even; NaN is 0x7FFF as the hardware writes it."""
    x = np.ascontiguousarray(x)
    if x.dtype == np.float64:
        # Not by way of float32, which would round twice.
        with np.errstate(over="ignore"):
            f = round_to(x, "bf16").astype(np.float32)
        return np.where(np.isnan(f), 0x7FFF, f.view(np.uint32) >> 16).astype(np.uint16)
    f = np.ascontiguousarray(x, np.float32)
    u = f.view(np.uint32)
    rounded = (u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(f), np.uint32(0x7FFF), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Bfloat16 bits -> float32 values."""
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def unpack(value: np.ndarray, type: Type) -> np.ndarray:
    """A register's value -> float64: (lanes,), or (lanes, 2) with the low half first for the pairs."""
    if type.kind == "f":
        return value.astype(np.float64)
    name = type.name
    if name.endswith("x2"):
        halves = np.ascontiguousarray(value).view(np.uint16 if type.size == 4 else np.uint8)
        halves = halves.reshape(*np.shape(value), 2)
        if type.size == 2:
            return FP8[name[:-2]][halves]
        return from_bf16(halves).astype(np.float64) if name == "bf16x2" else halves.view(np.float16).astype(np.float64)
    if name == "bf16":
        return from_bf16(value).reshape(np.shape(value)).astype(np.float64)
    if name == "tf32":
        return tf32_values(value).astype(np.float64)
    raise AssertionError(name)


def tf32_values(value: np.ndarray) -> np.ndarray:
    """The tensor core reads the upper 19 bits of a .tf32 register."""
    return (value.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def pack(x: np.ndarray, type: Type, mode: str = "rn") -> np.ndarray:
    """Float64 -> a register's value, rounded once: the inverse of `unpack`."""
    name = type.name
    if name == "f64":
        return x
    if name == "f32":
        y = (x if mode == "rn" else round_to(x, "f32", mode)).astype(np.float32)
        return canonical(y)
    if name in ("f16", "f16x2"):
        y = (x if mode == "rn" else round_to(x, "f16", mode)).astype(np.float16)
        bits = np.where(np.isnan(y), np.uint16(0x7FFF), y.view(np.uint16))
        return np.ascontiguousarray(bits).view(type.dtype).reshape(x.shape[: 1 if type.size == 4 else None])
    if name in ("bf16", "bf16x2"):
        bits = bf16(x if mode == "rn" else round_to(x, "bf16", mode))
        return np.ascontiguousarray(bits).view(type.dtype).reshape(x.shape[: 1 if type.size == 4 else None])
    if name == "tf32":
        return canonical(round_to(x, "tf32", mode).astype(np.float32)).view(np.uint32)
    if name in ("e4m3x2", "e5m2x2"):
        return np.ascontiguousarray(fp8_encode(x, name[:-2])).view(np.uint16).reshape(x.shape[:1])
    raise AssertionError(name)


def canonical(y: np.ndarray) -> np.ndarray:
    """Float32 arithmetic on the device has one NaN: 0x7FFFFFFF."""
    nan = np.isnan(y)
    if nan.any():
        return np.where(nan, np.uint32(0x7FFFFFFF), y.view(np.uint32)).view(np.float32)
    return y


def flush(x: np.ndarray, smallest: float = 2.0**-126) -> np.ndarray:
    """`.ftz`: a float32 that is not normal becomes a zero of its sign."""
    return np.where(np.abs(x) < np.asarray(smallest, x.dtype), np.copysign(np.asarray(0, x.dtype), x), x)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def halves(x):
        c = x * 134217729.0  # 2^27 + 1
        high = c - (c - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = halves(a), halves(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def add_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b in float64, rounded to odd: of the two neighbours of an inexact sum the one with the odd mantissa."""
    s, error = _two_sum(a, b)
    error = np.where(np.isfinite(s), error, 0.0)
    bits = np.ascontiguousarray(s).view(np.int64)
    step = np.where((error > 0) == (s > 0), 1, -1)
    inexact = (error != 0) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).view(np.float64)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float64, rounded once."""
    high, low = _two_product(a, b)
    th, tl = _two_sum(c, low)
    vh, vl = _two_sum(high, th)
    exact = vh + add_odd(tl, vl)
    plain = a * b + c
    return np.where(np.isfinite(plain) & np.isfinite(exact) & (high != 0), exact, plain)


def fma(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z for operands of at most 24 bits, as a float64 that any narrower format can round once more."""
    return add_odd(x * y, z)
