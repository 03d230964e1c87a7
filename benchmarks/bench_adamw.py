"""optim.AdamW against torch.optim.AdamW: pytest benchmarks/bench_adamw.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch

from grokkernels.optim import AdamW
from grokkernels.testing import judge
from grokkernels.testing.cases import adamw as cases

OPTIMIZERS = {
    "cpu": lambda params: AdamW(params, backend="cpu"),
    "cpu_clipped": lambda params: AdamW(params, max_norm=1.0, backend="cpu"),
    "torch_fused": lambda params: torch.optim.AdamW(params, fused=True),
    "torch_foreach": lambda params: torch.optim.AdamW(params, foreach=True),
}
SHAPES = {
    "51M in one": [(51_000_000,)],
    "300 layers of 64 kB": [(128, 128)] * 300,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_adamw(benchmark, name, shapes, dtype) -> None:
    verdict = judge.judge(cases.TABLE, cases.case((300, 100), (77,), lr=0.1), dtype, "cpu")
    assert verdict.passed, verdict
    benchmark.group = f"adamw {shapes} {dtype}"
    params = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES[shapes]]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = OPTIMIZERS[name](params)
    benchmark.pedantic(optimizer.step, rounds=5, warmup_rounds=1)
