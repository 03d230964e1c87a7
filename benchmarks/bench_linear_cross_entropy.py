"""linear_cross_entropy beside torch, with the memory that each needs at its peak.

pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import Absent, compiled
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import linear_cross_entropy as cases

# Tokens, width, vocabulary.
SHAPES = ((256, 1024, 131072), (256, 1024, 16384))


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((x @ weight.mT).float(), targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_cross_entropy(compare: Any, shape: tuple[int, ...], direction: str, dtype: torch.dtype) -> None:
    rows, width, vocabulary = shape
    x, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocabulary, width) * width**-0.5).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,))
    fused = getattr(F, "linear_cross_entropy", None)
    functions = {
        OURS: lambda x, weight: grokkernels.linear_cross_entropy(x, weight, targets).float(),
        "torch": lambda x, weight: plain(x, weight, targets),
        "torch.compile": compiled(lambda x, weight: plain(x, weight, targets)),
        "torch fused": Absent("this torch has no linear_cross_entropy")
        if fused is None
        else lambda x, weight: fused(x, weight, targets).float(),
    }
    flops = 2 * rows * width * vocabulary * (1 if direction == FORWARD else 4)  # the backward forms the logits again
    compare(
        Work("linear_cross_entropy", f"{rows} x {width}, V {vocabulary}", word(dtype), direction, flops=flops),
        calls(functions, (x, weight), direction),
        right(cases.TABLE, cases.case(16, width, 300, reduction="none"), dtype),
    )
