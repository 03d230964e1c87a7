"""grouped_mm against torch's: pytest benchmarks/bench_grouped_mm.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import grouped_mm as cases


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", [((128,) * 8, 512, 1024), ((1, 1), 512, 1024), ((2,) * 64, 2048, 768)], ids=str)
@pytest.mark.parametrize("how", ["cpu", "torch"])
def test_grouped_mm(benchmark, dtype, shape, how):
    verdict = judge.judge(cases.TABLE, cases.case((9, 7), 64, 96, mt=True), dtype, "cpu")
    assert verdict.passed, verdict
    x, w, offsets = judge.in_dtype(cases.case(*shape, mt=True).arguments(), dtype).values()
    if how == "cpu":
        benchmark(lambda: grokkernels.grouped_mm(x, w, offsets, backend="cpu"))
    else:
        benchmark(lambda: F.grouped_mm(x, w, offs=offsets))
