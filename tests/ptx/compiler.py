"""Finds nvcc and lets it write PTX."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def nvcc() -> str | None:
    """From CUDA_HOME, else from PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin" / "nvcc").is_file():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def compile(source: str | Path, arch: str = "compute_80", flags: tuple[str, ...] = ()) -> str:
    """The PTX of a .cu file (a Path) or of CUDA source (a str)."""
    tool = nvcc()
    if tool is None:
        raise FileNotFoundError("no nvcc: neither CUDA_HOME nor PATH has one")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, str):
            path = Path(folder) / "source.cu"
            path.write_text(source)
        else:
            path = source
        out = Path(folder) / "out.ptx"
        command = [tool, "-std=c++20", f"-arch={arch}", "-ptx", *flags, str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return out.read_text()
