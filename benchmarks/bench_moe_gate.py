"""moe_gate beside plain PyTorch: pytest benchmarks/bench_moe_gate.py --benchmark-only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import moe_gate as cases

SHAPES = {
    "grok-1": (4096, 8, 2, {}),
    "qwen3": (4096, 128, 8, {"renormalize": True}),
    "qwen3-decode": (32, 128, 8, {"renormalize": True}),
    "deepseek-v3": (
        *(4096, 256, 8),
        {"scoring": "sigmoid", "num_groups": 8, "topk_groups": 4, "renormalize": True, "routed_scale": 2.5},
    ),
}


def softmax_topk(logits: torch.Tensor, top_k: int, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The bare choice, without groups, counts and losses: what PyTorch has kernels for."""
    weights, indices = logits.softmax(dim=-1).topk(top_k)
    return weights, indices


@pytest.mark.parametrize("backend", ["cpu", "reference", "softmax + topk"])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(benchmark: Any, shape: str, backend: str) -> None:
    tokens, experts, top_k, options = SHAPES[shape]
    if backend == "softmax + topk":
        logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
        benchmark(softmax_topk, logits, top_k)
        return
    case = cases.case(64, experts, top_k=top_k, **options)
    verdict = judge.judge(cases.TABLE, case, torch.float32, backend)
    assert verdict.passed, verdict
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0))
    benchmark(grokkernels.moe_gate, logits, top_k, backend=backend, **options)
