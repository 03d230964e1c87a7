"""`grokkernels doctor` and `grokkernels verify`."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner

from grokkernels import dispatch, native, triton, waiting
from grokkernels.cli import main
from grokkernels.testing import judge, verify
from grokkernels.testing.cases import tables


def run(*arguments: str):
    return CliRunner().invoke(main, arguments)


def test_doctor_json() -> None:
    done = run("doctor", "--json")
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["level"] in facts["cpu"]["levels"]
    assert facts["cpu"]["threads_wait"] == waiting.policy()
    assert facts["backends"]["cpu"] == {"usable": True, "reason": None}
    for name, state in facts["backends"].items():
        assert state["usable"] == (state["reason"] is None), name


def test_doctor_tables() -> None:
    done = run("doctor")
    assert done.exit_code == 0
    assert "torch" in done.stdout
    assert "not usable" in done.stdout


def test_doctor_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "load_error", "the native library did not load: no such file")
    done = run("doctor")
    assert done.exit_code == 1
    assert "no such file" in done.stdout


def test_verify_one_op() -> None:
    done = run("verify", "--op", "rms_norm", "--quick")
    assert done.exit_code == 0, done.stdout
    assert "27 of" in done.stdout  # nine in each dtype
    assert "0 failed" in done.stdout


@pytest.mark.parametrize("backend", dispatch.BACKENDS)
def test_quick_is_every_op_and_little_work(backend: str) -> None:
    """Counted, not timed: a few small cases of every table."""
    for name, table in tables().items():
        cases = verify.quick_cases(table, backend)
        assert 1 <= len(cases) <= verify.QUICK[backend], name
        for case in cases:
            tensors = [value for value in case.arguments().values() if isinstance(value, torch.Tensor)]
            assert judge.FEW <= sum(tensor.numel() for tensor in tensors) <= 300_000, f"{name} {case.name}"


def test_verify_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off by a thousandth fails its whole table, and verify says so with its exit code."""
    table = tables()["rms_norm"]

    def wrong(**arguments):
        result = table.op(**arguments)
        return result * 1.001 if isinstance(result, torch.Tensor) else tuple(r * 1.001 for r in result)

    wrong.__name__ = "rms_norm"
    broken = type(table)(wrong, table.reference, table.grad, table.cases, (torch.float32,))
    monkeypatch.setattr(verify, "tables", lambda: {"rms_norm": broken})
    done = run("verify", "--quick")
    assert done.exit_code == 1
    assert "times over what is allowed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--op", "rms"), "--op names no op: 'rms'; allowed are"),
        (("--backend", "gpu"), "--backend names no backend: 'gpu'; allowed are"),
        (("--backend", "cuda"), "--backend cuda cannot run"),
        (
            ("--backend", "triton", "--old"),
            "--backend triton cannot run: triton 3.5.1 is installed; grokkernels needs 3.6",
        ),
    ],
)
def test_verify_mistakes(arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--old" in arguments:
        monkeypatch.setattr(triton, "load_error", lambda: "triton 3.5.1 is installed; grokkernels needs 3.6 or newer")
    done = run("verify", *(word for word in arguments if word != "--old"))
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1
    assert "Traceback" not in done.output
