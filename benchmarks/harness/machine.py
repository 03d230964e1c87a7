"""The machine: what it is, and what it can do at most, measured in the same run as the kernels."""

from __future__ import annotations

import math
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.work import Work
from grokkernels import doctor, native

ROOT = Path(__file__).parent.parent.parent
# Published rates of GPUs, dense: bfloat16 and float32 (tf32) TFLOP/s, TB/s.
GPUS = {
    "A100": (312, 156, 2.04),
    "H100": (989, 495, 3.35),
    "H200": (989, 495, 4.8),
    "B200": (2250, 1125, 7.7),
    "RTX 4090": (165, 83, 1.01),
    "RTX 5090": (209, 105, 1.79),
}
BUFFER = 256 << 20  # bytes: beyond any cache


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


@cache
def limits() -> Limits:
    """Measured on a CPU; a GPU's are those of its data sheet."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((rates for key, rates in GPUS.items() if key in name), None)
        if known is None:
            raise SystemExit(f"no published rates of '{name}' in benchmarks/harness/machine.py")
        half, single, memory = known
        flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
        return Limits(flops, memory * 1e12, memory * 1e12)
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
