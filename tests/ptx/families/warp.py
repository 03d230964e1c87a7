"""Warp collectives on registers: shfl, vote, match, redux, activemask, elect."""

from __future__ import annotations

import numpy as np

from ..decode import Form, Kind, Step, family
from ..types import Fault


def per_warp(b, value: np.ndarray) -> np.ndarray:
    """(lanes,) or a scalar -> (warps, 32)"""
    return np.broadcast_to(value, b.shape).reshape(-1, 32)


@family("shfl")
def shfl(form: Form) -> Step:
    """shfl.sync.mode d|p, a, b, c, mask. c has the clamp in bits 0-4 and the mask of the segments in bits 8-12."""
    form.need("sync")
    mode = form.need("idx", "bfly", "up", "down")
    form.type("b32")
    form.count(5)
    first, second = form.pair(0)
    write = form.writer(first, "b32")
    write_inside = None if second is None else form.writer(second, "pred")
    value, where, control, members = (
        form.reader(1, "b32"), form.reader(2, "u32"), form.reader(3, "u32"), form.reader(4, "u32")
    )  # fmt: skip

    def run(b):
        lane = b.lane_ids & 31
        offset = where(b).astype(np.int64) & 31
        c = control(b).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        highest = (lane & segment) | (clamp & ~segment)
        lowest = lane & segment
        if mode == "up":
            source, inside = lane - offset, lane - offset >= highest
        elif mode == "down":
            source, inside = lane + offset, lane + offset <= highest
        elif mode == "bfly":
            source, inside = lane ^ offset, (lane ^ offset) <= highest
        else:
            source = lowest | (offset & ~segment)
            inside = source <= highest
        source = np.where(inside, source, lane)
        at = (b.lane_ids & ~31) + source
        if not b.full:
            absent = b.mask & ~b.mask[at]
            if absent.any():
                lane_id = int(np.flatnonzero(absent)[0])
                raise Fault(f"thread {lane_id} reads from thread {int(at[lane_id])}, which does not take part")
        write(b, np.broadcast_to(value(b), b.shape)[at])
        if write_inside is not None:
            write_inside(b, np.broadcast_to(inside, b.shape))

    return Step(form.instruction, run, Kind.COLLECTIVE, members)


@family("vote")
def vote(form: Form) -> Step:
    form.need("sync")
    mode = form.need("all", "any", "uni", "ballot")
    form.type("b32" if mode == "ballot" else "pred")
    form.count(3)
    predicate, members = form.reader(1, "pred"), form.reader(2, "u32")
    write = form.writer(0, "b32" if mode == "ballot" else "pred")

    def run(b):
        p = np.broadcast_to(predicate(b), b.shape)
        true, all_here = b.warp_bits(p & b.mask), b.warp_bits(b.mask)
        named = members(b).astype(np.uint64)
        true, all_here = true & named, all_here & named
        if mode == "ballot":
            write(b, true.astype(np.uint32))
        elif mode == "any":
            write(b, true != 0)
        elif mode == "all":
            write(b, true == all_here)
        else:
            write(b, (true == 0) | (true == all_here))

    return Step(form.instruction, run, Kind.COLLECTIVE, members)


@family("match")
def match(form: Form) -> Step:
    """Which lanes hold the same value; .all: 0 unless all do."""
    mode = form.need("any", "all")
    form.need("sync")
    type = form.type("b32 b64")
    form.count(3)
    first, second = form.pair(0)
    value, members, write = form.reader(1, type), form.reader(2, "u32"), form.writer(first, "b32")
    write_same = None if second is None else form.writer(second, "pred")
    if write_same is not None and mode != "all":
        raise form.unknown("a predicate of match.any")

    def run(b):
        v, here = per_warp(b, value(b)), per_warp(b, b.mask)
        named = per_warp(b, members(b)).astype(np.uint64)[:, :, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)
        same = (v[:, :, None] == v[:, None, :]) & here[:, None, :] & (named != 0)
        bits = (same * (np.uint64(1) << np.arange(32, dtype=np.uint64))).sum(2).astype(np.uint32).reshape(-1)
        everyone = (here[:, None, :] & (named != 0)).sum(2).reshape(-1) == same.sum(2).reshape(-1)
        write(b, bits if mode == "any" else np.where(everyone, bits, np.uint32(0)))
        if write_same is not None:
            write_same(b, everyone)

    return Step(form.instruction, run, Kind.COLLECTIVE, members)


@family("redux")
def redux(form: Form) -> Step:
    form.need("sync")
    operation = form.need("add", "min", "max", "and", "or", "xor")
    logic = operation in ("and", "or", "xor")
    type = form.type("b32" if logic else "u32 s32 f32")
    if type.name == "f32" and operation == "add":
        raise form.unknown("redux.add.f32")
    absolute, nan = form.flag("abs"), form.flag("NaN")
    if (absolute or nan) and type.name != "f32":
        raise form.unknown(f".abs or .NaN of .{type.name}")
    form.count(3)
    value, members, write = form.reader(1, type), form.reader(2, "u32"), form.writer(0, type)
    f = {
        "add": np.add,
        "min": np.minimum if nan or type.name != "f32" else np.fmin,
        "max": np.maximum if nan or type.name != "f32" else np.fmax,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[operation]

    def run(b):
        v, named = np.broadcast_to(value(b), b.shape), np.broadcast_to(members(b), b.shape)
        v = np.abs(v) if absolute else v
        out = np.zeros(b.lanes, type.dtype)
        for warp in np.flatnonzero(b.active_warps()):
            lanes = np.arange(32) + 32 * warp
            active = lanes[b.mask[lanes]]
            for group in np.unique(named[active]):
                some = active[named[active] == group]
                out[some] = f.reduce(v[some], dtype=type.dtype)
        write(b, out)

    return Step(form.instruction, run, Kind.COLLECTIVE, members)


@family("activemask")
def activemask(form: Form):
    """The lanes that run together here: another schedule may give fewer."""
    form.type("b32")
    form.count(1)
    write = form.writer(0, "b32")
    return lambda b: write(b, b.warp_bits(b.mask).astype(np.uint32))


@family("elect")
def elect(form: Form) -> Step:
    """elect.sync d|p, mask: the lowest lane of the mask is the one."""
    form.need("sync")
    form.count(2)
    first, second = form.pair(0)
    if second is None:
        raise form.unknown("elect without a predicate")
    members, write, write_chosen = form.reader(1, "u32"), form.writer(first, "b32"), form.writer(second, "pred")

    def run(b):
        named = np.broadcast_to(members(b), b.shape)
        lowest = np.log2((named & (~named + np.uint32(1))).astype(np.float64)).astype(np.uint32)
        write(b, lowest)
        write_chosen(b, (b.lane_ids & 31) == lowest)

    return Step(form.instruction, run, Kind.COLLECTIVE, members)
