"""The door of the column: `@kernel`, `executing`, what is said when the column cannot run."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import triton.language as tl

import grokkernels
from grokkernels import dispatch
from grokkernels import triton as column
from grokkernels.triton.kernel import Launch, executing, executor, kernel

ROW = {"x": torch.ones(2, 4), "weight": torch.ones(4)}


@kernel
def add_one_kernel(x_ptr, other_ptr, n: tl.int64, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at, at < n)
    if other_ptr is not None:
        x += tl.load(other_ptr + at, at < n)
    tl.store(x_ptr + at, x + 1, at < n)


def test_launch() -> None:
    x = torch.zeros(10)
    add_one_kernel[(1,)](x, None, 7, N=16, num_warps=1)
    add_one_kernel[(0,)](x, None, 7, N=16)
    assert x.tolist() == [1.0] * 7 + [0.0] * 3


def test_executing() -> None:
    """What a launch tells to whoever runs it instead."""
    seen: list[Launch] = []
    x = torch.zeros(40, dtype=torch.bfloat16)
    with executing(seen.append):
        add_one_kernel[(3,)](x[1:], None, 7, N=16, num_warps=2)
        add_one_kernel[(1,)](x, torch.empty(8, dtype=torch.int64, device="meta"), 7, N=16)
    assert executor() is None
    assert (x == 0).all()
    first, second = seen
    assert first.signature() == {"x_ptr": "*bf16", "other_ptr": "constexpr", "n": "i64", "N": "constexpr"}
    assert first.arguments == {"x_ptr": first.arguments["x_ptr"], "other_ptr": None, "n": 7, "N": 16}
    assert first.grid == (3,)
    assert first.options == {"num_warps": 2}
    assert first.aligned() == []
    assert second.signature()["other_ptr"] == "*i64"
    assert second.aligned() == ["x_ptr", "other_ptr"]


@pytest.mark.parametrize("named", [{}, {"N": 16, "M": 3}])
def test_arguments_amiss(named: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"add_one_kernel is launched with .* amiss"):
        add_one_kernel[(1,)](torch.zeros(8), None, 7, **named)


def test_parameters_have_types() -> None:
    def untyped(x_ptr, rows):
        pass

    with pytest.raises(TypeError, match="untyped: \\['rows'\\] are no pointers"):
        kernel(untyped)


def test_a_release_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """The column says so and the rest works."""
    monkeypatch.setattr(column, "version", lambda name: "3.5.1")
    column.load_error.cache_clear()
    try:
        assert column.load_error() == "triton 3.5.1 is installed; grokkernels needs 3.6 or newer"
        with pytest.raises(ValueError, match=r"rms_norm cannot run on backend 'triton': triton 3.5.1 is installed"):
            grokkernels.rms_norm(**ROW, backend="triton")
        grokkernels.rms_norm(**ROW)
    finally:
        column.load_error.cache_clear()


@pytest.mark.parametrize(("found", "new"), [("3.6.0", False), ("3.9.7+git1", False), ("3.10.0", True), ("4.0", True)])
def test_releases_are_numbers(found: str, new: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whichever name Triton was installed."""

    def version(name: str) -> str:
        if name != column.DISTRIBUTIONS[-1]:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(column, "version", version)
    column.load_error.cache_clear()
    try:
        assert column.load_error() is None
        assert (column.untested() is not None) == new
    finally:
        column.load_error.cache_clear()


def test_a_newer_release_warns_once_and_runs() -> None:
    script = """
import importlib.metadata as metadata, warnings
found = metadata.version
metadata.version = lambda name: "3.10.0" if name == "triton" else found(name)
import torch, grokkernels
from grokkernels import doctor
words = "triton 3.10.0 is newer than 3.9, the newest release that this grokkernels was tested with"
assert doctor.report()["backends"]["triton"] == {"usable": True, "reason": words}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        y = grokkernels.rms_norm(torch.ones(2, 4), torch.ones(4), eps=0.0, backend="triton")
assert (y == 1).all()
assert [str(w.message) for w in caught if "triton" in str(w.message)] == [words], caught
"""
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)


def test_triton_absent() -> None:
    """Without triton everything else imports and runs, `doctor` says what is missing, nothing asks for it."""
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import importlib.metadata as metadata
found = metadata.version
def version(name):
    if "triton" in name:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
import torch, grokkernels
from grokkernels import doctor
grokkernels.rms_norm(torch.ones(2, 4), torch.ones(4))
said = doctor.report()["backends"]["triton"]
assert said == {"usable": False, "reason": "triton is not installed: pip install 'grokkernels[triton]'"}, said
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the tests compile")
def test_where_it_runs() -> None:
    assert dispatch.ROWS["rms_norm"].reason("triton", torch.device("cpu"), **ROW) is None
    reason = dispatch.ROWS["rms_norm"].reason("triton", torch.device("cuda"), **ROW)
    assert reason == "TRITON_INTERPRET=1 runs on the CPU, the tensors are on cuda"
    assert "-> cpu" in grokkernels.explain("rms_norm", **ROW)
    script = """
import torch, grokkernels
grokkernels.rms_norm(torch.ones(2, 4), torch.ones(4), backend="triton")
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "the tensors are on cpu, not on a GPU; TRITON_INTERPRET=1, set before the start" in done.stderr
