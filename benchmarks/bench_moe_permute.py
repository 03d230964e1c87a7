"""moe_permute and moe_unpermute against indexing: pytest benchmarks/bench_moe_permute.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import moe_permute as cases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [(4096, 512, 8, 2), (512, 2048, 64, 8)], ids=str)
@pytest.mark.parametrize("how", ["cpu", "eager"])
def test_there_and_back(benchmark, dtype, shape, how):
    verdict = judge.judge(cases.TABLE, cases.case(16, 64, 8, 2), dtype, "cpu")
    assert verdict.passed, verdict
    tokens, cols, experts, top_k = shape
    arguments = judge.in_dtype(cases.case(*shape).arguments(), dtype)
    x, indices, weights = arguments["x"], arguments["indices"], torch.rand(tokens, top_k)

    def native():
        rows, slots, _ = grokkernels.moe_permute(x, indices, experts, backend="cpu")
        return grokkernels.moe_unpermute(rows, weights, slots, backend="cpu")

    def eager():
        order = indices.flatten().argsort(stable=True)
        rows = x[order // top_k]
        back = torch.empty_like(rows).index_copy(0, order, rows).view(tokens, top_k, cols)
        return (back * weights.unsqueeze(-1)).sum(1).to(dtype)

    benchmark(native if how == "cpu" else eager)
