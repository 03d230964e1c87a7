"""`make new-op` writes a row that is complete, formatted and compiles."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def new_op(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "new_op.py"), name],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stubs_are_a_row(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    done = new_op("soft_sign", tmp_path)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / line for line in done.stdout.splitlines()[:-1]]
    assert len(files) == 11
    assert all(path.exists() and "@" not in re.sub("@(pytest|kernel|builder)", "", path.read_text()) for path in files)
    for path in (p for p in files if p.suffix == ".py"):
        compile(path.read_text(), str(path), "exec")
    command = ["c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DGK_CPU_LEVEL=baseline"]
    command += ["-DGK_CPU_IS_BASELINE=1", f"-I{tmp_path / 'csrc'}", str(tmp_path / "csrc/cpu/soft_sign.cpp")]
    subprocess.run(command, check=True)
    command = [
        "c++",
        "-std=c++20",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-I{tmp_path / 'csrc'}",
        "-x",
        "c++",
    ]
    command += [f"-I{tmp_path / 'csrc/emulated'}", str(tmp_path / "csrc/cuda/soft_sign.cu"), "-Wno-unknown-pragmas"]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("name", ["", "Soft", "soft-sign", "1op"])
def test_bad_names(name: str, tmp_path: Path) -> None:
    done = new_op(name, tmp_path)
    assert done.returncode != 0
    assert "NAME must be lower-case words" in done.stderr
    assert not list(tmp_path.iterdir())


def test_never_overwrites(tmp_path: Path) -> None:
    assert new_op("soft_sign", tmp_path).returncode == 0
    again = new_op("soft_sign", tmp_path)
    assert again.returncode != 0
    assert "the row soft_sign exists already" in again.stderr
