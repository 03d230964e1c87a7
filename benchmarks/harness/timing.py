"""Contenders in turn, round after round, in one process: whatever else the machine does, it does to all of them."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

Call = Callable[[], object]
SHORTEST = 200e-6  # seconds that one measurement takes at least: shorter calls are repeated inside it
ROUNDS = (7, 300)  # at least and at most
L2_FLUSH = 256 << 20  # bytes written before a kernel on a GPU is timed
CLOCKS_PER_SECOND = 2e9  # of a GPU, about: what torch.cuda._sleep counts
LONGEST_WAIT = 40_000_000  # clocks


def time_of(call: Call, repeats: int) -> float:
    """Seconds of one call: by the clock on a CPU, the median by device events on a GPU."""
    if torch.cuda.is_available():
        return statistics.median(times_on_gpu(call, repeats))
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


@cache
def _flush() -> torch.Tensor:
    return torch.empty(L2_FLUSH, dtype=torch.int8, device="cuda")


def times_on_gpu(call: Call, repeats: int) -> list[float]:
    """Seconds of each of several calls by device events, the second-level cache cold.

    Before each the device waits for as long as the host needs to launch the call: what is measured is the kernels.
    """
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    wait = min(LONGEST_WAIT, int((time.perf_counter() - began) * 1.5 * CLOCKS_PER_SECOND))
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for begin, end in events:
        _flush().zero_()
        torch.cuda._sleep(wait)
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in events]


def repeats_of(call: Call) -> tuple[int, float]:
    """How often a measurement calls, and about how long one call takes; warm afterwards."""
    call()
    once = time_of(call, 1)
    if once < SHORTEST:
        once = time_of(call, max(1, int(SHORTEST / max(once, 1e-7))))
    return max(1, round(SHORTEST / max(once, 1e-7))), once


def rounds_of(seconds: float, budget: float) -> int:
    """How many rounds of `seconds` fit the budget."""
    return int(min(ROUNDS[1], max(ROUNDS[0], budget / seconds)))


@contextmanager
def undisturbed() -> Iterator[None]:
    """No garbage collection inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Of glibc's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM, _DEFAULT_MMAP_MAX = 128 << 10, 65536


def use_memory(*, fresh: bool) -> bool:
    """Whether large tensors get pages that the process has touched before, or fresh ones from the operating system.

    Fresh ones are glibc's default: each is mapped, zeroed and given back, which may take longer than the kernel. False
    where the C library has no such choice.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    maps, trim = (_DEFAULT_MMAP_MAX, _DEFAULT_TRIM) if fresh else (0, 2**31 - 1)
    return bool(mallopt(_M_MMAP_MAX, maps)) and bool(mallopt(_M_TRIM_THRESHOLD, trim))
