"""The peers: whoever computes the same on this machine. One that is not installed is listed as absent, with the reason.

torch comes with three of them: its eager operators, torch.compile of the same lines, and fused operators where there
are any. vLLM's CPU kernels are loaded from its wheel, which needs no installation: `make bench-peers` brings it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(os.environ.get("GROKKERNELS_PEERS", Path(__file__).parent.parent.parent / "build" / "peers"))


@dataclass(frozen=True)
class Absent:
    """A peer that cannot take part, and why."""

    reason: str


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of plain operators, for these very shapes."""
    return torch.compile(function, dynamic=False)


@cache
def find_vllm() -> Absent | None:
    """Loads vLLM's CPU operators as torch.ops._C; what keeps them away, if anything does."""
    if torch.cuda.is_available():
        return Absent("vLLM's CPU kernels are no peers of a GPU's")
    levels = [name for name in ("avx512", "avx2") if name in _cpu_levels()]
    if not levels:
        return Absent("vLLM's wheel is built for AVX2 and AVX-512")
    names = {"avx512": "_C_AVX512.abi3.so", "avx2": "_C_AVX2.abi3.so"}
    matrix = "_C.abi3.so" if torch.cpu._is_amx_tile_supported() else names[levels[0]]
    found = FOLDER / "vllm" / matrix
    if not found.exists():
        return Absent("vLLM's CPU kernels are not there: make bench-peers")
    try:
        torch.ops.load_library(str(found))
    except OSError as error:
        return Absent(f"vLLM's CPU kernels did not load: {error}")
    return None


def _cpu_levels() -> list[str]:
    from grokkernels import native

    return [] if native.module is None else list(native.module.cpu_levels())


def installed(package: str) -> Absent | None:
    return None if find_spec(package) is not None else Absent(f"{package} is not installed")


def on_cpu(package: str) -> Absent | None:
    """What keeps a package away whose kernels are for the CPU."""
    return Absent(f"{package}'s kernels are for the CPU") if torch.cuda.is_available() else installed(package)
