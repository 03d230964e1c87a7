"""rms_norm beside F.rms_norm.

pytest benchmarks/bench_rms_norm.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import rms_norm as cases

SHAPES = {"training": (8192, 4096), "grok-1": (2048, 6144), "decode": (1, 6144)}


def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(benchmark: Any, shape: str, dtype: torch.dtype, direction: str, backend: str) -> None:
    rows, cols = SHAPES[shape]
    if backend == "cpu":
        verdict = judge.judge(cases.TABLE, cases.case(min(rows, 64), cols), dtype, backend)
        assert verdict.passed, verdict
    x, dy = torch.randn(2, rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.ones(cols, dtype=dtype)
    function = eager if backend == "eager" else lambda x, w: grokkernels.rms_norm(x, w, backend=backend)
    if direction == "forward":
        benchmark(function, x, weight)
        return
    leaves = x.requires_grad_(), weight.requires_grad_()
    benchmark(lambda: torch.autograd.grad(function(*leaves), leaves, dy))
