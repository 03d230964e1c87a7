"""The cheapest cover of an op: few, small cases of its tables that launch every Triton kernel that any case launches.

    TRITON_INTERPRET=1 python -m tests.triton.cover rms_norm

judges them in the interpreter, in every dtype.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter

import torch
import triton

from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import tables
from grokkernels.triton.kernel import Launch, executing


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


def cover(op: str, dtype: torch.dtype) -> list[tuple[Table, Case]]:
    """Small cases that together launch all that the row's cases launch in this dtype."""
    mine = [table for table in tables().values() if table.op.__module__.endswith(f".{op}") and dtype in table.dtypes]
    work = [(table, case) for table in mine for case in table.cases if numbers(case)]
    counted = [(launches(*one, dtype), numbers(one[1]), one) for one in work]
    chosen: list[tuple[Table, Case]] = []
    covered: set[str] = set()
    for threads, _, one in sorted(counted, key=lambda c: (c[0].total(), c[1])):
        if threads.keys() - covered and tells_something(*one, dtype):
            chosen.append(one)
            covered |= threads.keys()
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description="judges an op's cheapest cover in the interpreter")
    parser.add_argument("op")
    parser.add_argument("--version", default=triton.__version__, help="the version of Triton that is meant to run")
    options = parser.parse_args()
    if triton.__version__ != options.version:
        raise SystemExit(f"triton {triton.__version__} is imported, not {options.version}")
    judged = failed = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for table, case in cover(options.op, dtype):
            verdict = judge.judge(table, case, dtype, "triton")
            print(f"{table.name} {case.name}, {dtype}: {verdict.ratio:.3g} times what is allowed, {verdict.where}")
            judged += 1
            failed += not verdict.passed
    return 0 if judged and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
