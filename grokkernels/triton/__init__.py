"""The Triton column: kernels and launchers, one file per op. This file alone knows whether the column is usable.

Importing it does not import triton: an op's file, and triton with it, is loaded when the op first runs here. With
TRITON_INTERPRET=1 set before that, kernels run on CPU tensors in Triton's interpreter (interpreter.py makes it right
about bfloat16); without it they compile for the GPU of the tensors, NVIDIA, AMD or Intel.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Releases whose compiler and interpreter the tests of this column were run with.
TESTED = ("3.9",)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
# Where kernels run that Triton compiles: CUDA and ROCm both call themselves cuda.
DEVICES = ("cuda", "xpu")


@cache
def load_error() -> str | None:
    """Why the column cannot be loaded here, as a sentence; None when it can."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed: pip install 'grokkernels[triton]'"
    if ".".join(found.split(".")[:2]) not in TESTED:
        allowed = " and ".join(f"{release}.*" for release in TESTED)
        return f"triton {found} is installed; this release of grokkernels is tested with {allowed}"
    return None


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
