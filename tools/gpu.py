"""The day a GPU is there: `make gpu`. Conformance of the vocabulary, the tests, which of the cuda and triton columns is
faster row by row, the benchmarks, in one go.

Each step runs whatever the one before it said, so that one visit to a GPU tells as much as it can; the exit code is 1
if any failed. Everything printed is also kept in build/gpu/report.txt.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import cuda_toolkit  # noqa: E402

from tests.device import conformance  # noqa: E402

OUT = ROOT / "build" / "gpu"


def say(report: Path, text: str) -> None:
    print(text, flush=True)
    with report.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def build_conformance(arch: str, source: Path) -> Path:
    """The conformance kernels as a library for this GPU."""
    nvcc = cuda_toolkit.find_nvcc()
    if nvcc is None:
        sys.exit("make gpu needs nvcc 12.8 or newer: install the CUDA toolkit and set CUDA_HOME")
    target = OUT / f"{source.stem}.so"
    command = [str(nvcc), *cuda_toolkit.NVCC_FLAGS, *cuda_toolkit.includes(), f"-arch=sm_{arch}", "-shared"]
    subprocess.run([*command, "-Xcompiler", "-fPIC", "-o", str(target), str(source)], check=True)
    return target


def run_conformance(report: Path) -> bool:
    """Each wrapper on the GPU against its emulated meaning."""
    major, minor = torch.cuda.get_device_capability()
    ok = True
    for kind, source in conformance.SOURCES.items():
        if kind == "90a" and major != 9:
            say(report, f"conformance: {source.name} needs Hopper, this is {major}.{minor}")
            continue
        arch = kind if kind == "90a" else f"{major}{minor}"
        gpu = ctypes.CDLL(str(build_conformance(arch, source)))
        emulated = ctypes.CDLL(str(conformance.build_emulated(source, OUT)))
        for name in conformance.names(source):
            for seed in range(conformance.SEEDS):
                given = conformance.words(seed)
                mine, theirs = (conformance.run_library(library, name, given) for library in (emulated, gpu))
                words = conformance.difference(name, mine, theirs)
                if words is not None:
                    say(report, f"conformance: {name}, seed {seed}: {words}")
                    ok = False
        say(report, f"conformance: {len(conformance.names(source))} kernels of {source.name} compared")
    return ok


def run_step(report: Path, name: str, *command: str) -> bool:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    say(report, f"=== {name}\n{done.stdout}{done.stderr}")
    return done.returncode == 0


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch finds no NVIDIA GPU or driver here")
    OUT.mkdir(parents=True, exist_ok=True)
    report = OUT / "report.txt"
    report.unlink(missing_ok=True)
    say(report, f"{torch.cuda.get_device_name()}, torch {torch.__version__}, numpy {np.__version__}")
    python = sys.executable
    results = [
        run_conformance(report),
        run_step(report, "doctor", python, "-m", "grokkernels", "doctor"),
        run_step(report, "tests", python, "-m", "pytest", "tests", "-k", "cuda or triton"),
        run_step(report, "cuda or triton first", python, "tools/preference.py"),
        run_step(report, "benchmarks", python, "-m", "pytest", "benchmarks", "--benchmark-only"),
    ]
    say(report, f"report: {report}")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
