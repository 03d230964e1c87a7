"""compute-sanitizer over the cheapest cases that launch every kernel: a row for each op and tool."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu.record import ABSENT, ERROR, PASSED, WRONG, Row
from gpu.worker import ROOT, Question, end_with_parent

FOUND = 99  # the exit code by which the tool says that it found something
EXERCISE = Path(__file__).resolve().parent / "exercise.py"
# Each allocation by itself: what lies beyond one belongs to nobody.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
Answer = tuple[str, str, dict[str, Any]]


def under(tool: str, *command: str) -> list[str]:
    """A command of Python's under a tool."""
    options = ["--error-exitcode", str(FOUND), "--print-limit", "20"]
    return ["compute-sanitizer", "--tool", tool, *options, sys.executable, *command]


def judged(code: int, output: str) -> Answer:
    """What the tool's exit code and its lines ("=========") say."""
    lines = [line.strip("= ") for line in output.splitlines() if line.startswith("=========")]
    words = "; ".join(line for line in lines if line and "COMPUTE-SANITIZER" not in line)
    if code == 0:
        return PASSED, "", {}
    if code == FOUND:
        return WRONG, words[:2000], {}
    last = "; ".join(output.strip().splitlines()[-5:])
    return ERROR, f"ended with exit code {code}: {words or last}"[:2000], {}


def run(command: list[str]) -> tuple[int, str]:
    """The exit code and what was printed, which goes on to the log."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=end_with_parent,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def absence(tool: str, device: str) -> str | None:
    """Why the tool says nothing here; None where it runs."""
    if device == "stand-in":
        return "the stand-in has no GPU for it"
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not installed"
    code, output = run(under(tool, "-c", "import torch; torch.ones(1, device='cuda').add(1).item()"))
    last = "; ".join(output.strip().splitlines()[-3:])
    return None if code == 0 else f"it does not run here: exit code {code}: {last}"


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    tool = spec["tool"]
    why = absence(tool, spec["device"])
    if why is not None:
        yield Question(Row(tool, ",".join(spec["ops"]), "compute-sanitizer", ""), lambda: (ABSENT, why, {}))
        return
    for op in spec["ops"]:
        command = under(tool, str(EXERCISE), op)
        row = Row(tool, op, "compute-sanitizer", "cheapest cover")
        yield Question(row, lambda command=command: judged(*run(command)))
