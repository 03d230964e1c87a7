"""Builds the columns for the GPU that is there, in place and on all cores; and says what is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cuda_toolkit
import torch

from gpu.device import ROOT, device_of, said
from gpu.record import ERROR, PASSED, Row
from gpu.worker import Question, end_with_parent

PACKAGES = ("torch", "triton", "numpy", "flash-attn", "liger-kernel", "flashinfer-python")


def facts() -> dict[str, Any]:
    """What a reader must know of the machine beside its GPU."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    nvcc = cuda_toolkit.find_nvcc()
    return {
        "python": sys.version.split()[0],
        **found,
        "nvcc": "none of 12.8 or newer" if nvcc is None else f"{cuda_toolkit.release(nvcc)}, {nvcc}",
        "compute-sanitizer": shutil.which("compute-sanitizer") or "none",
        "ncu": shutil.which("ncu") or "none",
        "cores": os.cpu_count(),
        "commit": said(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]),
    }


def build(architecture: tuple[int, int]) -> tuple[str, str, dict[str, Any]]:
    """setup.py build_ext --inplace, for this architecture alone (Hopper's files have their own: see cuda_toolkit)."""
    environment = {
        **os.environ,
        "GROKKERNELS_COLUMNS": "cpu,cuda",
        "TORCH_CUDA_ARCH_LIST": "{}.{}".format(*architecture),
    }
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, preexec_fn=end_with_parent)
    if done.returncode != 0:
        return ERROR, f"setup.py ended with exit code {done.returncode}; the log has the compiler's words", {}
    return PASSED, "", {}


def loads() -> tuple[str, str, dict[str, Any]]:
    """Whether what was built loads: `grokkernels doctor` in a process of its own."""
    command = [sys.executable, "-m", "grokkernels", "doctor"]
    done = subprocess.run(command, cwd=ROOT, check=False, preexec_fn=end_with_parent)
    words = "import grokkernels.native as n; assert n.cuda is not None, n.cuda_error"
    loaded = subprocess.run([sys.executable, "-c", words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0 or loaded.returncode != 0:
        last = loaded.stderr.strip().splitlines()[-1:] or ["grokkernels doctor failed"]
        return ERROR, last[0], {}
    return PASSED, "", {}


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    device = device_of(spec)
    if device.name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no NVIDIA GPU or driver here")
    say(facts={**device.facts(), **facts()})
    if device.name == "stand-in":
        yield Question(Row("build", "", device.name, ""), lambda: (PASSED, "taken as it was built", {}))
        return
    yield Question(Row("build", "", "cpu,cuda", ""), lambda: build(device.architecture()))
    yield Question(Row("loads", "", "cuda", ""), loads)
