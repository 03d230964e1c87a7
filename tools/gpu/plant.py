"""Faults for the stand-in: an op that hangs, one that crashes, one that gives wrong numbers.

GROKKERNELS_PLANT="hang:rotary,crash:moe_gate,wrong:rms_norm" names them. The library knows nothing of it, and a job for
a GPU does not read it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from typing import Any

import torch

from gpu.device import Device
from grokkernels.testing.case import Table

VARIABLE = "GROKKERNELS_PLANT"
KINDS = ("hang", "crash", "wrong")


def planted(table: Table, device: Device) -> Table:
    """The table, its op with a fault where one is to be planted."""
    if device.name != "stand-in" or not os.environ.get(VARIABLE):
        return table
    kinds = dict(reversed(word.split(":")) for word in os.environ[VARIABLE].split(","))
    kind = kinds.get(table.name)
    if kind is None:
        return table
    if kind not in KINDS:
        raise ValueError(f"{VARIABLE} names no fault: '{kind}'; allowed are {', '.join(KINDS)}")
    op = table.op

    def faulty(**arguments: Any) -> Any:
        if kind == "hang":
            ctypes.PyDLL(None).pause()  # with Python's lock held, as the worst of kernels would
        if kind == "crash":
            ctypes.string_at(0)
        return _off(op(**arguments))

    faulty.__name__ = op.__name__
    return dataclasses.replace(table, op=faulty)


def _off(result: Any) -> Any:
    """A sixteenth too much."""
    if isinstance(result, torch.Tensor):
        return result * 1.0625 if result.is_floating_point() else result
    parts = [_off(part) for part in result]
    return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
