"""The device's vocabulary, kernel by kernel: the GPU against the emulated device, bit by bit."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cuda_toolkit

from gpu.device import WORK, device_of
from gpu.record import ABSENT, PASSED, WRONG, Row
from gpu.worker import Question
from tests.device import conformance


def gencode(kind: str, architecture: tuple[int, int]) -> str:
    """nvcc's flag: Hopper's own instructions need 90a, and no pass for another architecture beside it."""
    number = kind if kind == "90a" else "{}{}".format(*architecture)
    return f"-gencode=arch=compute_{number},code=sm_{number}"


def build_gpu(kind: str, source: Path, architecture: tuple[int, int]) -> Path:
    """The kernels as a library for this GPU."""
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        raise SystemExit("conformance needs nvcc 12.8 or newer: install the CUDA toolkit and set CUDA_HOME")
    target = WORK / f"{source.stem}.so"
    command = [str(nvcc), *cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.includes(), gencode(kind, architecture), "-shared"]
    subprocess.run([*command, "-Xcompiler", "-fPIC", "-o", str(target), str(source)], check=True)
    return target


def rows(spec: dict[str, Any], say: Callable[..., None]) -> Iterator[Question]:
    device, kind = device_of(spec), spec["architecture"]
    source = conformance.SOURCES[kind]
    if kind == "90a" and device.architecture()[0] != 9:
        words = "these instructions are Hopper's, and this GPU is none"
        yield Question(Row("conformance", "vocabulary", source.stem, ""), lambda: (ABSENT, words, {}))
        return
    WORK.mkdir(parents=True, exist_ok=True)
    emulated = ctypes.CDLL(str(conformance.build_emulated(source, WORK)))
    asked = ctypes.CDLL(str(build_gpu(kind, source, device.architecture()))) if device.name == "cuda" else emulated
    for name in conformance.names(source):
        yield Question(Row("conformance", "vocabulary", source.stem, name), _asked(name, emulated, asked))


def _asked(name: str, emulated: ctypes.CDLL, asked: ctypes.CDLL) -> Callable[[], tuple[str, str, dict[str, Any]]]:
    def ask() -> tuple[str, str, dict[str, Any]]:
        for seed in range(conformance.SEEDS):
            given = conformance.words(seed)
            mine, theirs = (conformance.run_library(library, name, given) for library in (emulated, asked))
            words = conformance.difference(name, mine, theirs)
            if words is not None:
                return WRONG, f"seed {seed}: {words}", {}
        return PASSED, "", {}

    return ask
