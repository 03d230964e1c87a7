"""wgmma.fence, .commit_group, .wait_group and .mma_async; tests/ptx/wgmma.py has the layout of a shared matrix."""

from __future__ import annotations

import numpy as np

from ..decode import Form, Kind, Step, family
from ..numerics import pack
from ..parser import Immediate, Register, Vector
from ..types import TYPES, Fault
from ..wgmma import WARPGROUP, Descriptor
from .matrix import ELEMENTS, GROUP, T, fragment_a

_K = {"bf16": 16, "f16": 16, "tf32": 8, "e4m3": 32, "e5m2": 32, "s8": 32, "u8": 32}


@family("wgmma")
def wgmma(form: Form) -> Step:
    what = form.need("fence", "commit_group", "wait_group", "mma_async")
    form.need("sync")
    form.need("aligned")
    if what == "mma_async":
        return _mma(form)
    if what == "wait_group":
        form.count(1)
        left = form.constant(0)
        return _collective(form, lambda b: b.asynchronous.wgmmas.wait(left))
    form.count(0)
    if what == "fence":
        return _collective(form, lambda b: b.asynchronous.wgmmas.fence())
    return _collective(form, lambda b: b.asynchronous.wgmmas.commit())


def _collective(form: Form, run) -> Step:
    return Step(form.instruction, run, Kind.COLLECTIVE, warpgroup=True)


