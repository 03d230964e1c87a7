"""The interpreter's own case table: one instruction each, on random numbers and edges, and what it should give.

The references owe nothing to the interpreter: Python integers, rational numbers, numpy and torch.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch

from tests import ptx

N = 96
TYPES = {
    "h": ("short", np.int16),
    "H": ("unsigned short", np.uint16),
    "r": ("int", np.int32),
    "R": ("unsigned", np.uint32),
    "l": ("long long", np.int64),
    "L": ("unsigned long long", np.uint64),
    "f": ("float", np.float32),
    "d": ("double", np.float64),
}
EDGES = [0, 1, 2, 7, 31, 32, 33, 255, 256, *(s * (1 << n) - (s > 0) for n in (15, 31, 63) for s in (1, -1)), -1]
FLOAT_EDGES = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, -1e-40, 3e38, 0.5, 2.5, 1.5, 65520.0, 1 + 2.0**-9]


def signed(v: int, width: int) -> int:
    v %= 1 << width
    return v - (1 << width) if v >> (width - 1) else v


def each(f, dtype):
    """A function of Python ints -> of arrays, wrapped to the type."""

    def run(*arrays):
        width = 8 * np.dtype(dtype).itemsize
        out = [f(*(int(v) for v in row)) % (1 << width) for row in zip(*arrays, strict=True)]
        return np.array(out, f"u{width // 8}").view(dtype)

    return run


def trunc_div(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def field(v, pos, length, width, is_signed):
    """bfe, as the ISA writes it down."""
    v, pos, length = v % (1 << width), pos & 255, length & 255
    sign = (v >> min(pos + length - 1, width - 1)) & 1 if is_signed and length else 0
    out = 0
    for i in range(width):
        out |= ((v >> (pos + i)) & 1 if i < length and pos + i < width else sign) << i
    return out


def insert(a, b, pos, length, width):
    pos, length = pos & 255, length & 255
    a, b = a % (1 << width), b % (1 << width)
    for i in range(length):
        if pos + i < width:
            b = b & ~(1 << (pos + i)) | ((a >> i) & 1) << (pos + i)
    return b


def permute(a, b, s):
    data = (a % (1 << 32)) | (b % (1 << 32)) << 32
    out = 0
    for i in range(4):
        n = (s >> 4 * i) & 15
        byte = (data >> 8 * (n & 7)) & 255
        out |= (255 * (byte >> 7) if n & 8 else byte) << 8 * i
    return out


def t_bf16(x):
    return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(torch.bfloat16)


def t_bits(t):
    return t.view(torch.int16).numpy().view(np.uint16)


def pairs_bf16(high, low):
    return t_bits(t_bf16(high)).astype(np.uint32) << 16 | t_bits(t_bf16(low))


def f16_bits(x):
    return np.ascontiguousarray(x).astype(np.float16).view(np.uint16)


def bf16x2(f):
    def run(*words):
        halves = [np.ascontiguousarray(w).view(np.uint16) for w in words]
        values = [torch.from_numpy(h.view(np.int16).copy()).view(torch.bfloat16).double().numpy() for h in halves]
        # Float64 -> bfloat16 in one step: torch goes by way of float32, which rounds twice.
        return ptx.bf16(f(*values)).view(np.uint32)

    return run


def f16x2(f):
    def run(*words):
        values = [np.ascontiguousarray(w).view(np.float16).astype(np.float64) for w in words]
        return f(*values).astype(np.float16).view(np.uint16).reshape(-1, 2).copy().view(np.uint32).reshape(-1)

    return run


def exact_fma(a, b, c):
    """x y + z in rational arithmetic, then the nearest float32, ties to even."""
    out = []
    for x, y, z in zip(a, b, c, strict=True):
        if not np.isfinite([x, y, z]).all():
            out.append(x * y + z)
            continue
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        if exact == 0:
            out.append(x * y + z)
        elif abs(exact) >= 2**128 - 2**103:
            out.append(np.inf if exact > 0 else -np.inf)
        else:
            near = np.float32(max(min(float(exact), 3.4e38), -3.4e38))
            around = [near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))]
            out.append(min(around, key=lambda v: (abs(Fraction(float(v)) - exact), v.view(np.uint32) & 1)))
    return np.array(out, np.float32)


def shift_left(a, n):
    return a << min(n, 64)


def fmin(a, b):
    return np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.where((a < b) | ((a == b) & np.signbit(a)), a, b)))


def to_int(round_, low, high):
    def run(x):
        y = round_(x.astype(np.float64))
        return np.where(np.isnan(y), 0, np.clip(y, low, high)).astype(np.int64).astype(np.int32)

    return run


def exact_fma64(a, b, c):
    """x y + z in rational arithmetic; Python's float of a Fraction is the nearest, ties to even."""
    out = []
    for x, y, z in zip(a, b, c, strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) if np.isfinite([x, y, z]).all() else 0
        out.append(float(exact) if exact else x * y + z)
    return np.array(out)


