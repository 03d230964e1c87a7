"""Contenders in turn, round after round, in one process: whatever else the machine does, it does to all of them."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Call = Callable[[], object]
SHORTEST = 200e-6  # seconds that one measurement takes at least: shorter calls are repeated inside it
ROUNDS = (7, 300)  # at least and at most
L2_FLUSH = 256 << 20  # bytes written before a kernel on a GPU is timed


def time_of(call: Call, repeats: int) -> float:
    """Seconds of one call: by the clock on a CPU, by device events with a cold second-level cache on a GPU."""
    if torch.cuda.is_available():
        return _on_gpu(call, repeats)
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - began) / repeats


def _on_gpu(call: Call, repeats: int) -> float:
    flush = torch.empty(L2_FLUSH, dtype=torch.int8, device="cuda")
    total = 0.0
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        total += begin.elapsed_time(end) * 1e-3
    return total / repeats


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
