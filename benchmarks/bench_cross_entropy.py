"""cross_entropy against plain PyTorch: pytest benchmarks/bench_cross_entropy.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import cross_entropy as cases

SHAPES = ((256, 131072), (4096, 4096))  # Grok's vocabulary; a small one with many rows


def eager(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    z = logits.float()
    return F.cross_entropy(softcap * torch.tanh(z / softcap) if softcap else z, targets)


def ours(logits: torch.Tensor, targets: torch.Tensor, softcap: float) -> torch.Tensor:
    return grokkernels.cross_entropy(logits, targets, softcap=softcap, backend="cpu")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("function", [ours, eager], ids=["cpu", "eager"])
def test_cross_entropy(benchmark, function, shape, dtype, softcap, backward) -> None:
    verdict = judge.judge(cases.TABLE, cases.case(8, shape[1], softcap=softcap, reduction="none"), dtype, "cpu")
    assert verdict.passed, verdict
    benchmark.group = f"cross_entropy {shape} {dtype} softcap={softcap} {'f+b' if backward else 'f'}"
    logits = torch.randn(shape).to(dtype).requires_grad_(backward)
    targets = torch.randint(0, shape[1], shape[:1])

    def run() -> None:
        loss = function(logits, targets, softcap)
        if backward:
            torch.autograd.grad(loss, logits)

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
