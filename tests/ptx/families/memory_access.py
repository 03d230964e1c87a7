"""Loads, stores, atomics and prefetches."""

from __future__ import annotations

import numpy as np

from ..decode import Form, family
from ..numerics import pack, unpack
from ..parser import Sink
from ..types import UNSIGNED, Type

SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "param", "param::entry", "const")
HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate",
    "L2::evict_normal", "L2::evict_first", "L2::evict_last", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip
SCOPES = ("cta", "cluster", "gpu", "sys")


def space_of(form: Form) -> str | None:
    """The space as the block knows it; None for a generic address. Constants lie in global memory here."""
    space = form.take(*SPACES)
    if space is None:
        return None
    space = space.split("::")[0]
    return "global" if space == "const" else space


def ordering(form: Form, *orders: str) -> None:
    """Memory is in order here, so an order and its scope change nothing; still they belong together."""
    if form.take(*orders) is not None:
        form.need(*SCOPES)


def hints(form: Form) -> bool:
    """Takes all caching hints; whether an operand with a cache policy follows."""
    while form.take(*HINTS):
        pass
    return form.flag("L2::cache_hint")


def _vector(form: Form) -> int:
    return int((form.take("v2", "v4", "v8") or "v1")[1:])


@family("ld", "ldu")
def ld(form: Form):
    type = form.type()
    if type.kind == "p":
        raise form.unknown("type .pred")
    form.take("weak", "volatile")
    if not form.flag("mmio"):
        ordering(form, "relaxed", "acquire")
    space, count, policy = space_of(form), _vector(form), hints(form)
    form.flag("unified")
    form.count(3 if policy else 2)
    items = form.vector(0)
    if len(items) != count:
        raise form.unknown(f"{len(items)} registers for .v{count}")
    address = form.address(1)
    writes = [form.writer(item, type, wide=True) for item in items]

    def run(b):
        values = b.load(space, b.compress(address(b)), type.size, count)
        values = b.expand(values)
        for i, write in enumerate(writes):
            write(b, np.ascontiguousarray(values[:, i]).view(type.dtype))

    return run


@family("st")
def st(form: Form):
    type = form.type()
    if type.kind == "p":
        raise form.unknown("type .pred")
    form.take("weak", "volatile")
    if not form.flag("mmio"):
        ordering(form, "relaxed", "release")
    space, count, policy = space_of(form), _vector(form), hints(form)
    if space == "param":
        raise form.unknown("a call")
    form.count(3 if policy else 2)
    items = form.vector(1)
    if len(items) != count:
        raise form.unknown(f"{len(items)} registers for .v{count}")
    address = form.address(0)
    reads = [form.reader(item, type, wide=True) for item in items]
    word = UNSIGNED[type.size]

    def run(b):
        at = b.compress(address(b))
        values = np.empty((at.size, count), word)
        for i, read in enumerate(reads):
            values[:, i] = b.compress(read(b).view(word))
        b.store(space, at, values)

    return run


@family("prefetch", "prefetchu", "applypriority", "discard")
def prefetch(form: Form):
    """Changes no value; the address is not even looked at."""
    space_of(form)
    form.need("L1", "L2", "L2::evict_last", "L2::evict_normal", "tensormap")
    form.count(1, 2)
    form.address(0)
    return lambda b: None


@family("createpolicy")
def createpolicy(form: Form):
    """A cache policy is opaque, and here without effect."""
    form.need("fractional", "range")
    while form.take("L2::evict_last", "L2::evict_first", "L2::evict_normal", "L2::evict_unchanged", "global"):
        pass
    form.type("b64")
    write = form.writer(0, "b64")
    return lambda b: write(b, np.array(0, np.uint64))


_OPERATIONS = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, 0, old + 1),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1),
}
_ALLOWED = {
    "add": "u32 s32 u64 f16 f16x2 bf16 bf16x2 f32 f64",
    "min": "u32 s32 u64 s64 f16 f16x2 bf16 bf16x2",
    "max": "u32 s32 u64 s64 f16 f16x2 bf16 bf16x2",
    "and": "b32 b64",
    "or": "b32 b64",
    "xor": "b32 b64",
    "exch": "b32 b64",
    "inc": "u32",
    "dec": "u32",
    "cas": "b16 b32 b64",
}


@family("atom", "red")
def atom(form: Form):
    """One lane after another, in the order of their numbers."""
    returns = form.name == "atom"
    type = form.type()
    form.take("relaxed", "acquire", "release", "acq_rel")
    form.take(*SCOPES)
    space = space_of(form)
    operation = form.need(*_ALLOWED)
    if type.name not in _ALLOWED[operation].split():
        raise form.unknown(f".{operation}.{type.name}")
    halves = type.name in ("f16", "f16x2", "bf16", "bf16x2")
    if halves:
        if operation == "add":
            form.need("noftz")
        else:
            form.flag("noftz")
    count, policy = _vector(form), hints(form)
    if count > 1 and (type.kind not in "fh" or operation not in ("add", "min", "max")):
        raise form.unknown(f".v{count}.{type.name}")
    if not returns and operation in ("exch", "cas"):
        raise form.unknown(f"red.{operation}")
    first = 1 if returns else 0
    values_at = first + 1
    form.count(values_at + (2 if operation == "cas" else 1) + policy)
    address = form.address(first)
    items = form.vector(values_at)
    results = form.vector(0) if returns else ()
    if len(items) != count or (returns and len(results) != count and not isinstance(results[0], Sink)):
        raise form.unknown(f"{len(items)} registers for .v{count}")
    reads = [form.reader(item, type) for item in items]
    new = form.reader(values_at + 1, type) if operation == "cas" else None
    writes = [form.writer(item, type) for item in results]
    combine = _combine(operation, type)
    word = UNSIGNED[type.size]

    def run(b):
        at = b.compress(address(b))
        values = np.stack([b.compress(read(b)) for read in reads], 1)
        swap = None if new is None else b.compress(new(b))[:, None]
        before = np.empty((at.size, count), type.dtype)
        turn = _turns(at)
        for now in range(int(turn.max()) + 1):
            mine = turn == now
            old = b.load(space, at[mine], type.size, count).view(type.dtype)
            before[mine] = old
            if swap is None:
                after = combine(old, values[mine])
            else:
                after = np.where(old == values[mine], swap[mine], old)
            b.store(space, at[mine], np.ascontiguousarray(after.astype(type.dtype, copy=False)).view(word))
        if writes:
            expanded = b.expand(before)
            for i, write in enumerate(writes):
                write(b, np.ascontiguousarray(expanded[:, i]))

    return run


def _turns(address: np.ndarray) -> np.ndarray:
    """How many lanes before each one have its address: those without go first, together."""
    order = np.argsort(address, kind="stable")
    same = np.concatenate([[False], np.diff(address[order]) == 0])
    place = np.arange(address.size)
    first = np.maximum.accumulate(np.where(same, 0, place))
    turn = np.empty(address.size, np.int64)
    turn[order] = place - first
    return turn


def _combine(operation: str, type: Type):
    """(lanes, count) arrays, the old and the operand -> the new."""
    if operation == "cas":
        return None
    f = _OPERATIONS[operation]
    if type.kind != "h" and type.name != "f16":
        return f

    def halves(old, x):
        # `unpack` takes one word per lane.
        parts = [pack(f(unpack(old[:, i], type), unpack(x[:, i], type)), type) for i in range(old.shape[1])]
        return np.stack(parts, 1)

    return halves
