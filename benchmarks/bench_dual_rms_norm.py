"""dual_rms_norm, the seam of a sandwich-normed block: pytest benchmarks/bench_dual_rms_norm.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from benchmarks.bench_rms_norm import fused, plain
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import compiled
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import dual_rms_norm as cases

SHAPES = {"Grok-1": (2048, 6144), "decode": (1, 6144)}


def seam(norm: Any) -> Any:
    def call(x: torch.Tensor, residual: torch.Tensor, post: torch.Tensor, pre: torch.Tensor) -> tuple:
        h = residual + norm(x, post)
        return norm(h, pre), h

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dual_rms_norm(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    rows, cols = SHAPES[shape]
    tensors = (*torch.randn(2, rows, cols).to(dtype), *torch.rand(2, cols).to(dtype))
    functions = {
        OURS: grokkernels.dual_rms_norm,
        "torch": seam(plain),
        "torch fused": seam(fused),
        "torch.compile": compiled(seam(plain)),
    }
    size = rows * cols * dtype.itemsize
    # Forward x and residual in, y and h out; backward x, h, dy and dh in, dx and dresidual out.
    read, written = (2 * size, 2 * size) if direction == FORWARD else (6 * size, 4 * size)
    compare(
        Work("dual_rms_norm", f"{rows} x {cols}", word(dtype), direction, read=read, written=written),
        calls(functions, tensors, direction),
        right(cases.TABLE, cases.case(min(rows, 64), cols), dtype),
    )
