"""rotary beside the plain PyTorch formula.

pytest benchmarks/bench_rotary.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import rotary as cases

SHAPES = {"training": (1, 4096, 32, 8, 128), "grok-1": (1, 1024, 48, 8, 128), "decode": (1, 1, 48, 8, 128)}


@pytest.mark.parametrize("backend", ["cpu", "cpu, in place", "reference"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(benchmark: Any, shape: str, dtype: torch.dtype, interleaved: bool, backend: str) -> None:
    batch, tokens, heads, kv_heads, dim = SHAPES[shape]
    name, _, inplace = backend.partition(", ")
    if name == "cpu":
        case = cases.case(batch, min(tokens, 64), heads, dim, kv_heads=kv_heads, interleaved=interleaved)
        verdict = judge.judge(cases.TABLE, case, dtype, name)
        assert verdict.passed, verdict
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, tokens, n, dim, generator=generator).to(dtype) for n in (heads, kv_heads))
    tables = grokkernels.rotary_tables(dim, tokens)
    benchmark(grokkernels.rotary, q, k, *tables, interleaved=interleaved, inplace=bool(inplace), backend=name)
