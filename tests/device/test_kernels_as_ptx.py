"""Every sm_80 kernel of every row, run as nvcc's PTX on the cheapest cases of its table, meets the float64 rule."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
import torch

from grokkernels import dispatch
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import tables
from tests.device.ptx_device import kernels, ptx_device, recorded, sources

ROWS: dict[str, list[Table]] = defaultdict(list)
for _table in tables().values():
    if "cuda" in dispatch.ROWS[_table.name].supports:
        ROWS[_table.op.__module__.rsplit(".", 1)[-1]].append(_table)


def launches(table: Table, case: Case, dtype: torch.dtype) -> Counter[str]:
    """The threads that each kernel has when a case runs, forward and backward."""
    threads: Counter[str] = Counter()
    arguments = judge.in_dtype(case.arguments(), dtype)
    with judge.at_level("sm_80"), recorded(threads):
        judge.run(lambda **kw: table.op(**kw, backend="emulated"), arguments, table.grad, None)
    return threads


def cheapest_cover(op: str) -> tuple[list[tuple[Table, Case, torch.dtype]], set[str]]:
    """Few, small cases that launch every kernel that any case launches; and those kernels."""
    todo = [(table, case, dtype) for table in ROWS[op] for case in table.cases for dtype in table.dtypes]
    counted = [(launches(*one), one) for one in todo]
    wanted = {name for threads, _ in counted for name in threads}
    chosen, covered = [], set()
    for threads, one in sorted(counted, key=lambda pair: pair[0].total()):
        if set(threads) - covered:
            chosen.append(one)
            covered |= set(threads)
    return chosen, wanted


@pytest.mark.slow
@pytest.mark.parametrize("op", sorted(ROWS))
def test_kernels_as_ptx(op: str) -> None:
    chosen, launched = cheapest_cover(op)
    compiled = {name for source in sources(op) for name in kernels(source)}
    assert compiled <= launched, f"no case of {op} launches {sorted(compiled - launched)}"
    with judge.at_level("sm_80"), ptx_device([op]):
        for table, case, dtype in chosen:
            verdict = judge.judge(table, case, dtype, "emulated")
            assert verdict.passed, f"{case.name}, {dtype}: {verdict.where} is {verdict.ratio:.3g} times too far"
