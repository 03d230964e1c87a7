"""The Triton column: kernels and launchers, one file per op. This file alone knows whether the column is usable.

Importing it does not import triton: an op's file, and triton with it, is loaded when the op first runs here. With
TRITON_INTERPRET=1 set before that, kernels run on CPU tensors in Triton's interpreter (interpreter.py makes it right
about bfloat16); without it they compile for the GPU of the tensors, NVIDIA, AMD or Intel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Releases that the tests of this column were run with: an older one is refused, a newer one tried with a warning.
TESTED = ("3.6", "3.7", "3.8", "3.9")
# By whose names Triton comes: its own, and those of torch's builds for AMD's and Intel's GPUs.
DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "triton-xpu", "pytorch-triton-xpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
# Where kernels run that Triton compiles: CUDA and ROCm both call themselves cuda.
DEVICES = ("cuda", "xpu")


def installed() -> str | None:
    """The version of Triton that is installed."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def release(name: str) -> tuple[int, ...]:
    """ "3.10.1+git" -> (3, 10): what decides."""
    return tuple(int(number) for number in re.findall(r"\d+", name)[:2])


@cache
def load_error() -> str | None:
    """Why the column cannot be loaded here, as a sentence; None when it can."""
    found = installed()
    if found is None:
        return "triton is not installed: pip install 'grokkernels[triton]'"
    if release(found) < release(TESTED[0]):
        return f"triton {found} is installed; grokkernels needs {TESTED[0]} or newer"
    return None


def untested() -> str | None:
    """What is to be known of a release newer than those tested; None for these."""
    found = installed()
    if found is None or release(found) <= release(TESTED[-1]):
        return None
    return f"triton {found} is newer than {TESTED[-1]}, the newest release that this grokkernels was tested with"


def device_reason(device: str) -> str | None:
    """Why tensors on this type of device cannot be handed to the column; None when they can."""
    if INTERPRETED:
        return None if device == "cpu" else f"TRITON_INTERPRET=1 runs on the CPU, the tensors are on {device}"
    if device in DEVICES or (device == "cpu" and import_module("grokkernels.triton.kernel").executor() is not None):
        return None
    return f"the tensors are on {device}, not on a GPU; TRITON_INTERPRET=1, set before the start, interprets on the CPU"


@cache
def launcher(op: str, function: str) -> Callable[..., Any]:
    """The launcher of a native function: `function` of grokkernels/triton/<op>.py."""
    return getattr(import_module(f"grokkernels.triton.{op}"), function)
