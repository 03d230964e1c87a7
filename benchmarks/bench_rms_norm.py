"""rms_norm and its fused addition, beside torch and vLLM: pytest benchmarks/bench_rms_norm.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, forward_or_both
from benchmarks.harness.peers import Absent, compiled, vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import rms_norm as cases

SHAPES = {"training": (8192, 4096), "Grok-1": (2048, 6144), "short": (64, 4096), "decode": (1, 6144)}
EPS = 1e-5


def plain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def fused(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return grokkernels.rms_norm(x, weight, EPS)


def of_vllm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, weight, EPS)
    return y


def contenders(x: torch.Tensor, weight: torch.Tensor, direction: str) -> dict[str, Any]:
    functions: dict[str, Callable | Absent] = {OURS: ours, "torch": plain, "torch fused": fused}
    functions["torch.compile"] = compiled(plain)
    functions["vLLM"] = vllm() or of_vllm
    if direction != "forward":
        functions["vLLM"] = Absent("vLLM has no backward")
    return {name: forward_or_both(function, (x, weight), direction) for name, function in functions.items()}


def work(rows: int, cols: int, dtype: torch.dtype, direction: str, **more: Any) -> Work:
    """Forward reads x and writes y; backward reads x and dy and writes dx."""
    size = rows * cols * dtype.itemsize
    read, written = (size, size) if direction == "forward" else (3 * size, 2 * size)
    name = str(dtype).removeprefix("torch.")
    return Work("rms_norm", f"{rows} x {cols}", name, direction, read=read, written=written, **more)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    rows, cols = SHAPES[shape]
    x, weight = torch.randn(rows, cols).to(dtype), torch.rand(cols).to(dtype)
    compare(
        work(rows, cols, dtype, direction),
        contenders(x, weight, direction),
        right(cases.TABLE, cases.case(min(rows, 64), cols), dtype),
    )


def test_fresh_memory(compare: Any) -> None:
    """Where every output comes from the operating system anew, as glibc does by default."""
    x, weight = torch.randn(8192, 4096), torch.rand(4096)
    compare(
        work(8192, 4096, x.dtype, "forward", fresh_memory=True),
        contenders(x, weight, "forward"),
        right(cases.TABLE, cases.case(64, 4096), x.dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add_rms_norm(compare: Any, dtype: torch.dtype) -> None:
    rows, cols = SHAPES["training"]
    x, other, weight = torch.randn(rows, cols).to(dtype), torch.randn(rows, cols).to(dtype), torch.rand(cols).to(dtype)

    def separate(norm: Callable) -> Callable[[], Any]:
        def call() -> tuple[torch.Tensor, torch.Tensor]:
            h = x + other
            return norm(h, weight), h

        return call

    def in_place() -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's works in place: on copies, which are not timed apart since a caller has no use for them."""
        torch.ops._C.fused_add_rms_norm(mine[0], mine[1], weight, EPS)
        return mine

    mine = (x.clone(), other.clone())
    size = rows * cols * dtype.itemsize
    compare(
        Work("rms_norm", f"add, {rows} x {cols}", str(dtype).removeprefix("torch."), read=2 * size, written=2 * size),
        {
            OURS: lambda: grokkernels.rms_norm(x, weight, EPS, residual=other),
            "torch": separate(fused),
            "torch.compile": compiled(separate(plain)),
            "vLLM": vllm() or in_place,
        },
        right(cases.TABLE, cases.case(64, cols, residual=True), dtype),
    )


@pytest.mark.parametrize("rows", [1, 16, 256, 4096, 32768])
def test_rows(compare: Any, rows: int) -> None:
    x, weight = torch.randn(rows, 4096).bfloat16(), torch.rand(4096).bfloat16()
    everyone = contenders(x, weight, "forward")
    del everyone["torch.compile"]
    compare(
        work(rows, 4096, x.dtype, "forward", curve=("rows of 4096", rows)),
        everyone,
        right(cases.TABLE, cases.case(min(rows, 64), 4096), x.dtype),
    )
