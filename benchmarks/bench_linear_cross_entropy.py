"""linear_cross_entropy against plain PyTorch: pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import linear_cross_entropy as cases

SHAPES = ((256, 1024, 131072), (512, 512, 16384))  # N, C, V: Grok's vocabulary on a narrow model; a smaller one


def eager(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ weight.T).float(), targets)


def ours(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return grokkernels.linear_cross_entropy(x, weight, targets, backend="cpu")


FUNCTIONS = {"cpu": ours, "eager": eager}
if hasattr(F, "linear_cross_entropy"):  # torch 2.13 and later
    FUNCTIONS["torch"] = lambda x, weight, targets: F.linear_cross_entropy(x, weight, targets)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_linear_cross_entropy(benchmark, name, shape, dtype, backward) -> None:
    rows, width, vocabulary = shape
    verdict = judge.judge(cases.TABLE, cases.case(24, 64, 2000, reduction="none"), dtype, "cpu")
    assert verdict.passed, verdict
    benchmark.group = f"linear_cross_entropy {shape} {dtype} {'f+b' if backward else 'f'}"
    x = torch.randn(rows, width).to(dtype).requires_grad_(backward)
    weight = (torch.randn(vocabulary, width) * width**-0.5).to(dtype).requires_grad_(backward)
    targets = torch.randint(0, vocabulary, (rows,))

    def run() -> None:
        loss = FUNCTIONS[name](x, weight, targets)
        if backward:
            torch.autograd.grad(loss, (x, weight))

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