def fragment_d(n: int) -> tuple[np.ndarray, np.ndarray]:
    """(128, n / 2) rows and columns of D, 64 x n ("Register fragments for wgmma.mma_async.m64nNk16: matrix D").

    Warp w of the four has rows 16 w to 16 w + 15; element e of a lane lies at row group + 8 (e / 2 % 2) and column
    8 (e / 4) + 2 t + e % 2.
    """
    e = np.arange(n // 2)
    warp = np.arange(WARPGROUP) // 32
    rows = 16 * warp[:, None] + np.tile(GROUP, 4)[:, None] + 8 * (e // 2 % 2)
    columns = 8 * (e // 4) + 2 * np.tile(T, 4)[:, None] + e % 2
    return rows, columns


def _scale(form: Form, at: int) -> float:
    value = form.constant(at)
    if value not in (1, -1):
        raise form.unknown(f"a scale of {value}")
    return float(value)


def _flag(form: Form, at: int) -> bool:
    value = form.constant(at)
    if value not in (0, 1):
        raise form.unknown(f"a transposition of {value}")
    return bool(value)


def _mma(form: Form) -> Step:
    """d, a-descriptor | {a}, b-descriptor, scale-d{, ±1, ±1{, a is M-major}, b is N-major}"""
    shape = form.rest.pop(0)
    kinds, form.rest = form.rest, []
    if len(kinds) != 3 or not shape.startswith("m64n") or "k" not in shape:
        raise form.unknown(".".join([shape, *kinds]))
    d_type, a_type, b_type = kinds
    n, k = (int(v) for v in shape[4:].split("k"))
    integer, halves = a_type in ("s8", "u8"), a_type in ("bf16", "f16")
    same = {"s8": ("s8", "u8"), "u8": ("s8", "u8"), "e4m3": ("e4m3", "e5m2"), "e5m2": ("e4m3", "e5m2")}
    results = {"s32"} if integer else {"f32"} if a_type in ("bf16", "tf32") else {"f32", "f16"}
    if (
        k != _K.get(a_type)
        or n % 8
        or not 8 <= n <= 256
        or b_type not in same.get(a_type, (a_type,))
        or d_type not in results
    ):
        raise form.unknown(".".join([shape, *kinds]))
    d_items, a_operand = form.vector(0), form.operands[1]
    in_registers = isinstance(a_operand, Vector)
    half = d_type == "f16"
    if len(d_items) != n // (4 if half else 2) or any(not isinstance(item, Register) for item in d_items):
        raise form.unknown(f"{len(d_items)} registers of D")
    form.count(4 if integer else 6 if not halves else 7 if in_registers else 8)
    scale_a, scale_b = (1.0, 1.0) if integer else (_scale(form, 4), _scale(form, 5))
    a_major = halves and not in_registers and _flag(form, 6)
    b_major = halves and _flag(form, len(form.operands) - 1)
    scale_d = _scale_d(form)
    d_indices = [item.index for item in d_items]
    word = "b32" if half else d_type
    for item in d_items:
        form.reader(item, word)
    per, a_values = ELEMENTS[a_type]
    b_values = ELEMENTS[b_type][1]
    itemsize = 4 // per
    rows, columns = fragment_d(n)
    read_b = form.reader(2, "b64")
    read_a = None if in_registers else form.reader(1, "b64")
    a_index = fragment_a(k, per).index
    reads_a = [form.reader(item, "b32") for item in form.vector(1)] if in_registers else []
    if in_registers and len(reads_a) != 4:
        raise form.unknown(f"{len(reads_a)} registers of A")

    def place(b, bits: int, count: int, major: bool, lanes: slice) -> np.ndarray:
        """(count, k) offsets of a shared matrix, which the asynchronous proxy must be allowed to read."""
        at = Descriptor.decode(bits).addresses(count, k, itemsize, major)
        offset = b.shared.offsets(at, itemsize, itemsize)
        for byte in range(itemsize):
            b.proxies.read(offset + byte, lanes)
        return offset

    def matrix(b, offset: np.ndarray, values) -> np.ndarray:
        """(count, k) float64"""
        count = offset.shape[0]
        raw = b.shared.views[itemsize][offset // itemsize]
        if itemsize == 4:
            return values(raw)
        return values(np.ascontiguousarray(raw).view(np.uint32)).reshape(count, k)

    def run(b):
        groups = b.asynchronous.wgmmas.active()
        keeps = np.broadcast_to(scale_d(b), b.shape)
        descriptors_b = np.broadcast_to(read_b(b), b.shape)
        descriptors_a = None if read_a is None else np.broadcast_to(read_a(b), b.shape)
        a_words = [np.broadcast_to(read(b), b.shape) for read in reads_a]
        mask = b.mask
        for group in groups:
            lanes = slice(group * WARPGROUP, (group + 1) * WARPGROUP)
            keep = _same(keeps[lanes], "scale-d")
            of_b = place(b, _same(descriptors_b[lanes], "the descriptor of B"), n, b_major, lanes)
            of_a = None
            if descriptors_a is not None:
                of_a = place(b, _same(descriptors_a[lanes], "the descriptor of A"), 64, a_major, lanes)
            words = [w[lanes].copy() for w in a_words]
            one = np.zeros(b.lanes, np.bool_)
            one[lanes] = True
            b.activate(one)
            sums = [b.peek(i) for i in d_indices] if keep else []

            def compute(earlier, lanes=lanes, of_a=of_a, of_b=of_b, words=words, sums=sums):
                if of_a is not None:
                    left = matrix(b, of_a, a_values)
                else:
                    fragments = a_values(np.stack(words, 1)).reshape(4, -1)
                    left = fragments[:, a_index].reshape(64, k)
                right = matrix(b, of_b, b_values)
                d = (scale_a * scale_b) * (left @ right.T)[rows, columns]
                if sums:
                    d = d + _values([_known(s, lanes, earlier) for s in sums], half, d_type)
                return _bits(d, half, d_type)

            promises = [b.promise(i) for i in d_indices]
            b.asynchronous.wgmmas.issue(group, compute, promises)
        b.activate(mask)

    return _collective(form, run)


def _scale_d(form: Form):
    """Whether D is a summand: a predicate, or the integer it would be made of."""
    operand = form.operands[3]
    if isinstance(operand, Immediate):
        value = np.array(bool(operand.value))
        return lambda b: value
    return form.reader(3, "pred")


def _same(values: np.ndarray, what: str) -> int:
    first = values[0]
    if (values != first).any():
        raise Fault(f"{what} differs between the threads of a warpgroup")
    return int(first)


def _known(summand, lanes: slice, earlier) -> np.ndarray:
    """A summand's bits in the warpgroup: a register's value, or what an earlier product has computed."""
    promise = summand
    while not isinstance(promise, np.ndarray):
        ours = promise.mask[lanes]
        if ours.any() and not ours.all():
            raise Fault("a summand that is in flight in a part of the warpgroup")
        if ours.all() and promise.source is None:
            break
        promise = promise.source if ours.all() else promise.before
    if isinstance(promise, np.ndarray):
        return promise[lanes]
    for product in earlier:
        for own, result in zip(product.promises, product.results or (), strict=False):
            if own is promise:
                return result
    return promise.current()[lanes]


def _values(bits: list[np.ndarray], half: bool, d_type: str) -> np.ndarray:
    """Registers -> (128, elements) float64"""
    words = np.ascontiguousarray(np.stack(bits, 1))
    if half:
        return words.view(np.float16).astype(np.float64)
    return words.view(TYPES[d_type].dtype).astype(np.float64)


def _bits(d: np.ndarray, half: bool, d_type: str) -> list[np.ndarray]:
    if half:
        words = pack(d.reshape(-1, 2), TYPES["f16x2"]).reshape(WARPGROUP, -1)
    elif d_type == "s32":
        words = d.astype(np.int64).astype(np.int32).view(np.uint32)
    else:
        words = pack(d, TYPES["f32"]).view(np.uint32)
    return [np.ascontiguousarray(words[:, i]) for i in range(words.shape[1])]
