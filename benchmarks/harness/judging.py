"""No time is printed for a kernel that breaks the float64 rule."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def right(table: Table, case: Case, dtype: torch.dtype) -> Callable[[], None]:
    """Judges a case like the one timed, smaller where float64 would take too long, on the backend that is timed."""

    def check() -> None:
        verdict = judge.judge(table, case, dtype, DEVICE)
        assert verdict.passed, f"{case.name}: {verdict}"

    return check
