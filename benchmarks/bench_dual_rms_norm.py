"""dual_rms_norm beside F.rms_norm, an addition and F.rms_norm.

pytest benchmarks/bench_dual_rms_norm.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import dual_rms_norm as cases

SHAPES = {"training": (4096, 4096), "grok-1": (2048, 6144), "decode": (1, 6144)}


def eager(x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, pre: torch.Tensor) -> tuple[torch.Tensor, ...]:
    h = residual + F.rms_norm(x, post.shape, post, 1e-5)
    return F.rms_norm(h, pre.shape, pre, 1e-5), h


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_dual_rms_norm(benchmark: Any, shape: str, dtype: torch.dtype, direction: str, backend: str) -> None:
    rows, cols = SHAPES[shape]
    if backend == "cpu":
        verdict = judge.judge(cases.TABLE, cases.case(min(rows, 64), cols), dtype, backend)
        assert verdict.passed, verdict
    x, residual, dy, dh = torch.randn(4, rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = torch.ones(2, cols, dtype=dtype).unbind()
    function = eager if backend == "eager" else lambda *a: grokkernels.dual_rms_norm(*a, backend=backend)
    if direction == "forward":
        benchmark(function, x, residual, *weights)
        return
    leaves = [t.clone().requires_grad_() for t in (x, residual, *weights)]
    benchmark(lambda: torch.autograd.grad(function(*leaves), leaves, (dy, dh)))
