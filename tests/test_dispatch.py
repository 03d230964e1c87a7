"""Who runs a call: the argument, `use`, the environment, the automatic choice; and what is said when none can."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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


def test_use_is_one_for_each_thread() -> None:
    """Two threads whose blocks overlap, the first to enter leaving first: each sees its own, and nothing stays."""
    entered, left = threading.Event(), threading.Event()

    def other() -> list[bool]:
        seen = [ran_natively()]
        with grokkernels.use("reference"):
            seen.append(ran_natively())
            entered.set()
            assert left.wait(60)
            seen.append(ran_natively())
        return [*seen, ran_natively()]

    with ThreadPoolExecutor(1) as pool:
        with grokkernels.use("emulated"):
            result = pool.submit(other)
            assert entered.wait(60)
            assert ran_natively()
        left.set()
        assert result.result() == [True, False, False, True]
    assert ran_natively()


def test_use_is_traced() -> None:
    """Inside a compiled function and around one; a graph is made once for each backend."""
    graphs = []

    def look(module: torch.fx.GraphModule, example: object) -> Callable[..., object]:
        graphs.append(["grokkernels" in str(node.target) for node in module.graph.nodes].count(True))
        return module.forward

    def inside(x: torch.Tensor) -> torch.Tensor:
        with grokkernels.use("reference"):
            y = grokkernels.rms_norm(x, W)
        return grokkernels.rms_norm(y, W)

    torch._dynamo.reset()
    torch.compile(inside, fullgraph=True, backend=look)(X)
    assert graphs == [1]
    graphs.clear()
    compiled = torch.compile(lambda x: grokkernels.rms_norm(x, W), fullgraph=True, backend=look)
    for _ in range(2):
        compiled(X)
        with grokkernels.use("reference"):
            compiled(X)
            with ThreadPoolExecutor(1) as pool:
                pool.submit(compiled, X).result()
    assert graphs == [1, 0]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors pass for CUDA ones, on a machine where neither column for them is there."""
    monkeypatch.setattr(dispatch, "_kind", lambda device: "cuda")
    monkeypatch.setattr(native, "cuda", None)
    monkeypatch.setattr(native, "cuda_error", "this installation was built without CUDA kernels")
    monkeypatch.setattr(dispatch.triton_column, "load_error", lambda: "triton is not installed: pip install it")
    monkeypatch.setattr(dispatch, "_warned", set())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("on_a_gpu")
def test_plain_pytorch_on_a_gpu_is_said_once(compiled: bool) -> None:
    def call() -> torch.Tensor:
        return grokkernels.rms_norm(X, W)

    torch._dynamo.reset()
    run = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    with pytest.warns(UserWarning, match="plain PyTorch") as said:
        run()
    (warning,) = [w for w in said if "plain PyTorch" in str(w.message)]
    for words in (
        "rms_norm and every other op", "on cuda tensors", "cuda: this installation was built without CUDA kernels",
        "triton: triton is not installed: pip install it", "grokkernels doctor", "grokkernels.use('reference')",
    ):  # fmt: skip
        assert words in str(warning.message)
    assert compiled or warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
        grokkernels.gated_activation(X, X)


@pytest.mark.usefixtures("on_a_gpu")
def test_plain_pytorch_that_was_asked_for_is_not_worth_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grokkernels.rms_norm(X, W, backend="reference")
        with grokkernels.use("reference"):
            grokkernels.rms_norm(X, W)


def test_a_dtype_for_the_reference_is_not_worth_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grokkernels.rms_norm(X.double(), W)


def test_meta_tensors_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape functions belong to no device: whatever backend is asked for, or none."""
    monkeypatch.setattr(native, "module", None)
    for backend in (None, *dispatch.BACKENDS):
        y = grokkernels.rms_norm(X.to("meta").bfloat16(), W.to("meta"), backend=backend)
        assert (y.device.type, y.dtype, y.shape) == ("meta", torch.bfloat16, X.shape)


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
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(UserWarning, match="plain PyTorch .* on cpu tensors, .* did not load: undefined symbol"):
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
    program = "import grokkernels; from grokkernels import dispatch; print(dispatch._forced.backend)"
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
