"""Threads come from torch's own setting; nested and forked use is safe."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import torch

import grokkernels
from grokkernels import native

# Large enough that the kernels ask for every thread.
X, W = torch.randn(512, 4096), torch.ones(4096)


def test_the_setting_of_torch_counts() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert native.module.num_threads() == threads
        assert native.module.threads_used() == threads


def test_results_do_not_depend_on_threads() -> None:
    """A row is computed by one thread: any number of threads gives the same bits."""
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(grokkernels.rms_norm(X, W, backend="cpu"))
    assert torch.equal(*results)


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
