"""merge_attention_states beside the plain PyTorch formula.

pytest benchmarks/bench_merge_attention_states.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import merge_attention_states as cases

SHAPES = {"training": (1, 4096, 32, 128), "grok-1": (1, 1024, 48, 128), "decode": (8, 1, 48, 128)}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_attention_states(benchmark: Any, shape: str, dtype: torch.dtype, direction: str, backend: str) -> None:
    batch, tokens, heads, dim = SHAPES[shape]
    if backend == "cpu":
        case = cases.case(batch, min(tokens, 64), heads, dim, dead=True)
        verdict = judge.judge(cases.TABLE, case, dtype, backend)
        assert verdict.passed, verdict
    generator = torch.Generator().manual_seed(0)
    o1, o2, dout = torch.randn(3, batch, tokens, heads, dim, generator=generator).to(dtype)
    lse1, lse2, dlse = torch.randn(3, batch, heads, tokens, generator=generator)
    states = o1, lse1, o2, lse2
    if direction == "forward":
        benchmark(grokkernels.merge_attention_states, *states, backend=backend)
        return
    leaves = [t.requires_grad_() for t in states]
    benchmark(
        lambda: torch.autograd.grad(grokkernels.merge_attention_states(*leaves, backend=backend), leaves, (dout, dlse))
    )
