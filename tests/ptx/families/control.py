"""Branches, exits and barriers."""

from __future__ import annotations

import numpy as np

from ..decode import Form, Kind, Step, family
from ..parser import Label
from ..types import Fault


@family("bra")
def bra(form: Form) -> Step:
    form.flag("uni")
    form.count(1)
    label = form.operands[0]
    if not isinstance(label, Label) or len(label.targets) != 1:
        raise form.unknown(f"target {label}")
    return Step(form.instruction, lambda b: None, Kind.BRANCH, target=label.targets[0])


@family("brx")
def brx(form: Form) -> Step:
    """brx.idx index, table"""
    form.need("idx")
    form.flag("uni")
    form.count(2)
    index, table = form.reader(0, "u32"), form.operands[1]
    if not isinstance(table, Label):
        raise form.unknown(f"table {table}")
    targets = np.array(table.targets)

    def run(b):
        at = np.broadcast_to(index(b), b.shape)
        if (at >= targets.size)[b.mask].any():
            raise Fault(f"an index beyond the {targets.size} targets")
        b.pc[b.mask] = targets[at[b.mask]]

    return Step(form.instruction, run, Kind.SCHEDULE)


@family("exit", "ret")
def leave(form: Form) -> Step:
    form.flag("uni")
    form.count(0)
    return Step(form.instruction, lambda b: None, Kind.EXIT)


@family("trap")
def trap(form: Form):
    form.count(0)

    def run(b):
        raise Fault("reached")

    return run


@family("implicit_def")
def implicit_def(form: Form):
    """The compiler's note that a register may hold anything: all ones, which is NaN."""
    register = form.operands[0]
    write = form.writer(0, "pred" if register.type.kind == "p" else f"b{register.type.bits}")
    word = np.bool_ if register.type.kind == "p" else np.dtype(f"u{register.type.size}")
    value = np.asarray(np.invert(np.zeros((), word)))
    return lambda b: write(b, value)


@family("bar", "barrier")
def barrier(form: Form) -> Step:
    """bar.sync a{, b}; bar.arrive a, b; bar.red.popc.u32 d, a{, b}, p; bar.warp.sync mask; barrier.cluster.*"""
    if form.flag("warp"):
        form.need("sync")
        form.count(1)
        return Step(form.instruction, lambda b: None, Kind.COLLECTIVE, form.reader(0, "u32"))
    if form.name == "barrier" and form.flag("cluster"):
        return _cluster(form)
    form.flag("cta")
    if form.name == "barrier":
        # Without .aligned the threads of a warp may come one by one; here they wait for each other all the same.
        form.flag("aligned")
    what = form.need("sync", "arrive", "red")
    first = 1 if what == "red" else 0
    numbers = form.count(2, 3, 4) - 2 if what == "red" else form.count(1, 2)
    name = form.reader(first, "u32")
    expected = form.reader(first + 1, "u32") if numbers == 2 else None
    if what == "arrive" and expected is None:
        raise form.unknown("bar.arrive without a number of threads")
    predicate = result = None
    if what == "red":
        operation = form.need("popc", "and", "or")
        predicate = form.reader(len(form.operands) - 1, "pred")
        type = form.type("u32 pred")
        if (operation == "popc") != (type.name == "u32"):
            raise form.unknown(f".{operation}.{type.name}")
        write = form.writer(0, type)

        def result(b, true, threads):
            value = {"popc": true, "and": true == threads, "or": true > 0}[operation]
            write(b, np.array(value, type.dtype))

    def run(b):
        numbers = np.broadcast_to(name(b), b.shape)
        counts = np.broadcast_to(np.uint32(0) if expected is None else expected(b), b.shape)
        chosen = None if predicate is None else predicate(b)
        left = b.mask.copy()
        while left.any():  # warps that run together may each have a barrier of their own
            number, count = numbers[left][0], counts[left][0]
            same = left & (numbers == number) & (counts == count)
            rest = left & ~same
            if (same.reshape(-1, 32).any(1) & rest.reshape(-1, 32).any(1)).any():
                raise Fault("the barrier's number or count differs between the threads of a warp")
            if not number < 16:
                raise Fault(f"barrier {number} of 16")
            b.activate(same)
            b.barriers.arrive(int(number), None if expected is None else int(count), what != "arrive", chosen, result)
            left = rest

    return Step(form.instruction, run, Kind.BARRIER)


def _cluster(form: Form) -> Step:
    """A cluster is one block: everyone arrives, and waits for everyone."""
    what = form.need("arrive", "wait")
    form.take("release", "relaxed", "acquire")
    form.flag("aligned")
    form.count(0)

    def run(b):
        # An arrival may be far ahead of its wait, but not of the wait before: waiting alone tells the phases apart.
        if what == "wait":
            b.barriers.arrive("cluster", None, True)

    return Step(form.instruction, run, Kind.BARRIER)


@family("membar", "fence")
def fence(form: Form):
    """Memory is always in order here, so only the fence between proxies leaves a trace; all forms are known."""
    if form.name == "membar":
        form.need("cta", "gl", "sys")
    elif form.flag("proxy"):
        kind = form.need("async", "alias", "tensormap::generic")
        space = form.take("global", "shared::cta", "shared::cluster")
        form.take("acquire", "release")
        form.take("cta", "cluster", "gpu", "sys")
        if kind == "async" and space != "global":
            return lambda b: None if b.proxies is None else b.proxies.fence(b.mask, b.steps_taken)
    else:
        form.take("mbarrier_init", "sc", "acq_rel", "acquire", "release")
        form.take("release", "sync_restrict::shared::cta", "sync_restrict::shared::cluster")
        form.need("cta", "cluster", "gpu", "sys")
    return lambda b: None


@family("nanosleep")
def nanosleep(form: Form) -> Step:
    form.type("u32")
    form.count(1)
    return Step(form.instruction, lambda b: b.sleep(b.mask), Kind.SCHEDULE)


@family("setmaxnreg")
def setmaxnreg(form: Form):
    form.need("inc", "dec")
    form.need("sync")
    form.need("aligned")
    form.type("u32")
    form.count(1)
    number = form.constant(0)
    if number % 8 or not 24 <= number <= 256:
        raise form.unknown(f"a register count of {number}")
    return lambda b: None


@family("griddepcontrol")
def griddepcontrol(form: Form):
    """Kernels run one after another."""
    form.need("wait", "launch_dependents")
    form.count(0)
    return lambda b: None
