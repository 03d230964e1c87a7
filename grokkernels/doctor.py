"""Facts about this installation: versions, CPU level, which backends are usable and why the others are not."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

import torch

from grokkernels import native, triton, waiting
from grokkernels.version import __version__


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu_reason() -> str | None:
    return native.load_error


def _cuda_reason() -> str | None:
    if native.cuda is None:
        return native.cuda_error
    if not torch.cuda.is_available():
        return f"built for {native.cuda.architectures}, but torch finds no NVIDIA GPU or driver"
    return None


def _triton_reason() -> str | None:
    if triton.load_error() is not None or triton.INTERPRETED:
        return triton.load_error()
    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    return "torch finds no GPU or driver; TRITON_INTERPRET=1 interprets on the CPU"


def _emulated_reason() -> str | None:
    return native.emulated_error


def report() -> dict[str, Any]:
    """Everything `grokkernels doctor` prints, as plain values."""
    module = native.module
    reasons = {
        "cpu": _cpu_reason(),
        "cuda": _cuda_reason(),
        "triton": _triton_reason(),
        "emulated": _emulated_reason(),
        "reference": None,
    }
    cpu: dict[str, Any] = {
        "model": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "threads_wait": waiting.policy(),
    }
    if module is not None:
        cpu |= {"level": module.cpu_level(), "levels": list(module.cpu_levels())}
        cpu["threads_used"] = module.threads_used()
    return {
        "versions": {
            "grokkernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.installed(),
        },
        "native": None
        if module is None
        else {
            "library": module.__file__,
            "compiler": module.compiler,
            "torch_built_with": module.torch_built_with,
            "torch_oldest": module.torch_target,
        },
        "cpu": cpu,
        "backends": {
            name: {"usable": reason is None, "reason": reason or (triton.untested() if name == "triton" else None)}
            for name, reason in reasons.items()
        },
        "settings": {
            name: os.environ.get(name) for name in ("GROKKERNELS_BACKEND", "GROKKERNELS_CPU_LEVEL", "OMP_NUM_THREADS")
        },
        "system": {"platform": platform.platform(), "executable": sys.executable},
    }