def toward_zero(x):
    f = x.astype(np.float32)
    return np.where(np.abs(f.astype(np.float64)) > np.abs(x), np.nextafter(f, np.float32(0)), f)


def upward(x):
    f = x.astype(np.float32)
    return np.where(f.astype(np.float64) < x, np.nextafter(f, np.float32(np.inf)), f)


def flushed(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def pairs_fp8(dtype, largest):
    def run(high, low):
        codes = [
            torch.from_numpy(np.clip(x, -largest, largest)).to(dtype).view(torch.uint8).numpy() for x in (high, low)
        ]
        return codes[0].astype(np.uint16) << 8 | codes[1]

    return run


def from_fp8(dtype):
    def run(words):
        values = torch.from_numpy(words.view(np.uint8).copy()).view(dtype).to(torch.float16)
        codes = np.where(np.isnan(values.numpy()), 0x7FFF, values.view(torch.int16).numpy().view(np.uint16))
        return codes.astype(np.uint16).view(np.uint32)

    return run


def dot_of_bytes(a, b, c):
    a, b = a.view(np.int8).reshape(-1, 4).astype(np.int64), b.view(np.uint8).reshape(-1, 4)
    return ((a * b).sum(1) + c).astype(np.int32)


def packed_bytes(a, b, c):
    a, b = (np.clip(x, -128, 127).astype(np.int8).view(np.uint8).astype(np.uint32) for x in (a, b))
    return c << 16 | a << 8 | b


def to_u64(x):
    out = [0 if v <= 0 else 2**64 - 1 if v >= 2**64 else 1 << 63 if v != v else int(v) for v in x.tolist()]
    return np.array(out, np.uint64)


def predicate(text):
    """The truth of p, with q to combine it with."""
    return f"{{ .reg .pred p, q; {text}; selp.s32 %0, 1, 0, p; }}"


THREE_WORDS = "{ .reg .u32 t; add.cc.u32 t, %1, %2; addc.cc.u32 t, %3, -1; addc.u32 %0, 0, 0; }"
# (instruction, or PTX text with its places; result; operands; reference)
CASES = [
    ("add.s32", "r", "rr", each(lambda a, b: a + b, np.int32)),
    ("add.sat.s32", "r", "rr", each(lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a + b)), np.int32)),
    ("add.s16", "h", "hh", each(lambda a, b: a + b, np.int16)),
    ("sub.s64", "l", "ll", each(lambda a, b: a - b, np.int64)),
    ("mul.lo.s32", "r", "rr", each(lambda a, b: a * b, np.int32)),
    ("mul.lo.s64", "l", "ll", each(lambda a, b: a * b, np.int64)),
    ("mul.hi.s32", "r", "rr", each(lambda a, b: a * b >> 32, np.int32)),
    ("mul.hi.u32", "R", "RR", each(lambda a, b: a * b >> 32, np.uint32)),
    ("mul.hi.s64", "l", "ll", each(lambda a, b: a * b >> 64, np.int64)),
    ("mul.hi.u64", "L", "LL", each(lambda a, b: a * b >> 64, np.uint64)),
    ("mul.wide.s32", "l", "rr", each(lambda a, b: a * b, np.int64)),
    ("mul.wide.u16", "R", "HH", each(lambda a, b: a * b, np.uint32)),
    ("mad.lo.s32", "r", "rrr", each(lambda a, b, c: a * b + c, np.int32)),
    ("mad.hi.u32", "R", "RRR", each(lambda a, b, c: (a * b >> 32) + c, np.uint32)),
    ("mad.wide.u32", "L", "RRL", each(lambda a, b, c: a * b + c, np.uint64)),
    ("div.s32", "r", "rr!", each(trunc_div, np.int32)),
    ("div.u32", "R", "RR!", each(lambda a, b: a // b, np.uint32)),
    ("rem.s64", "l", "ll!", each(lambda a, b: a - b * trunc_div(a, b), np.int64)),
    ("min.s32", "r", "rr", np.minimum),
    ("max.u64", "L", "LL", np.maximum),
    ("abs.s32", "r", "r", each(abs, np.int32)),
    ("neg.s64", "l", "l", each(lambda a: -a, np.int64)),
    ("sad.s32", "r", "rrr", each(lambda a, b, c: abs(a - b) + c, np.int32)),
    ("and.b32", "R", "RR", np.bitwise_and),
    ("xor.b64", "L", "LL", np.bitwise_xor),
    ("not.b32", "R", "R", np.invert),
    ("lop3.b32", "R", "RRR", each(lambda a, b, c: a & b ^ ~c, np.uint32), "0x95"),
    ("shl.b32", "R", "RR", each(lambda a, n: shift_left(a, n), np.uint32)),
    ("shl.b64", "L", "LR", each(lambda a, n: shift_left(a, n), np.uint64)),
    ("shr.u32", "R", "RR", each(lambda a, n: a >> min(n, 64), np.uint32)),
    ("shr.s32", "r", "rR", each(lambda a, n: a >> min(n, 64), np.int32)),
    ("shr.s64", "l", "lR", each(lambda a, n: a >> min(n, 64), np.int64)),
    ("shf.l.wrap.b32", "R", "RRR", each(lambda a, b, n: (b << 32 | a) << (n & 31) >> 32, np.uint32)),
    ("shf.l.clamp.b32", "R", "RRR", each(lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32, np.uint32)),
    ("shf.r.wrap.b32", "R", "RRR", each(lambda a, b, n: (b << 32 | a) >> (n & 31), np.uint32)),
    ("shf.r.clamp.b32", "R", "RRR", each(lambda a, b, n: (b << 32 | a) >> min(n, 32), np.uint32)),
    ("bfe.u32", "R", "RRR", each(lambda a, p, n: field(a, p, n, 32, False), np.uint32)),
    ("bfe.s32", "r", "rRR", each(lambda a, p, n: field(a, p, n, 32, True), np.int32)),
    ("bfe.s64", "l", "lRR", each(lambda a, p, n: field(a, p, n, 64, True), np.int64)),
    ("bfi.b32", "R", "RRRR", each(lambda a, b, p, n: insert(a, b, p, n, 32), np.uint32)),
    ("bfi.b64", "L", "LLRR", each(lambda a, b, p, n: insert(a, b, p, n, 64), np.uint64)),
    ("bfind.u32", "R", "R", each(lambda a: a.bit_length() - 1, np.uint32)),
    ("bfind.s32", "R", "r", each(lambda a: (~a if a < 0 else a).bit_length() - 1, np.uint32)),
    ("bfind.shiftamt.u32", "R", "R", each(lambda a: 32 - a.bit_length() if a else -1, np.uint32)),
    ("clz.b32", "R", "R", each(lambda a: 32 - a.bit_length(), np.uint32)),
    ("clz.b64", "R", "L", each(lambda a: 64 - a.bit_length(), np.uint32)),
    ("popc.b64", "R", "L", each(lambda a: bin(a).count("1"), np.uint32)),
    ("brev.b32", "R", "R", each(lambda a: int(f"{a:032b}"[::-1], 2), np.uint32)),
    ("prmt.b32", "R", "RRR", each(permute, np.uint32)),
    ("mul24.lo.s32", "r", "rr", each(lambda a, b: signed(a, 24) * signed(b, 24), np.int32)),
    ("add.f32", "f", "ff", lambda a, b: a + b),
    ("sub.rn.f32", "f", "ff", lambda a, b: a - b),
    ("mul.f64", "d", "dd", lambda a, b: a * b),
    ("div.rn.f32", "f", "ff", lambda a, b: a / b),
    ("sqrt.rn.f32", "f", "f", np.sqrt),
    ("rcp.approx.ftz.f32", "f", "F", lambda a: 1 / a),
    ("ex2.approx.ftz.f32", "f", "F", np.exp2),
    ("lg2.approx.f32", "f", "F", np.log2),
    ("rsqrt.approx.f32", "f", "F", lambda a: 1 / np.sqrt(a)),
    ("tanh.approx.f32", "f", "F", lambda a: np.tanh(a.astype(np.float64)).astype(np.float32)),
    ("fma.rn.f32", "f", "fff", exact_fma),
    ("abs.f32", "f", "f", np.abs),
    ("neg.f32", "f", "f", np.negative),
    ("min.f32", "f", "ff", fmin),
    ("max.f32", "f", "ff", lambda a, b: -fmin(-a, -b)),
    ("max.NaN.f32", "f", "ff", lambda a, b: np.where(np.isnan(a) | np.isnan(b), np.nan, -fmin(-a, -b))),
    ("copysign.f32", "f", "ff", lambda a, b: np.copysign(b, a)),
    ("cvt.rni.s32.f32", "r", "f", to_int(np.rint, -(2**31), 2**31 - 1)),
    ("cvt.rzi.s32.f32", "r", "f", to_int(np.trunc, -(2**31), 2**31 - 1)),
    ("cvt.rmi.s32.f32", "r", "f", to_int(np.floor, -(2**31), 2**31 - 1)),
    ("cvt.rpi.u32.f32", "r", "f", to_int(np.ceil, 0, 2**32 - 1)),
    ("cvt.rni.f32.f32", "f", "f", np.rint),
    ("cvt.sat.f32.f32", "f", "f", lambda a: np.where(np.isnan(a), 0, np.clip(a, 0, 1))),
    ("cvt.rn.f32.s32", "f", "r", lambda a: a.astype(np.float32)),
    ("cvt.rn.f32.u64", "f", "L", lambda a: a.astype(np.float32)),
    ("cvt.rn.f64.s64", "d", "l", lambda a: a.astype(np.float64)),
    ("cvt.rn.f32.f64", "f", "d", lambda a: a.astype(np.float32)),
    ("cvt.f64.f32", "d", "f", lambda a: a.astype(np.float64)),
    ("cvt.s64.s32", "l", "r", lambda a: a.astype(np.int64)),
    ("cvt.u64.u32", "L", "R", lambda a: a.astype(np.uint64)),
    ("cvt.s32.s8", "r", "r", lambda a: a.astype(np.int8).astype(np.int32)),
    ("cvt.u32.u16", "R", "R", lambda a: a.astype(np.uint16).astype(np.uint32)),
    ("cvt.sat.u8.s32", "r", "r", lambda a: np.clip(a, 0, 255)),
    ("cvt.rn.f16.f32", "H", "f", lambda a: np.where(np.isnan(a), 0x7FFF, f16_bits(a))),
    ("cvt.rn.bf16.f32", "H", "f", lambda a: np.where(np.isnan(a), 0x7FFF, t_bits(t_bf16(a)))),
    ("cvt.rn.bf16x2.f32", "R", "FF", pairs_bf16),
    ("cvt.rn.f16x2.f32", "R", "FF", lambda a, b: f16_bits(a).astype(np.uint32) << 16 | f16_bits(b)),
    ("cvt.rn.relu.bf16x2.f32", "R", "FF", lambda a, b: pairs_bf16(np.maximum(a, 0), np.maximum(b, 0))),
    ("cvt.rz.bf16x2.f32", "R", "FF", lambda a, b: (a.view(np.uint32) & 0xFFFF0000) | b.view(np.uint32) >> 16),
    ("cvt.rna.tf32.f32", "R", "F", lambda a: (a.view(np.uint32) + 0x1000) & 0xFFFFE000),
    ("cvt.f32.f16", "f", "H", lambda a: a.view(np.float16).astype(np.float32)),
    ("add.f16x2", "R", "RR", f16x2(lambda a, b: a + b)),
    ("mul.f16x2", "R", "RR", f16x2(lambda a, b: a * b)),
    ("fma.rn.f16x2", "R", "PPP", f16x2(lambda a, b, c: a * b + c)),
    ("fma.rn.bf16x2", "R", "PPP", bf16x2(lambda a, b, c: a * b + c)),
    ("max.bf16x2", "R", "PP", bf16x2(np.maximum)),
    ("neg.bf16x2", "R", "P", lambda a: a ^ 0x80008000),
    ("add.bf16x2", "R", "PP", bf16x2(lambda a, b: a + b)),
    ("mul.bf16x2", "R", "PP", bf16x2(lambda a, b: a * b)),
    ("cvt.rn.satfinite.e4m3x2.f32", "H", "EE", pairs_fp8(torch.float8_e4m3fn, 448)),
    ("cvt.rn.satfinite.e5m2x2.f32", "H", "EE", pairs_fp8(torch.float8_e5m2, 57344)),
    ("cvt.rn.f16x2.e4m3x2", "R", "H", from_fp8(torch.float8_e4m3fn)),
    ("cvt.rn.f16x2.e5m2x2", "R", "H", from_fp8(torch.float8_e5m2)),
    ("dp4a.s32.u32", "r", "RRr", dot_of_bytes),
    ("copysign.f64", "d", "dd", lambda a, b: np.copysign(b, a)),
    ("fma.rn.f64", "d", "ddd", exact_fma64),
    ("add.rz.f32", "f", "FF", lambda a, b: toward_zero(a.astype(np.float64) + b)),
    ("mul.rm.f32", "f", "FF", lambda a, b: -upward(-(a.astype(np.float64) * b))),
    ("fma.rp.f32", "f", "FFG", lambda a, b, c: upward(a.astype(np.float64) * b + c)),
    ("mul.ftz.f32", "f", "ff", lambda a, b: flushed(flushed(a) * flushed(b))),
    ("{ add.cc.u32 %0, %1, %2; addc.u32 %0, %3, 0; }", "R", "RRR", each(lambda a, b, c: c + (a + b >> 32), np.uint32)),
    (THREE_WORDS, "R", "RRR", each(lambda a, b, c: c + 0xFFFFFFFF + (a + b >> 32) >> 32, np.uint32)),
    ("add.sat.f32", "f", "ff", lambda a, b: np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1))),
    ("{ sub.cc.u32 %0, %1, %2; subc.u32 %0, %3, 0; }", "R", "RRR", each(lambda a, b, c: c - (a < b), np.uint32)),
    (
        "{ mad.lo.cc.u32 %0, %1, %2, %3; madc.hi.u32 %0, %1, %2, 0; }",
        "R",
        "RRR",
        each(lambda a, b, c: a * b + c >> 32, np.uint32),
    ),
    (predicate("setp.ltu.f32 p, %1, %2"), "r", "ff", lambda a, b: ~(a >= b)),
    (predicate("setp.gt.f32 p, %1, %2"), "r", "ff", lambda a, b: a > b),
    (predicate("setp.nan.f32 p, %1, %2"), "r", "ff", lambda a, b: np.isnan(a) | np.isnan(b)),
    (predicate("setp.hi.u32 p, %1, %2"), "r", "RR", lambda a, b: a > b),
    (predicate("setp.ne.s32 q, %1, 0; setp.lt.and.s32 p, %1, %2, q"), "r", "rr", lambda a, b: (a < b) & (a != 0)),
    (predicate("setp.ne.s32 q, %1, 0; setp.le.xor.s64 p, %2, 5, !q"), "r", "rl", lambda a, b: (b <= 5) ^ (a == 0)),
    (predicate("setp.ge.s32 q|p, %1, %2"), "r", "rr", lambda a, b: a < b),
    (predicate("setp.lt.bf16 p, %1, %2"), "r", "HH", lambda a, b: ptx.from_bf16(a) < ptx.from_bf16(b)),
    (predicate("testp.subnormal.f32 p, %1"), "r", "f", lambda a: (np.abs(a) < 2.0**-126) & (a != 0)),
    ("slct.f32.s32", "f", "ffr", lambda a, b, c: np.where(c >= 0, a, b)),
    ("set.lt.u32.f32", "R", "ff", lambda a, b: np.where(a < b, 0xFFFFFFFF, 0)),
    ("cvt.pack.sat.s8.s32.b32", "R", "rrR", packed_bytes),
    ("{.reg.b16 l,h; mov.b32 {l,h}, %1; mov.b32 %0, {h, l}; }", "R", "R", lambda a: a << 16 | a >> 16),
    ("{ .reg .b8 x; cvt.u8.u32 x, %1; cvt.s32.s8 %0, x; }", "r", "R", lambda a: a.astype(np.uint8).view(np.int8)),
    ("cvt.rzi.u64.f32", "L", "f", lambda a: to_u64(a)),
    ("cvt.rn.f16.s32", "H", "r", lambda a: f16_bits(a.astype(np.float64))),
    ("rem.u32", "R", "RR!", lambda a, b: a % b),
]


