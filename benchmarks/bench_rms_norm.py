"""rms_norm and its fused addition, beside torch and vLLM: pytest benchmarks/bench_rms_norm.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness import vllm
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import Absent, compiled, find_vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import rms_norm as cases

SHAPES = {"training": (8192, 4096), "Grok-1": (2048, 6144), "short": (64, 4096), "decode": (1, 6144)}
EPS = 1e-5


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def contenders(direction: str) -> dict[str, Callable | Absent]:
    return {
        OURS: lambda x, weight: grokkernels.rms_norm(x, weight, EPS),
        "torch": plain,
        "torch fused": fused,
        "torch.compile": compiled(plain),
        "vLLM": (find_vllm() or (lambda x, weight: vllm.rms_norm(x, weight, EPS)))
        if direction == FORWARD
        else Absent("vLLM has no backward"),
    }


def work(rows: int, cols: int, dtype: torch.dtype, direction: str, **more: Any) -> Work:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    size = rows * cols * dtype.itemsize
    read, written = (size, size) if direction == FORWARD else (3 * size, 2 * size)
    return Work("rms_norm", f"{rows} x {cols}", word(dtype), direction, read=read, written=written, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    rows, cols = SHAPES[shape]
    tensors = torch.randn(rows, cols).to(dtype), torch.rand(cols).to(dtype)
    judged = right(cases.TABLE, cases.case(min(rows, 64), cols), dtype)
    compare(work(rows, cols, dtype, direction), calls(contenders(direction), tensors, direction), judged)


def test_fresh_memory(compare: Any) -> None:
    """Where every output comes from the operating system anew, as glibc does by default."""
    tensors = torch.randn(8192, 4096), torch.rand(4096)
    judged = right(cases.TABLE, cases.case(64, 4096), torch.float32)
    described = work(8192, 4096, torch.float32, FORWARD, fresh_memory=True)
    compare(described, calls(contenders(FORWARD), tensors, FORWARD), judged)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
def test_add_rms_norm(compare: Any, dtype: torch.dtype) -> None:
    rows, cols = SHAPES["training"]
    x, other, weight = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype), torch.rand(cols).to(dtype)
    mine = [x.clone(), other.clone()]

    def separate(norm: Callable) -> Callable:
        def call(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            h = x + other
            return norm(h, weight), h

        return call

    def in_place() -> list[torch.Tensor]:
        """vLLM's overwrites both: it starts from the same numbers once, for the comparison."""
        torch.ops._C.fused_add_rms_norm(*mine, weight, EPS)
        return mine

    functions = {
        OURS: lambda x, other, weight: grokkernels.rms_norm(x, weight, EPS, residual=other),
        "torch": separate(fused),
        "torch.compile": compiled(separate(plain)),
    }
    size = rows * cols * dtype.itemsize
    compare(
        Work("rms_norm", f"add, {rows} x {cols}", word(dtype), read=2 * size, written=2 * size),
        {**calls(functions, (x, other, weight), FORWARD), "vLLM, in place": find_vllm() or in_place},
        right(cases.TABLE, cases.case(64, cols, residual=True), dtype),
    )


@pytest.mark.parametrize("rows", [1, 16, 256, 4096, 32768])
def test_rows(compare: Any, rows: int) -> None:
    tensors = torch.randn(rows, 4096).bfloat16(), torch.rand(4096).bfloat16()
    functions = contenders(FORWARD)
    del functions["torch.compile"]
    judged = right(cases.TABLE, cases.case(min(rows, 64), 4096), torch.bfloat16)
    described = work(rows, 4096, torch.bfloat16, FORWARD, curve=("rows of 4096", rows))
    compare(described, calls(functions, tensors, FORWARD), judged)
