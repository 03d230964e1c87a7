"""linear_cross_entropy beside torch, with the memory that each needs at its peak.

pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness.judging import DEVICE, right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import Absent, compiled
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import linear_cross_entropy as cases

# Tokens, width, vocabulary.
SHAPES = ((256, 1024, 131072), (256, 1024, 16384))


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ weight.mT).float(), targets)


def contenders(shape: tuple[int, ...], direction: str, dtype: torch.dtype) -> dict[str, Callable[[], Any] | Absent]:
    rows, width, vocabulary = shape
    x, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) * width**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    fused = getattr(F, "linear_cross_entropy", None)
    functions = {
        OURS: lambda x, weight: grokkernels.linear_cross_entropy(x, weight, targets).float(),
        "torch": lambda x, weight: plain(x, weight, targets),
        "torch.compile": compiled(lambda x, weight: plain(x, weight, targets)),
        "torch fused": Absent("this torch has no linear_cross_entropy")
        if fused is None
        else lambda x, weight: fused(x, weight, targets).float(),
    }
    return calls(functions, (x, weight), direction)


def resident(what: str) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at most so far ("VmHWM")."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def peak_of(name: str, shape: tuple[int, ...], direction: str, dtype: torch.dtype) -> int:
    """What the first call takes at most beside its inputs, gradients and work space too: in a process of its own."""
    words = [name, *map(str, shape), direction, word(dtype)]
    command = [sys.executable, "-m", "benchmarks.bench_linear_cross_entropy", *words]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, rows: str, width: str, vocabulary: str, direction: str, dtype: str) -> None:
    call = contenders((int(rows), int(width), int(vocabulary)), direction, getattr(torch, dtype))[name]
    assert not isinstance(call, Absent)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    call()
    print(resident("VmHWM") - before)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy(compare: Any, shape: tuple[int, ...], direction: str, dtype: torch.dtype) -> None:
    rows, width, vocabulary = shape
    flops = 2 * rows * width * vocabulary * (1 if direction == FORWARD else 4)  # the backward forms the logits again
    found = contenders(shape, direction, dtype)
    measured = [name for name, call in found.items() if name != "torch.compile" and not isinstance(call, Absent)]
    resident_is_told = sys.platform == "linux" and DEVICE == "cpu"
    compare(
        Work("linear_cross_entropy", f"{rows} x {width}, V {vocabulary}", word(dtype), direction, flops=flops),
        found,
        right(cases.TABLE, cases.case(16, width, 300, reduction="none"), dtype),
        peaks={name: peak_of(name, shape, direction, dtype) for name in measured} if resident_is_told else None,
    )


if __name__ == "__main__":
    print_peak(*sys.argv[1:])
