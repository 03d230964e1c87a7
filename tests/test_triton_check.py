"""tools/triton_check.py: what it lets pass and what not; one small row compiled for every target."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import triton_check  # noqa: E402
from triton_aot import Compiled  # noqa: E402

ONE = Compiled("row some_kernel<bf16, C=64>", "sm_90", 40, 0, 1024, "wgmma.mma_async")
BUDGET = {ONE.kernel: {ONE.target: [40, 1024, "wgmma.mma_async"]}}


def test_within() -> None:
    assert triton_check.failures([ONE, replace(ONE, registers=33, shared=0)], BUDGET) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 41}, "41 registers, 40 allowed"),
        ({"spills": 8}, "spills 8"),
        ({"shared": 1025}, "1025 bytes of shared memory, 1024 allowed"),
        ({"shared": 228 * 1024}, "the target has 227 KiB"),
        ({"tensor": "mma.sync"}, "its tensor instruction is 'mma.sync', not 'wgmma.mma_async'"),
        ({"kernel": "row other_kernel<bf16>"}, "not in triton_budget.json"),
    ],
)
def test_not_within(change: dict, words: str) -> None:
    assert any(words in line for line in triton_check.failures([replace(ONE, **change)], BUDGET))


def test_another_release_than_the_budgets() -> None:
    """Its registers and shared memory are its own; not its instructions, nor what the target has, nor new spills."""
    known = {ONE.kernel: {ONE.target: 8}}
    assert triton_check.failures([replace(ONE, registers=99, shared=2048, spills=8)], BUDGET, known) == []
    for change in ({"spills": 9}, {"tensor": ""}, {"shared": 228 * 1024}):
        assert len(triton_check.failures([replace(ONE, **change)], BUDGET, known)) == 1
    assert len(triton_check.failures([replace(ONE, spills=8)], BUDGET, {})) == 1


def test_known_spills_read_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_check, "SPILLS", tmp_path / "spills.json")
    assert triton_check.read_spills() == {}
    other = replace(ONE, target="sm_80", spills=4)
    triton_check.write_spills([replace(ONE, spills=8), other, replace(ONE, kernel="none")], "3.7.1")
    triton_check.write_spills([ONE], "3.8.0")
    assert triton_check.read_spills() == {"3.7": {ONE.kernel: {"sm_80": 4, "sm_90": 8}}, "3.8": {}}
    triton_check.write_spills([ONE, replace(other, spills=0)], "3.7.2")
    assert triton_check.read_spills() == {"3.7": {}, "3.8": {}}


def test_the_wrong_release() -> None:
    with pytest.raises(SystemExit, match=r"triton 3\.[0-9.]+ is imported, not 3.0.0"):
        triton_check.main(["gated_activation", "--version", "3.0.0"])


def test_gone() -> None:
    assert triton_check.gone([], BUDGET, ["row"]) == [ONE.kernel]
    assert triton_check.gone([], BUDGET, ["another"]) == []
    assert triton_check.gone([ONE], BUDGET, ["row"]) == []


def test_the_file_reads_as_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(triton_check, "BUDGET", tmp_path / "budget.json")
    assert triton_check.read() == (None, {})
    triton_check.write(BUDGET, "3.9.0")
    assert triton_check.read() == ("3.9", BUDGET)
    assert [path.name for path in tmp_path.iterdir()] == ["budget.json"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where kernels are loaded to be compiled."""
    command = [sys.executable, str(ROOT / "tools" / "triton_check.py"), *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_row_is_compiled() -> None:
    done = run("gated_activation")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "for 6 GPUs: no spills, within budget" in done.stdout


def test_no_such_row() -> None:
    done = run("soft_sign")
    assert done.returncode != 0
    assert "grokkernels/triton has no kernels of 'soft_sign'; it has" in done.stderr
