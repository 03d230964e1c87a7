"""Who runs a call: the argument, `use`, the environment, the automatic choice; and what is said when none can."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import grokkernels
from grokkernels import dispatch, native
from tests.suite import native_calls

X, W = torch.randn(3, 8), torch.ones(8)


def ran_natively(**options) -> bool:
    return bool(native_calls(lambda: grokkernels.rms_norm(X, W, **options)))


def test_order_of_precedence() -> None:
    assert ran_natively()
    assert not ran_natively(backend="reference")
    with grokkernels.use("reference"):
        assert not ran_natively()
        assert ran_natively(backend="cpu")
        with grokkernels.use("cpu"):
            assert ran_natively()
        assert not ran_natively()
    assert ran_natively()


def test_use_restores_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), grokkernels.use("reference"):
        raise RuntimeError("inside")
    assert ran_natively()


def test_unknown_names() -> None:
    with (
        pytest.raises(ValueError, match=r"use\(\) names no backend: 'gpu'; allowed are cuda, triton"),
        grokkernels.use("gpu"),
    ):
        pass
    with pytest.raises(ValueError, match="backend names no backend: 'gpu'"):
        grokkernels.rms_norm(X, W, backend="gpu")


def test_explicit_choice_raises_and_automatic_falls_back() -> None:
    x = X.double()
    with pytest.raises(ValueError, match=r"rms_norm cannot run on backend 'cpu': x is torch\.float64"):
        grokkernels.rms_norm(x, W, backend="cpu")
    assert grokkernels.rms_norm(x, W).dtype == torch.float64


def test_explain() -> None:
    text = grokkernels.explain("rms_norm", X, W)
    assert "-> cpu        supported" in text
    assert "cuda       this torch" in text or "cuda       the tensors are on cpu" in text
    assert grokkernels.explain(grokkernels.rms_norm, X.double(), W).count("-> reference") == 1
    with pytest.raises(ValueError, match="op is no op: 'rms'"):
        grokkernels.explain("rms", X, W)


def test_a_library_that_did_not_load_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "load_error", "the native library did not load: undefined symbol")
    assert torch.isfinite(grokkernels.rms_norm(X, W)).all()  # the reference takes over
    with pytest.raises(
        ValueError, match="cannot run on backend 'cpu': the native library did not load: undefined symbol"
    ):
        grokkernels.rms_norm(X, W, backend="cpu")


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


@pytest.mark.slow
def test_environment_backend() -> None:
    program = "import grokkernels; from grokkernels import dispatch; print(dispatch._forced)"
    assert run_python(program, GROKKERNELS_BACKEND="reference").stdout.strip() == "reference"
    failed = run_python(program, GROKKERNELS_BACKEND="gpu")
    assert failed.returncode != 0
    assert "GROKKERNELS_BACKEND names no backend: 'gpu'" in failed.stderr


@pytest.mark.slow
def test_environment_cpu_level() -> None:
    program = "from grokkernels import native; print(native.module.cpu_level())"
    for level in native.module.cpu_levels():
        assert run_python(program, GROKKERNELS_CPU_LEVEL=level).stdout.strip() == level
    failed = run_python(program, GROKKERNELS_CPU_LEVEL="avx1024")
    assert failed.returncode != 0
    assert "GROKKERNELS_CPU_LEVEL: CPU level 'avx1024' is not available; this machine allows: baseline" in failed.stderr


def test_every_row_is_public() -> None:
    for name in dispatch.ROWS:
        assert callable(getattr(grokkernels, name)), name
