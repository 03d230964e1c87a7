"""Nsight Compute on the kernels that matter: what each of them waits for, at Grok-1's sizes."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu.record import ABSENT, ERROR, PASSED, Row
from gpu.sanitizer_rows import run
from gpu.worker import Question

# Kernel, op (a file of grokkernels/ops), which of its problems, whether its backward is needed.
KERNELS = (
    ("flash_attention_fwd_sm90_kernel", "flash_attention", 0, False),
    ("flash_attention_bwd_dkv_sm90_kernel", "flash_attention", 0, True),
    ("flash_attention_bwd_dq_sm90_kernel", "flash_attention", 0, True),
    ("grouped_mm_sm90_kernel", "grouped_mm", 0, False),
    ("moe_experts_gate_up_sm90_kernel", "moe_experts", 0, False),
    ("moe_experts_wgrad_sm90_kernel", "moe_experts", 0, True),
    ("linear_cross_entropy_fwd_kernel", "linear_cross_entropy", 0, False),
    ("rms_norm_bwd_kernel", "rms_norm", 0, True),
)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
EXERCISE = Path(__file__).resolve().parent / "exercise.py"
Answer = tuple[str, str, dict[str, Any]]


def under(*command: str, kernel: str | None = None) -> list[str]:
    """A command of Python's under ncu: the clocks stay as they are, which a borrowed machine wants."""
    chosen = [] if kernel is None else ["--kernel-name", f"regex:{kernel}", "--launch-skip", "1"]
    sections = [word for name in SECTIONS for word in ("--section", name)]
    options = ["--clock-control", "none", "--launch-count", "1", "--csv", "--page", "details"]
    return ["ncu", *options, *sections, *chosen, sys.executable, *command]


def metrics(output: str) -> dict[str, str]:
    """Of ncu's CSV: "section: metric" -> "value unit"."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    found = csv.DictReader(io.StringIO("\n".join(lines)))
    return {
        f"{row['Section Name']}: {row['Metric Name']}": f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in found
        if row.get("Metric Name")
    }


def profiled(kernel: str, op: str, index: int, backward: bool) -> Answer:
    code, output = run(under(str(EXERCISE), op, str(index), str(int(backward)), kernel=kernel))
    found = metrics(output)
    if code != 0 or not found:
        last = "; ".join(output.strip().splitlines()[-3:])
        return ERROR, f"exit code {code}, {len(found)} metrics: {last}"[:1000], {}
    return PASSED, "", {"metrics": found}


def absence(device: str) -> str | None:
    """Why ncu says nothing here; None where it runs."""
    if device == "stand-in":
        return "the stand-in has no GPU for it"
    if shutil.which("ncu") is None:
        return "ncu is not installed"
    code, output = run(under("-c", "import torch; torch.ones(1, device='cuda').add(1).item()"))
    return None if code == 0 and metrics(output) else "; ".join(output.strip().splitlines()[-3:])


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    why = absence(spec["device"])
    for kernel, op, index, backward in KERNELS:
        row = Row("ncu", op, "cuda", kernel)
        if why is not None:
            yield Question(row, lambda: (ABSENT, str(why), {}))
        else:
            yield Question(row, lambda at=(kernel, op, index, backward): profiled(*at))
