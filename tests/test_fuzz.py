"""The fuzzer: it runs, a seed gives the same call again, and a fault in an op is found."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tools"))

import fuzz  # noqa: E402

from grokkernels.testing import judge  # noqa: E402
from grokkernels.testing.cases import tables  # noqa: E402


def test_every_op_can_be_drawn() -> None:
    """Whoever adds an op decorates what makes its cases, and it takes part."""
    for name, table in tables().items():
        assert all(case.call is not None for case in table.cases), name


def test_a_seed_repeats_its_call() -> None:
    first, again = (fuzz.drawn("gated_activation", "cpu", 5) for _ in range(2))
    assert str(first) == str(again)
    for one, other in zip(first.case.arguments().values(), again.case.arguments().values(), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert len({str(fuzz.drawn("gated_activation", "cpu", seed)) for seed in range(8)}) == 8


def test_gradients_that_are_nothing_but_cancellation() -> None:
    """A norm of one column is +-1: its gradient, far below a rounding of its terms, is not judged; others are."""
    table = tables()["rms_norm"]

    def gradients(cols: int, eps: float) -> list[bool]:
        x = 64 * torch.randn(65, cols, generator=torch.Generator().manual_seed(0))
        arguments = {"x": x, "weight": torch.full((cols,), 1.3), "eps": eps}
        runs = [judge.run(table.reference, a, ("x",), None)[1] for a in (arguments, judge.in_float64(arguments))]
        return [fuzz.nothing_but_cancellation(low, oracle) for low, oracle in zip(*runs, strict=True)]

    assert gradients(1, 1e-5) == [True]
    assert gradients(1, 2000.0) == gradients(2, 1e-5) == gradients(67, 1e-5) == [False]


def test_a_sum_of_no_terms_is_not_drawn() -> None:
    """Seed 1000 once drew top_k = 0, of which the reference has no gradient."""
    call = fuzz.drawn("moe_unpermute", "emulated", 1000)
    assert judge.run(call.table.reference, call.case.arguments(), call.table.grad, None)[2], str(call)


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes its gate for contiguous: wrong in some layouts only, and each time."""
    table = tables()["gated_activation"]

    def planted(*, gate: torch.Tensor, up: torch.Tensor, **options: Any) -> torch.Tensor:
        read = gate.as_strided(gate.shape, torch.empty(gate.shape, device="meta").stride())
        return table.op(read, up, **options)

    planted.__name__ = table.name
    monkeypatch.setattr(fuzz, "tables", lambda: {"gated_activation": replace(table, op=planted)})
    faults = [fuzz.fault_of("gated_activation", "cpu", seed) for seed in range(12)]
    assert 0 < sum(fault is not None for fault in faults) < 12
    monkeypatch.undo()
    assert [fuzz.fault_of("gated_activation", "cpu", seed) for seed in range(12)] == [None] * 12


def test_the_command() -> None:
    level = judge.levels(tables()["gated_activation"], "cpu")[0]
    command = ["--backend", "cpu", "--level", str(level), "--op", "gated_activation", "--calls", "2", "--seed", "3"]
    done = subprocess.run([sys.executable, str(ROOT / "tools/fuzz.py"), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 calls, 0 failures" in done.stdout
