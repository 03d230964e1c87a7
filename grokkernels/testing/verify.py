"""Runs case tables against float64 on this machine: what `grokkernels verify` does, and the worst ratios it found."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from grokkernels import dispatch, native
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import tables

# How many cases of each table `--quick` judges: every op in every dtype, in under 30 seconds on two cores. An emulated
# or interpreted case takes ten times as long as a native one, and more.
QUICK = {"cpu": 9, "cuda": 9, "reference": 9, "emulated": 3, "triton": 2}


@dataclass(frozen=True)
class Result:
    """One line of the report: an op in one dtype on one backend (and CPU level)."""

    op: str
    backend: str
    level: str | None  # CPU level or emulated architecture
    dtype: str
    cases: int
    of: int  # cases that the table has
    worst: float  # error over what the float64 rule allows: 1 is the limit
    worst_case: str
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures


def plan(backend: str | None, op: str | None, quick: bool) -> list[tuple[Table, str, str | None, torch.dtype]]:
    """What to run. Errors: ValueError for a name that is no backend or op, or a backend unusable here."""
    all_tables = tables()
    if op is not None and op not in all_tables:
        raise ValueError(f"--op names no op: '{op}'; allowed are {', '.join(sorted(all_tables))}")
    if backend is not None and backend not in dispatch.BACKENDS:
        raise ValueError(f"--backend names no backend: '{backend}'; allowed are {', '.join(dispatch.BACKENDS)}")
    name = backend or ("cpu" if native.module is not None else "reference")
    reason = dispatch.unusable(name)
    if reason is not None:
        raise ValueError(f"--backend {name} cannot run: {reason}")
    chosen = {key: table for key, table in all_tables.items() if op in (None, key)}
    column = "cuda" if name == "emulated" else name
    chosen = {key: t for key, t in chosen.items() if name == "reference" or column in dispatch.ROWS[t.name].supports}
    if not chosen:
        raise ValueError(f"--backend {name} cannot run: no op has kernels for it in this build")
    as_it_is: list[str | None] = [native.module.cpu_level()] if name == "cpu" and quick else []
    return [
        (table, name, level, dtype)
        for table in chosen.values()
        for level in as_it_is or judge.levels(table, name)
        for dtype in table.dtypes
    ]


def quick_cases(table: Table, backend: str) -> tuple[Case, ...]:
    """The smallest cases of a table that have elements, as many as half a minute leaves the backend."""

    def size(case: Case) -> int:
        return sum(value.numel() for value in case.arguments().values() if isinstance(value, torch.Tensor))

    told = [case for case in table.cases if size(case) >= judge.FEW]
    return tuple(sorted(told, key=size)[: QUICK[backend]])


def run(table: Table, backend: str, level: str | None, dtype: torch.dtype, *, quick: bool) -> Result:
    """Judges every case of a table, or with `quick` a few."""
    cases = quick_cases(table, backend) if quick else table.cases
    worst, worst_case, failures = 0.0, "", []
    with judge.at_level(level):
        for case in cases:
            try:
                verdict = judge.judge(table, case, dtype, backend)
            except Exception as error:  # a crash is a verdict too; it is reported, not hidden
                failures.append(f"{case.name}: {type(error).__name__}: {error}")
                continue
            if verdict.ratio >= worst:
                worst, worst_case = verdict.ratio, f"{case.name}, {verdict.where}"
            if not verdict.passed:
                failures.append(f"{case.name}: {verdict.where} is {verdict.ratio:.3g} times over what is allowed")
    name = str(dtype).removeprefix("torch.")
    return Result(table.name, backend, level, name, len(cases), len(table.cases), worst, worst_case, tuple(failures))
