"""Lets nvcc write PTX."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "tools"))

import cuda_toolkit


def nvcc() -> Path | None:
    """From CUDA_HOME, from PATH or from pip's packages, else None."""
    return cuda_toolkit.find_nvcc()


def compile(source: str | Path, arch: str = "compute_80", flags: tuple[str, ...] = ()) -> str:
    """The PTX of a .cu file (a Path) or of CUDA source (a str)."""
    tool = nvcc()
    if tool is None:
        raise FileNotFoundError("no nvcc: neither CUDA_HOME nor PATH nor pip's packages have one")
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if isinstance(source, str):
            path = Path(folder) / "source.cu"
            path.write_text(source, encoding="utf-8")
        out = Path(folder) / "out.ptx"
        command = [str(tool), *cuda_toolkit.NVCC_FLAGS, *flags, f"-arch={arch}", "-ptx", str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return out.read_text(encoding="utf-8")
