"""What a column launches: seen without being run, and a few small cases that together launch it all."""

from __future__ import annotations

import functools
import math
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from grokkernels import dispatch, native
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import tables

Size = tuple[int, int, int]
Work = tuple[Table, Case, torch.dtype]

# The tables of each row with CUDA kernels, by the name that its files have.
ROWS: dict[str, list[Table]] = defaultdict(list)
for _table in tables().values():
    if "cuda" in dispatch.ROWS[_table.name].supports:
        ROWS[_table.op.__module__.rsplit(".", 1)[-1]].append(_table)
# Each row under each architecture that it has kernels of its own for.
PLACES = [(op, architecture) for op in sorted(ROWS) for architecture in ROWS[op][0].architectures]


@functools.cache
def _symbols(library: str) -> dict[int, str]:
    """Offset in the library -> the demangled name of the function there."""
    listed = subprocess.run(["nm", "-C", library], check=True, capture_output=True, text=True).stdout
    lines = (line.split(maxsplit=2) for line in listed.splitlines())
    return {int(parts[0], 16): parts[2] for parts in lines if len(parts) == 3 and parts[1] in "tTwW"}


@contextmanager
def executor(function: Callable[[str, Size, Size, int, list[bytes]], bool | None]) -> Iterator[None]:
    """Launches of the emulated column go to `function` inside (kernel name, grid, block, shared bytes, arguments), and
    to the device too where it answers True."""
    assert native.emulated is not None, native.emulated_error
    names = _symbols(native.emulated.__file__)
    native.emulated.set_executor(lambda offset, *launch: function(names[offset], *launch))
    try:
        yield
    finally:
        native.emulated.set_executor(None)


@contextmanager
def watched(backend: str, *, runs: bool) -> Iterator[Counter[str]]:
    """The threads that each kernel of a backend is launched with inside; where `runs` is False, none of them runs.

    Of Triton's kernels the programs, and they are seen only where they do not run.
    """
    threads: Counter[str] = Counter()

    def note(name: str, grid: Size, block: Size, *rest: object) -> bool:
        threads[name] += math.prod(grid) * math.prod(block)
        return runs

    if backend == "emulated":
        with executor(note):
            yield threads
    elif backend == "cuda":
        assert native.cuda is not None, native.cuda_error
        native.cuda.set_watch(note)
        try:
            yield threads
        finally:
            native.cuda.set_watch(None)
    elif backend == "triton" and not runs:
        from grokkernels.triton import kernel

        with kernel.executing(lambda launch: note(launch.kernel.name, (1, 1, 1), launch.grid) and None):
            yield threads
    else:
        yield threads


def launches(table: Table, case: Case, dtype: torch.dtype, backend: str = "emulated") -> Counter[str]:
    """The threads that each kernel would have when a case runs, forward and backward; nothing runs."""
    arguments = judge.on_device(judge.in_dtype(case.arguments(), dtype), dispatch.home(backend))
    with watched(backend, runs=False) as threads:
        judge.run(lambda **kw: table.op(**kw, backend=backend), arguments, table.grad, None)
    return threads


def numbers(case: Case) -> int:
    return sum(value.numel() for value in case.arguments().values() if isinstance(value, torch.Tensor))


@functools.cache
def _counted(op: str, architecture: str | None, backend: str) -> list[tuple[Counter[str], Work]]:
    """Every case of a row in every dtype with what it launches, small ones first."""
    with judge.at_level(architecture):
        todo = [(table, case, dtype) for table in ROWS[op] for case in table.cases for dtype in table.dtypes]
        counted = [(launches(*work, backend), work) for work in todo]
    if architecture == "sm_80":
        return sorted(counted, key=lambda pair: pair[0].total())
    # Grids of one block per multiprocessor have as many threads whatever they do: there the tensors tell.
    return sorted(counted, key=lambda pair: numbers(pair[1][1]))


def _any(name: str) -> bool:
    return True


def cheapest_cover(
    op: str, architecture: str | None, wanted: Callable[[str], bool] = _any, backend: str = "emulated"
) -> tuple[list[Work], set[str]]:
    """Few, small cases of a row that launch every kernel (those `wanted`) that any of its cases launches; and those
    kernels. `architecture` is one of the emulated device's; of a GPU, None: its own."""
    chosen: list[Work] = []
    covered: set[str] = set()
    for threads, work in _counted(op, architecture, backend):
        found = {name for name in threads.keys() - covered if wanted(name)}
        if found:
            chosen.append(work)
            covered |= found
    return chosen, covered


def every_kernel() -> set[str]:
    """All that the emulated column has."""
    assert native.emulated is not None, native.emulated_error
    a_kernel = re.compile(r"(?:void )?grokkernels::(?:\(anonymous namespace\)::|\w+::)*\w+_kernel[<(]")
    part_of_one = re.compile(r"\{lambda|\[clone")
    names = _symbols(native.emulated.__file__).values()
    return {name for name in names if a_kernel.match(name) and not part_of_one.search(name)}
