"""No time is printed for a kernel that breaks the float64 rule, nor for a contender that does other work."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grokkernels.testing import judge
from grokkernels.testing.case import Arguments, Case, Table

OTHER_NUMBERS = "gives other numbers"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def right(table: Table, case: Case, dtype: torch.dtype, backend: str = DEVICE) -> Callable[[], None]:
    """Judges a case like the one timed, smaller where float64 would take too long, on the backend that is timed."""

    def check() -> None:
        with torch.device("cpu"):  # where cases are drawn
            verdict = judge.judge(table, case, dtype, backend)
        assert verdict.passed, f"{case.name}: {verdict}"

    return check


def drawn(case: Case, dtype: torch.dtype) -> Arguments:
    """A case's arguments on the device that is timed."""
    with torch.device("cpu"):
        arguments = judge.in_dtype(case.arguments(), dtype)
    return judge.on_device(arguments, DEVICE)


def result(call: Callable[[], object]) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in judge.tensors_of(call())]


def different(theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> str | None:
    """Why another result is not that of the same work, if it is not; loose: float64 has judged ours already."""
    if len(theirs) != len(ours):
        return f"gives {len(theirs)} tensors instead of {len(ours)}"
    for one, other in zip(theirs, ours, strict=True):
        if one.numel() != other.numel():
            return f"gives {tuple(one.shape)} instead of {tuple(other.shape)}"
        one, other = one.reshape(-1).float(), other.reshape(-1).float()
        error = (one - other).square().mean().sqrt() / (other.square().mean().sqrt() + 1e-20)
        if not error <= 0.03:
            return f"{OTHER_NUMBERS}: {error.item():.1%} away"
    return None
