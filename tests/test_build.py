"""What a failing build says: one sentence with the package to install."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, code: str = "", **environment: str) -> str:
    """The last words of a build into a folder of its own, which must fail."""
    arguments = ["setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path)]
    program = f"{code}\nimport runpy, sys\nsys.argv = {arguments}\nrunpy.run_path('setup.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_missing_compiler(tmp_path: Path) -> None:
    words = build(tmp_path, CXX="no-such-compiler")
    assert words.startswith(
        "grokkernels needs a C++20 compiler and found no 'no-such-compiler': install the package g++"
    )


def test_missing_torch(tmp_path: Path) -> None:
    words = build(tmp_path, code="import sys; sys.modules['torch'] = None")
    assert words.startswith("grokkernels is built against torch, which does not import here")
    assert words.endswith("pip install torch.")


def test_missing_pybind11(tmp_path: Path) -> None:
    words = build(tmp_path, code="import sys; sys.modules['pybind11'] = None")
    assert words == "grokkernels is built with pybind11 and found none: pip install pybind11."


def test_a_source_that_does_not_compile(tmp_path: Path) -> None:
    words = build(tmp_path, CXXFLAGS="-include no_such_header.h", MAX_JOBS="1")
    assert words == "grokkernels: the native library did not build; the compiler's words stand above."


def test_isolated_build_asks_for_torch_only_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import build_backend

    assert not any(need.startswith("torch") for need in build_backend.get_requires_for_build_wheel())
    monkeypatch.setattr(build_backend, "_find_torch", lambda: False)
    assert "torch>=2.10" in build_backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in build_backend.get_requires_for_build_editable()
