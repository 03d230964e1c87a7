"""gated_activation beside PyTorch's activation and product.

pytest benchmarks/bench_gated_activation.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import gated_activation as cases

SHAPES = {"training": (4096, 8192), "grok-1": (256, 32768), "decode": (1, 32768)}
EAGER = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("kind", EAGER)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation(
    benchmark: Any, shape: str, kind: str, dtype: torch.dtype, direction: str, backend: str
) -> None:
    rows, cols = SHAPES[shape]
    if backend == "cpu":
        verdict = judge.judge(cases.TABLE, cases.case(min(rows, 8), cols, kind=kind), dtype, backend)
        assert verdict.passed, verdict
    gate, up, dy = torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(0)).to(dtype)
    function = EAGER[kind] if backend == "eager" else lambda *a: grokkernels.gated_activation(*a, kind, backend=backend)
    if direction == "forward":
        benchmark(function, gate, up)
        return
    leaves = gate.requires_grad_(), up.requires_grad_()
    benchmark(lambda: torch.autograd.grad(function(*leaves), leaves, dy))
