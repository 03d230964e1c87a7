"""mbarrier.*: see tests/ptx/mbarrier.py for the object."""

from __future__ import annotations

import numpy as np

from ..decode import Form, Kind, Step, family
from ..parser import Sink
from ..types import Fault


def _space(form: Form) -> None:
    """Only the shared window is known; a generic address would be one more form."""
    form.need("shared", "shared::cta", "shared::cluster")


def _scope(form: Form, *orders: str) -> None:
    if form.take(*orders) is not None:
        form.need("cta", "cluster")


@family("mbarrier")
def mbarrier(form: Form):
    what = form.need(
        "init", "inval", "arrive", "arrive_drop", "expect_tx", "complete_tx", "test_wait", "try_wait", "pending_count"
    )
    form.type("b64")
    if what in ("test_wait", "try_wait"):
        return _wait(form, what)
    if what == "pending_count":
        raise form.unknown("pending_count")
    if what in ("arrive", "arrive_drop"):
        return _arrive(form, what)
    if what in ("expect_tx", "complete_tx"):
        _scope(form, "relaxed")
    _space(form)
    form.count(1 if what == "inval" else 2)
    address = form.address(0)
    count = None if what == "inval" else form.reader(1, "u32")

    def run(b):
        counts = None if count is None else b.compress(count(b))
        for i, at in enumerate(b.compress(address(b)).tolist()):
            if what == "init":
                b.mbarriers.init(at, int(counts[i]))
            elif what == "inval":
                b.mbarriers.invalidate(at)
            elif what == "expect_tx":
                b.mbarriers.expect(at, int(counts[i]))
            else:
                b.mbarriers.complete(at, int(counts[i]))

    return run


def _arrive(form: Form, what: str):
    """state, [address]{, count}; .expect_tx: state, [address], bytes"""
    with_bytes = form.flag("expect_tx")
    form.flag("noComplete")
    _scope(form, "release", "relaxed")
    _space(form)
    operands = form.count(*((3,) if with_bytes else (2, 3)))
    address = form.address(1)
    extra = form.reader(2, "u32") if operands == 3 else None
    write = None if isinstance(form.operands[0], Sink) else form.writer(0, "b64")

    def run(b):
        extras = None if extra is None else b.compress(extra(b))
        addresses = b.compress(address(b)).tolist()
        phases = np.zeros(len(addresses), np.uint64)
        for i, at in enumerate(addresses):
            if with_bytes:
                b.mbarriers.expect(at, int(extras[i]))
            count = 1 if with_bytes or extras is None else int(extras[i])
            phases[i] = b.mbarriers.arrive(at, count, drop=what == "arrive_drop")
        if write is not None:
            write(b, b.expand(phases))

    return run


def _wait(form: Form, what: str) -> Step:
    """p, [address], state or parity{, time}. Both may say no; whoever is told no lets the others go first."""
    parity = form.flag("parity")
    _scope(form, "acquire", "relaxed")
    _space(form)
    form.count(*((3, 4) if what == "try_wait" else (3,)))
    address, write = form.address(1), form.writer(0, "pred")
    phase = form.reader(2, "u32" if parity else "b64")

    def run(b):
        addresses, phases = b.compress(address(b)), b.compress(phase(b))
        if parity and (phases > 1).any():
            raise Fault("a parity beyond 1")
        answers: dict[tuple[int, int], bool] = {}
        for key in zip(addresses.tolist(), phases.tolist(), strict=True):
            if key not in answers:
                answers[key] = b.mbarriers.passed(*key) if parity else b.mbarriers.completed(*key)
        done = b.expand(np.array([answers[k] for k in zip(addresses.tolist(), phases.tolist(), strict=True)]))
        mask = b.mask
        write(b, done)
        b.sleep(mask & ~done)

    return Step(form.instruction, run, Kind.SCHEDULE)
