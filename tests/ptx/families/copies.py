"""cp.async: copies from global to shared memory that are there only after a wait."""

from __future__ import annotations

import numpy as np

from ..decode import Form, family
from ..parser import Register
from .bulk_copies import bulk
from .memory_access import hints


@family("cp")
def cp(form: Form):
    reduce = form.flag("reduce")
    form.need("async")
    if form.flag("bulk"):
        return bulk(form, reduce)
    if reduce:
        raise form.unknown("a reduction that is not .bulk")
    if form.flag("mbarrier"):
        return _arrive(form)
    if form.flag("commit_group"):
        form.count(0)
        return lambda b: b.asynchronous.commit()
    if form.flag("wait_all"):
        form.count(0)
        return lambda b: b.asynchronous.wait_all()
    if form.flag("wait_group"):
        form.count(1)
        left = form.constant(0)
        return lambda b: b.asynchronous.wait(left)
    return _copy(form)


def _arrive(form: Form):
    """cp.async.mbarrier.arrive{.noinc} [address]: arrives when the thread's copies so far have."""
    form.need("arrive")
    increments = not form.flag("noinc")
    form.need("shared", "shared::cta")
    form.type("b64")
    form.count(1)
    address = form.address(0)
    return lambda b: b.asynchronous.arrive_after(b.compress(address(b)), increments)


def _copy(form: Form):
    """cp.async.ca [shared], [global], size{, source size | ignore predicate}{, policy}: what is not read is zero."""
    cached = form.need("ca", "cg")
    form.need("shared", "shared::cta")
    form.need("global")
    policy = hints(form)
    operands = form.count(3, 4, 5) - policy
    size = form.constant(2)
    if size not in ((4, 8, 16) if cached == "ca" else (16,)) or operands not in (3, 4):
        raise form.unknown(f"a copy of {size} bytes")
    destination, source = form.address(0), form.address(1)
    valid = ignore = None
    if operands == 4:
        operand = form.operands[3]
        if isinstance(operand, Register) and operand.type.kind == "p":
            ignore = form.reader(3, "pred")
        else:
            valid = form.reader(3, "u32")

    def run(b):
        if ignore is not None:
            count = np.where(ignore(b), 0, size)
        else:
            count = np.array(size) if valid is None else valid(b).astype(np.int64)
        b.asynchronous.copy(b.compress(destination(b)), b.compress(source(b)), size, b.compress(count))

    return run
