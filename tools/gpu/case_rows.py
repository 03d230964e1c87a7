"""Case tables against float64, with the path that each case took: kernels of which architecture ran."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.device import Device, device_of
from gpu.plant import planted
from gpu.record import ABSENT, ERROR, PASSED, WRONG, Row
from gpu.worker import Question
from grokkernels import doctor, native
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from tests.device import launches
from tests.suite import smallest_tensor

# A case to be run: its table, the architecture to be emulated, the dtype.
Chosen = tuple[Table, str | None, Case, torch.dtype]


def chosen(device: Device, op: str, column: str, part: str) -> Iterator[Chosen]:
    """The cases of an op (a file of grokkernels/ops) that belong to a part: "all", the "cover" of its kernels, or a
    "brief" one: the smallest case with elements, in bfloat16 where it can."""
    tables = launches.ROWS[op]
    if part == "cover":
        for table, case, dtype in launches.cheapest_cover(op, None, backend=column)[0]:
            yield table, None, case, dtype
        return
    for table in tables:
        for level in device.levels(table.architectures) if column != "triton" else (None,):
            if part == "all":
                for case in table.cases:
                    for dtype in table.dtypes:
                        yield table, level, case, dtype
            else:
                yield table, level, *brief(table)


def brief(table: Table) -> tuple[Case, torch.dtype]:
    """The smallest case with elements, in bfloat16 where it can."""
    of_elements = (case for case in table.cases if smallest_tensor(case) > 1)
    dtype = torch.bfloat16 if torch.bfloat16 in table.dtypes else table.dtypes[0]
    return min(of_elements, key=launches.numbers), dtype


def where(column: str, level: str | None, dtype: torch.dtype) -> str:
    return " ".join(word for word in (column, level, str(dtype).removeprefix("torch.")) if word)


def unusable(check: str, column: str, name: str) -> Question | None:
    """The one row of a job whose column has no kernels here, with the reason; None where it has some. Triton's may be
    absent; the CUDA column's were to be built."""
    why = doctor.report()["backends"][column]["reason"]
    if why is None:
        return None
    return Question(Row(check, name, column, ""), lambda: (ABSENT if column == "triton" else ERROR, why, {}))


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    device, column = device_of(spec), spec["column"]
    refused = unusable("float64 rule", column, ",".join(spec["ops"]))
    if refused is not None:
        yield refused
        return
    for op in spec["ops"]:
        for table, level, case, dtype in chosen(device, op, column, spec["part"]):
            row = Row("float64 rule", table.name, where(column, level, dtype), case.name)
            yield Question(row, _asked(planted(table, device), level, case, dtype, column))


def _asked(
    table: Table, level: str | None, case: Case, dtype: torch.dtype, column: str
) -> Callable[[], tuple[str, str, dict[str, Any]]]:
    def ask() -> tuple[str, str, dict[str, Any]]:
        refusal_of(column)  # one of an earlier row
        with judge.at_level(level), launches.watched(column, runs=True) as threads:
            verdict = judge.judge(table, case, dtype, column)
        taken = refusal_of(column)
        data = {
            "ratio": verdict.ratio if math.isfinite(verdict.ratio) else None,  # JSON has no infinity
            "path": path(threads, taken),
            "kernels": sorted(set(map(short, threads))),
        }
        if verdict.passed:
            return PASSED, "", data
        return WRONG, f"{verdict.where}: {verdict.ratio:.3g} times what the float64 rule allows", data

    return ask


def refusal_of(column: str) -> str | None:
    """Why a tensor map was refused since the last question, if one was."""
    library = {"cuda": native.cuda, "emulated": native.emulated}.get(column)
    return None if library is None else library.take_refusal()


def path(threads: Counter[str], refusal: str | None) -> str:
    """The kernels of which architecture ran; empty where none was seen (no rows, or Triton's)."""
    names = set(map(short, threads))
    hopper = sorted(name for name in names if "_sm90_" in name)
    words = "sm_90" if hopper else "sm_80" if names else ""
    return f"{words}, refused map: {refusal}" if refusal else words


def short(name: str) -> str:
    """A kernel's own name out of its signature."""
    found = re.search(r"\w+_kernel(?=\W|$)", name)
    return found[0] if found else name
