"""Threads come from torch's own setting; nested and forked use is safe."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import grokkernels
from grokkernels import native, waiting
from grokkernels.testing import cases, judge
from grokkernels.testing.case import Case
from grokkernels.testing.cases import (
    adamw,
    cross_entropy,
    dual_rms_norm,
    flash_attention,
    flash_attention_varlen,
    gated_activation,
    grouped_mm,
    linear_cross_entropy,
    merge_attention_states,
    moe_experts,
    moe_gate,
    moe_permute,
    moe_unpermute,
    rms_norm,
    rotary,
)

# Large enough that the kernels ask for every thread.
X, W = torch.randn(512, 4096), torch.ones(4096)


def test_the_setting_of_torch_counts() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert native.module.num_threads() == threads
        assert native.module.threads_used() == threads


# Of each op a case or two so large that its work is shared out, among others where threads add to one result.
SHARED = {
    "adamw": [adamw.case((300, 700), (90001,), (5,), max_norm=1.0)],
    "cross_entropy": [cross_entropy.case(70, 20000), cross_entropy.case(3000, 96, ignored=0.2)],
    "dual_rms_norm": [dual_rms_norm.case(301, 640)],
    "flash_attention": [
        flash_attention.case(1, 300, 300, 4, 2, 32, causal=True, sinks=True),
        flash_attention.case(2, 2, 1500, 4, 2, 64, sinks=True),
    ],
    "flash_attention_varlen": [flash_attention_varlen.case((200, 1, 90), (200, 900, 90), 4, 2, 32, causal=True)],
    "gated_activation": [gated_activation.case(300, 700)],
    "grouped_mm": [grouped_mm.case((300, 3, 40, 0), 200, 300), grouped_mm.case((300, 3, 40), 200, 300, mt=True)],
    "linear_cross_entropy": [linear_cross_entropy.case(300, 64, 5000, ignored=0.2)],
    "merge_attention_states": [merge_attention_states.case(1, 300, 4, 64)],
    "moe_experts": [moe_experts.case(200, 64, 300, 8, 2), moe_experts.case(1, 700, 300, 8, 2)],
    "moe_gate": [moe_gate.case(3001, 64, top_k=6), moe_gate.case(3001, 64, top_k=6, scoring="sigmoid", bias=0.1)],
    "moe_permute": [moe_permute.case(500, 300, 8, 2)],
    "moe_unpermute": [moe_unpermute.case(500, 300, 8, 2)],
    "rms_norm": [rms_norm.case(301, 640), rms_norm.case(45, 3000, residual=True)],
    "rotary": [rotary.case(1, 300, 8, 64, max_position=300)],
}


def test_every_op_has_a_case_whose_work_is_shared() -> None:
    assert SHARED.keys() == cases.tables().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "case"), [(op, case) for op, some in SHARED.items() for case in some])
def test_results_do_not_depend_on_threads(op: str, case: Case, dtype: torch.dtype) -> None:
    """Any number of threads gives the same bits, forward and backward: every sum has one order."""
    table = cases.tables()[op]
    arguments = judge.in_dtype(case.arguments(), dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs, gradients, _ = judge.run(lambda **kw: table.op(**kw, backend="cpu"), arguments, table.grad, None)
        results.append([*outputs, *gradients])
    for result in results[1:]:
        for one, other in zip(results[0], result, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=0, equal_nan=True)


def test_several_python_threads_at_once() -> None:
    expected = grokkernels.rms_norm(X, W, backend="cpu")
    results: list[torch.Tensor] = []

    def work() -> None:
        results.extend(grokkernels.rms_norm(X, W, backend="cpu") for _ in range(5))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert len(results) == 20
    assert all(torch.equal(result, expected) for result in results)


def test_a_forked_child_runs_without_its_parents_threads() -> None:
    """The pool's threads do not survive fork(): a child that waited for them would hang."""
    program = """
import os, sys, torch, grokkernels
from grokkernels import native
torch.set_num_threads(2)
x, w = torch.randn(512, 4096), torch.ones(4096)
y = grokkernels.rms_norm(x, w, backend="cpu")
child = os.fork()
if child == 0:
    # (PyTorch's own operators on large tensors would hang here: rows are compared one at a time.)
    z = grokkernels.rms_norm(x, w, backend="cpu")
    same = all(torch.equal(z[row], y[row]) for row in range(512))
    os._exit(0 if same and native.module.num_threads() == 1 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, check=False, env=dict(os.environ))
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["python", "/usr/bin/grokkernels", "train"], True),
        (["python", "-I", "bin/grokkernels"], True),
        (["python", "-m", "grokkernels", "doctor"], True),
        (["python", "-P", "-m", "grokkernels"], True),
        (["python", "-m", "pytest", "grokkernels"], False),
        (["python", "-m"], False),
        (["python", "-c", "import grokkernels"], False),
        (["python", "train.py", "grokkernels"], False),
        (["python"], False),
    ],
)
def test_the_command_is_known_by_its_arguments(arguments: list[str], expected: bool) -> None:
    assert waiting.is_command(arguments) is expected


@pytest.mark.parametrize(
    ("own", "as_command", "found"),
    [
        ({}, True, "GOMP_SPINCOUNT=1000, set by the grokkernels command"),
        ({"OMP_WAIT_POLICY": "active"}, True, "OMP_WAIT_POLICY=active, set by the user"),
        ({"GOMP_SPINCOUNT": "7"}, True, "GOMP_SPINCOUNT=7, set by the user"),
        ({}, False, "OpenMP's own: threads spin for milliseconds; on a machine that is shared, set GOMP_SPINCOUNT"),
    ],
)
def test_how_threads_wait(own: dict[str, str], as_command: bool, found: str, tmp_path: Path) -> None:
    """What libgomp reads when torch loads it: set in the command's process alone, after the user's own settings.

    A torch that notes the environment it is imported in, and ends there, stands in for the real one.
    """
    (tmp_path / "torch.py").write_text("from grokkernels import waiting\nprint(waiting.policy())\nraise SystemExit\n")
    environment = {name: value for name, value in os.environ.items() if name not in waiting.SETTINGS}
    root = str(Path(grokkernels.__file__).parent.parent)
    environment |= {"PYTHONPATH": os.pathsep.join((str(tmp_path), root)), **own}
    program = ["-m", "grokkernels", "doctor"] if as_command else ["-c", "import grokkernels"]
    done = subprocess.run(
        [sys.executable, *program], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path
    )
    assert done.stdout.startswith(found)
