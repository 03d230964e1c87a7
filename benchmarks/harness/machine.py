"""The machine: what it is, and what it can do at most, measured in the same run as the kernels."""

from __future__ import annotations

import functools
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import timing
from benchmarks.harness.work import Work
from grokkernels import doctor, native

ROOT = Path(__file__).parent.parent.parent
BUFFER = 256 << 20  # bytes: beyond any cache
GPU_PRODUCT = 8192  # rows and columns of the product that says what a GPU can multiply


@dataclass(frozen=True)
class Limits:
    """FLOP/s by dtype, and bytes/s when only reading and when copying (both directions counted)."""

    flops: dict[str, float]
    read: float
    copy: float

    def seconds(self, work: Work) -> float:
        """What the work must take: its arithmetic or its bytes, whichever is longer; 0 where neither was counted."""
        arithmetic = work.flops / self.flops.get(work.dtype, self.flops["float32"])
        rate = self.read if work.written <= work.read / 16 else self.copy
        return max(arithmetic, (work.read + work.written) / rate)


def _best(function: Callable[[], object], seconds: float = 0.4) -> float:
    """The shortest of several calls: a limit is what the machine can do undisturbed."""
    function()
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - began)
    return best


@functools.cache
def limits() -> Limits:
    """Measured: what a stream of additions, a product and a copy reach here."""
    if torch.cuda.is_available():
        return _gpu_limits()
    module = native.module
    assert module is not None, native.load_error
    rounds = 1 << 20
    fma = module.limit_fma(rounds) / _best(lambda: module.limit_fma(rounds))
    x, y = (torch.ones(BUFFER // 4 + 16) for _ in range(2))
    count = BUFFER // 4
    target = -(-y.data_ptr() // 64) * 64
    read = BUFFER / _best(lambda: module.limit_read(x.data_ptr(), count))
    copy = 2 * BUFFER / _best(lambda: module.limit_copy(x.data_ptr(), target, count))
    return Limits({"float32": fma}, read, copy)


def _gpu_limits() -> Limits:
    """A copy of 1 GiB, and products of 8192 x 8192 matrices with random numbers, as torch makes them."""
    source, target = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = 2 * source.numel() / statistics.median(timing.times_on_gpu(lambda: target.copy_(source), 20))
    flops = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = (torch.randn(GPU_PRODUCT, GPU_PRODUCT, device="cuda", dtype=dtype) for _ in range(2))
        seconds = timing.times_on_gpu(functools.partial(torch.mm, a, b), 10)
        flops[str(dtype).removeprefix("torch.")] = 2 * GPU_PRODUCT**3 / statistics.median(seconds)
    return Limits(flops, copy, copy)


def commit() -> str:
    """Of the tree that is measured, marked where it holds more than was committed."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return said.stdout.strip() or "unknown"


def facts() -> dict[str, Any]:
    """What a reader must know of where this was measured."""
    report = doctor.report()
    measured = limits()
    gpu = {"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "CPU": f"{report['cpu']['model']}, level {report['cpu'].get('level')}, {torch.get_num_threads()} threads",
        "limits": f"{measured.flops['float32'] / 1e9:.0f} GFLOP/s float32, read {measured.read / 1e9:.1f} GB/s, "
        f"copy {measured.copy / 1e9:.1f} GB/s",
        "versions": f"grokkernels {report['versions']['grokkernels']}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
