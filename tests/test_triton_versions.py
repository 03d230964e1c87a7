"""tools/triton_versions.py: what it brings, whom it asks, what it says; no wheel is brought here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grokkernels import triton as column

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tools"))

import triton_versions as tool  # noqa: E402


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict[str, str]]]:
    """The commands run instead of running them: pip brings a file, moe_gate does not compile with 3.7.1."""
    seen = []

    def run(command: list[str], env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        seen.append((command, env or {}))
        if "pip" in command:
            (Path(command[command.index("--target") + 1]) / "triton").touch()
        failed = {"tools/triton_check.py", "moe_gate", "3.7.1"} <= set(command)
        return subprocess.CompletedProcess(command, int(failed), "no such instruction")

    monkeypatch.setattr(tool, "FOLDER", tmp_path / "triton")
    monkeypatch.setattr(tool, "installed", lambda name: "3.9.0")
    monkeypatch.setattr(tool.subprocess, "run", run)
    return seen


def test_every_release_that_is_tested_is_here() -> None:
    assert [".".join(version.split(".")[:2]) for version in tool.VERSIONS] == list(column.TESTED)


def test_all_versions(calls: list, capsys: pytest.CaptureFixture[str]) -> None:
    """Each wheel is brought once; the installed one not at all; one failure is one cell and the exit code."""
    assert tool.main(["--op", "moe_gate", "--op", "rms_norm", "--version", "3.7.1", "--version", "3.9.0"]) == 1
    assert sum("pip" in command for command, _ in calls) == 1
    assert [path.name for path in tool.FOLDER.iterdir()] == ["3.7.1"]
    paths = [environment["PYTHONPATH"].split(os.pathsep) for command, environment in calls if "--version" in command]
    assert paths == 4 * [[str(ROOT), str(tool.FOLDER / "3.7.1")]] + 4 * [[str(ROOT)]]
    said = capsys.readouterr().out
    assert "triton 3.7.1, moe_gate, compiled: FAILED\nno such instruction" in said
    assert "| op | 3.7.1 | 3.9.0 |" in said
    assert "| moe_gate | interpreted 0 s, compiled FAILED | interpreted 0 s, compiled 0 s |" in said
    assert "| rms_norm | interpreted 0 s, compiled 0 s | interpreted 0 s, compiled 0 s |" in said


def test_one_check(calls: list) -> None:
    assert tool.main(["--op", "moe_gate", "--version", "3.7.1", "--only", "interpreted"]) == 0
    assert tool.main(["--op", "rms_norm", "--version", "3.9.0", "--only", "compiled", "--target", "sm_80"]) == 0
    assert tool.main(["--op", "rms_norm", "--version", "3.9.0", "--only", "compiled"]) == 0
    assert calls[3][0][6:8] == ["--target", "sm_90"]
    assert calls[1][1]["TRITON_INTERPRET"] == "1"
    assert calls[2][1]["TRITON_INTERPRET"] == "0"
    assert calls[2][0][2:] == ["rms_norm", "--brief", "--jobs", "1", "--target", "sm_80", "--version", "3.9.0"]


def test_a_wheel_that_does_not_come(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left that a later run would take for it."""

    def fails(command: list[str], **options: Any) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(tool.subprocess, "run", fails)
    with pytest.raises(subprocess.CalledProcessError):
        tool.bring("3.6.0")
    assert list(tool.FOLDER.iterdir()) == []
