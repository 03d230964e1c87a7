"""cp.async.bulk.* and cp.reduce.async.bulk.*, with tensor maps that `Memory.tensor_map` made."""

from __future__ import annotations

import numpy as np

from ..decode import Form
from ..parser import Address
from ..types import TYPES, Fault
from .memory_access import hints

SHARED = ("shared::cta", "shared::cluster")


def bulk(form: Form, reduce: bool):
    if not reduce:
        if form.flag("commit_group"):
            form.count(0)
            return lambda b: b.asynchronous.bulk.commit()
        if form.flag("wait_group"):
            read_only = form.flag("read")
            form.count(1)
            left = form.constant(0)
            return lambda b: b.asynchronous.bulk.wait(left, read_only)
        if form.flag("prefetch"):
            return _prefetch(form)
    tensor = form.flag("tensor")
    if tensor:
        dimensions = int(form.need("1d", "2d", "3d", "4d", "5d")[0])
        form.flag("tile")
    spaces = [part for part in form.rest if part in (*SHARED, "global")]
    form.rest = [part for part in form.rest if part not in spaces]
    policy = hints(form)
    if spaces in (["shared::cluster", "global"], ["shared::cta", "global"]) and not reduce:
        form.need("mbarrier::complete_tx::bytes")
        multicast = form.flag("multicast::cluster")
        extra = multicast + policy
        run = _load_tensor(form, dimensions, extra) if tensor else _load(form, extra)
        return _to_this_block(form, len(form.operands) - extra, run) if multicast else run
    if spaces == ["global", "shared::cta"]:
        add = _addition(form, tensor) if reduce else None
        form.need("bulk_group")
        return _store_tensor(form, dimensions, policy, add) if tensor else _store(form, policy, add)
    raise form.unknown(f"a bulk copy {'.'.join(spaces)}")


def _addition(form: Form, tensor: bool) -> np.dtype | str:
    """What cp.reduce does: only sums. A tensor map has the type of its elements, so the instruction has none."""
    form.need("add")
    if tensor:
        return "map"
    type = form.type("u32 s32 u64 f32 f64")
    return np.dtype(TYPES[type.name].dtype)


def _to_this_block(form: Form, at: int, run):
    """A multicast in a cluster of one block: its mask of blocks must name that one."""
    mask = form.reader(at, "b16")

    def checked(b):
        if (b.compress(mask(b)) != 1).any():
            raise Fault("a multicast to blocks beyond the cluster of one")
        run(b)

    return checked


def _prefetch(form: Form):
    while form.take("tensor", "1d", "2d", "3d", "4d", "5d", "tile", "L2", "global", "L2::cache_hint"):
        pass
    return lambda b: None


def _lanes(b, *values) -> list[list[int]]:
    """Each active lane's row of integers."""
    return [list(row) for row in zip(*(b.compress(v).tolist() for v in values), strict=True)]


def _each(b, rows, run) -> None:
    """One lane after another, since each is a copy of its own."""
    lanes, mask = b.active_ids(None), b.mask
    for lane, row in zip(lanes, rows, strict=True):
        one = np.zeros(b.lanes, np.bool_)
        one[lane] = True
        b.activate(one)
        run(*row)
    b.activate(mask)
    b.events += 1


def _load(form: Form, extra: int):
    """[shared], [global], size, [mbarrier]"""
    form.count(4 + extra)
    destination, source, barrier = form.address(0), form.address(1), form.address(3)
    size = form.reader(2, "u32")
    return lambda b: _each(
        b, _lanes(b, destination(b), source(b), size(b), barrier(b)), lambda *row: b.asynchronous.bulk.load(*row)
    )


def _store(form: Form, policy: bool, add):
    """[global], [shared], size"""
    form.count(4 if policy else 3)
    destination, source, size = form.address(0), form.address(1), form.reader(2, "u32")
    return lambda b: _each(
        b, _lanes(b, destination(b), source(b), size(b)), lambda *row: b.asynchronous.bulk.store(*row, add)
    )


def _map_and_coordinates(form: Form, at: int, dimensions: int):
    operand = form.operands[at]
    if not isinstance(operand, Address) or operand.coordinates is None:
        raise form.unknown(f"operand {at}, which is no tensor map with coordinates,")
    items = form.vector(operand.coordinates)
    if len(items) != dimensions:
        raise form.unknown(f"{len(items)} coordinates in {dimensions} dimensions")
    return form.address(at, coordinates=True), [form.reader(item, "s32") for item in items]


def find_map(b, address: int):
    """The description behind a tensor map's generic address."""
    if address % 64:
        raise Fault(f"a tensor map at {address:#x}, which is not 64-byte aligned")
    words = b.load(None, np.full(1, address, np.int64) + np.arange(0, 128, 8), 8)
    return b.memory.find_map(words.tobytes())


def _load_tensor(form: Form, dimensions: int, extra: int):
    """[shared], [map, {coordinates}], [mbarrier]"""
    form.count(3 + extra)
    destination, barrier = form.address(0), form.address(2)
    map, coordinates = _map_and_coordinates(form, 1, dimensions)

    def one(b, to, at, bar, *where):
        b.asynchronous.bulk.load_tensor(to, find_map(b, at), where, bar)

    return lambda b: _each(
        b, _lanes(b, destination(b), map(b), barrier(b), *(c(b) for c in coordinates)), lambda *row: one(b, *row)
    )


def _store_tensor(form: Form, dimensions: int, policy: bool, add):
    """[map, {coordinates}], [shared]"""
    form.count(3 if policy else 2)
    source = form.address(1)
    map, coordinates = _map_and_coordinates(form, 0, dimensions)

    def one(b, at, source, *where):
        description = find_map(b, at)
        if add is not None and description.dtype is None:
            raise Fault("a sum of a tensor map's elements, whose dtype Memory.tensor_map was not told")
        b.asynchronous.bulk.store_tensor(source, description, where, None if add is None else description.dtype)

    return lambda b: _each(b, _lanes(b, map(b), source(b), *(c(b) for c in coordinates)), lambda *row: one(b, *row))
