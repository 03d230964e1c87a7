"""grouped_mm beside torch's: pytest benchmarks/bench_grouped_mm.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness.judging import drawn, right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import grouped_mm as cases

# Rows of each group, depth, columns: large groups (of Grok-1's width, its experts' cut to a sixteenth), small ones, one
# token for each of two experts.
SHAPES = {
    "8 groups of 128": ((128,) * 8, 6144, 2048),
    "64 groups of 8": ((8,) * 64, 2048, 768),
    "decode": ((1, 1), 6144, 2048),
}


def loop(x: torch.Tensor, w: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    return torch.cat([rows @ w[group] for group, rows in enumerate(x.split(sizes))])


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_grouped_mm(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    groups, depth, cols = SHAPES[shape]
    if shape == "decode" and direction != FORWARD:
        pytest.skip("one token is not trained on")
    x, w, offsets = drawn(cases.case(groups, depth, cols, mt=True), dtype).values()
    functions = {
        OURS: lambda x, w: grokkernels.grouped_mm(x, w, offsets),
        "torch": lambda x, w: loop(x, w, list(groups)),
        "torch fused": lambda x, w: F.grouped_mm(x, w, offs=offsets),
    }
    passes = 1 if direction == FORWARD else 3
    read = (x.numel() + w.numel()) * dtype.itemsize * passes
    flops = 2 * x.shape[0] * depth * cols * passes
    compare(
        Work("grouped_mm", f"{shape}, {depth} to {cols}", word(dtype), direction, read=read, flops=flops),
        calls(functions, (x, w), direction),
        right(cases.TABLE, cases.case((9, 7), 64, 96, mt=True), dtype),
    )
