"""The Triton column with every launch compiled for sm_80 and run by the PTX interpreter:

    python -m tests.triton.ptx_judge rms_norm

So the compiler's own output meets the float64 rule. It needs a process of its own, since kernels that are to be
compiled cannot be loaded under TRITON_INTERPRET. Few, small cases of the row's tables together launch every kernel
that any of their cases launches, in each dtype.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import tables
from grokkernels.triton.kernel import Launch, executing
from tests import ptx
from tests.device.ptx_device import ProcessMemory

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import triton_aot  # noqa: E402

Work = tuple[Table, Case, torch.dtype]

_parsed: dict[tuple[str, tuple[str, ...]], tuple[ptx.Kernel, int]] = {}


def compiled(launch: Launch) -> tuple[ptx.Kernel, int]:
    """The kernel as Triton compiles it for sm_80, and its bytes of shared memory."""
    key = triton_aot.name(launch), tuple(launch.aligned())
    if key not in _parsed:
        built = triton_aot.compile_for(launch, "sm_80")
        kernel = ptx.parse(built.asm["ptx"]).kernel(built.metadata.name)
        _parsed[key] = kernel, built.metadata.shared
    return _parsed[key]


def run(launch: Launch) -> None:
    """In the interpreter, on the memory of the tensors themselves."""
    kernel, shared = compiled(launch)
    kinds = {name: kind for name, kind in launch.signature().items() if kind != "constexpr"}
    arguments = [number(launch.arguments[name], kind) for name, kind in kinds.items()]
    arguments += [0] * (len(kernel.parameters) - len(arguments))  # Triton's own: scratch for descriptors and profiles
    ptx.run(kernel, launch.grid, threads_of(launch), shared, arguments, ProcessMemory())


def number(value: Any, kind: str) -> int | float:
    """An argument as the kernel gets it."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return float(value) if kind.startswith("fp") else int(value)


def threads_of(launch: Launch) -> int:
    """Of one program."""
    return 32 * launch.options.get("num_warps", 4)


def launches(table: Table, case: Case, dtype: torch.dtype) -> Counter[str]:
    """The threads of each kernel when a case runs, forward and backward; nothing runs."""
    threads: Counter[str] = Counter()

    def note(launch: Launch) -> None:
        threads[launch.kernel.name] += math.prod(launch.grid) * threads_of(launch)

    arguments = judge.in_dtype(case.arguments(), dtype)
    with executing(note):
        judge.run(lambda **kw: table.op(**kw, backend="triton"), arguments, table.grad, None)
    return threads


def numbers(case: Case) -> int:
    """How many numbers a case has; 0 for a case with too few to tell anything."""
    sizes = [value.numel() for value in case.arguments().values() if isinstance(value, torch.Tensor)]
    return sum(sizes) if all(sizes) and sum(sizes) >= judge.FEW else 0


def tells_something(table: Table, case: Case, dtype: torch.dtype) -> bool:
    """Whether anything but zeros comes out."""
    outputs = judge.tensors_of(table.reference(**judge.in_dtype(case.arguments(), dtype)))
    return bool(outputs[0].nan_to_num().any())


def cover(op: str, dtype: torch.dtype) -> list[Work]:
    """Small cases that together launch all that the row's cases launch in this dtype."""
    mine = [table for table in tables().values() if table.op.__module__.endswith(f".{op}") and dtype in table.dtypes]
    work = [(table, case, dtype) for table in mine for case in table.cases if numbers(case)]
    counted = sorted(((launches(*one), numbers(one[1]), one) for one in work), key=lambda c: (c[0].total(), c[1]))
    chosen: list[Work] = []
    covered: set[str] = set()
    for threads, _, one in counted:
        if threads.keys() - covered and tells_something(*one):
            chosen.append(one)
            covered |= threads.keys()
    return chosen


def main(op: str) -> int:
    failed = 0
    for dtype in (torch.float32, torch.bfloat16):
        for table, case, _ in cover(op, dtype):
            with executing(run):
                verdict = judge.judge(table, case, dtype, "triton")
            print(f"{table.name} {case.name}, {dtype}: {verdict.ratio:.3g} times what is allowed, {verdict.where}")
            failed += not verdict.passed
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
