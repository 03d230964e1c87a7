"""moe_permute and moe_unpermute beside torch: pytest benchmarks/bench_moe_permute.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from benchmarks.harness.judging import DEVICE, right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import moe_permute as cases
from grokkernels.testing.cases import moe_unpermute as back

# Tokens, width, experts, experts per token.
SHAPES = {"Grok-1": (2048, 6144, 8, 2), "Qwen3": (2048, 2048, 128, 8)}


def routing(tokens: int, experts: int, top_k: int) -> torch.Tensor:
    with torch.device("cpu"):
        return cases.routing(torch.Generator().manual_seed(0), tokens, experts, top_k, "even").to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moe_permute(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    tokens, cols, experts, top_k = SHAPES[shape]
    x = torch.randn(tokens, cols).to(dtype)
    indices = routing(tokens, experts, top_k)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return x[indices.flatten().long().argsort(stable=True) // top_k]

    functions = {OURS: lambda x: grokkernels.moe_permute(x, indices, experts)[0], "torch": plain}
    size = tokens * cols * dtype.itemsize
    read, written = (size, top_k * size) if direction == FORWARD else ((1 + top_k) * size, (1 + top_k) * size)
    compare(
        Work("moe_permute", f"T {tokens}, {cols}, top-{top_k} of {experts}", word(dtype), direction, read, written),
        calls(functions, (x,), direction),
        right(cases.TABLE, cases.case(64, 256, experts, top_k), dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moe_unpermute(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    tokens, cols, experts, top_k = SHAPES[shape]
    y, weights = torch.randn(tokens * top_k, cols).to(dtype), torch.rand(tokens, top_k)
    indices = routing(tokens, experts, top_k)
    slots = grokkernels.moe_permute(torch.zeros(tokens, 1), indices, experts)[1]
    places = slots.view(-1).long()

    def plain(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (y[places].view(tokens, top_k, cols) * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    functions = {OURS: lambda y, weights: grokkernels.moe_unpermute(y, weights, slots), "torch": plain}
    size = tokens * cols * dtype.itemsize
    read, written = (top_k * size, size) if direction == FORWARD else ((2 * top_k + 1) * size, (1 + top_k) * size)
    compare(
        Work(
            "moe_permute", f"back, T {tokens}, {cols}, top-{top_k} of {experts}", word(dtype), direction, read, written
        ),
        calls(functions, (y, weights), direction),
        right(back.TABLE, back.case(64, 256, experts, top_k), dtype),
    )