def inputs(kinds: str, rng: np.random.Generator) -> list[np.ndarray]:
    """Random numbers and edges.

    `F`: tame floats, `G`: tiny ones, `E`: floats around the range of 8-bit ones, `P`: a word of two tame halves, `!`:
    the one before is not zero.
    """
    out = []
    for kind in kinds:
        if kind == "!":
            out[-1] = np.where(out[-1] == 0, np.array(3, out[-1].dtype), out[-1])
        elif kind in "fd":
            x = rng.standard_normal(N) * 10.0 ** rng.integers(-3, 4, N)
            x[: len(FLOAT_EDGES)] = rng.permutation(FLOAT_EDGES)
            out.append(x.astype(TYPES[kind][1]))
        elif kind in "FGE":
            scale = {"F": 1.0, "G": 1e-6, "E": 10.0 ** rng.integers(-3, 4, N)}[kind]
            out.append((rng.standard_normal(N) * scale).astype(np.float32))
        elif kind == "P":
            # Halves that are tame numbers in f16 and in bf16.
            half = rng.integers(0x3C00, 0x4400, (N, 2)) | rng.integers(0, 2, (N, 2)) << 15
            out.append(half.astype(np.uint16).view(np.uint32).reshape(-1))
        else:
            dtype = TYPES[kind][1]
            x = rng.integers(0, 256, (N, 8), np.uint8).view(np.uint64).reshape(-1) >> rng.integers(0, 64, N, np.uint64)
            x[: len(EDGES)] = rng.permutation(np.array([e % (1 << 64) for e in EDGES], np.uint64))
            out.append(x.astype(f"u{np.dtype(dtype).itemsize}").view(dtype))
    return out


def asm_kernel(name: str, instruction: str, result: str, kinds: str, extra: str = "") -> str:
    kinds = kinds.replace("!", "").translate(str.maketrans("FGEP", "fffR"))
    letters = "abcd"[: len(kinds)]
    arguments = ", ".join(f"const {TYPES[k][0]}* {x}" for k, x in zip(kinds, letters, strict=True))
    given = ", ".join(f'"{k.lower()}"({x}[i])' for k, x in zip(kinds, letters, strict=True))
    places = ", ".join(f"%{i}" for i in range(1 + len(kinds))) + (f", {extra}" if extra else "")
    text = instruction if "%0" in instruction else f"{instruction} {places};"
    return (
        f'extern "C" __global__ void {name}({arguments}, {TYPES[result][0]}* out) {{ int i = threadIdx.x;'
        f' {TYPES[result][0]} y; asm volatile("{text}" : "={result.lower()}"(y) : {given});'
        f" out[i] = y; }}\n"
    )
