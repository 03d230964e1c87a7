"""rotary beside torch and vLLM: pytest benchmarks/bench_rotary.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from benchmarks.harness import vllm
from benchmarks.harness.judging import right
from benchmarks.harness.passes import BOTH, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import compiled, find_vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import rotary as cases

SHAPES = {"training": (4096, 32, 8, 128), "Grok-1": (1024, 48, 8, 128), "decode": (1, 48, 8, 128)}


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (1, T, H, D) with tables (T, D / 2): half-split pairs."""
    first, second = x.float().chunk(2, -1)
    c, s = cos[None, :, None], sin[None, :, None]
    return torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)


def work(shape: tuple[int, ...], dtype: torch.dtype, direction: str, how: str = "") -> Work:
    tokens, heads, kv_heads, dim = shape
    size = tokens * (heads + kv_heads) * dim * dtype.itemsize * (1 if direction == FORWARD else 2)
    words = f"T {tokens}, heads {heads}/{kv_heads} of {dim}{how}"
    return Work("rotary", words, word(dtype), direction, read=size, written=size)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, dim = SHAPES[shape]
    q, k = (torch.randn(1, tokens, n, dim).to(dtype) for n in (heads, kv_heads))
    cos, sin = grokkernels.rotary_tables(dim, tokens)

    def plain(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return turn(q, cos, sin), turn(k, cos, sin)

    functions = {
        OURS: lambda q, k: grokkernels.rotary(q, k, cos, sin),
        "torch": plain,
        "torch.compile": compiled(plain),
    }
    judged = right(cases.TABLE, cases.case(1, min(tokens, 64), heads, dim, kv_heads=kv_heads), dtype)
    compare(work(SHAPES[shape], dtype, direction), calls(functions, (q, k), direction), judged)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", SHAPES)
def test_in_place(compare: Any, shape: str, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, dim = SHAPES[shape]
    q, k = (torch.randn(1, tokens, n, dim).to(dtype) for n in (heads, kv_heads))
    cos, sin = grokkernels.rotary_tables(dim, tokens)
    mine = q.clone(), k.clone()

    def ours() -> None:
        grokkernels.rotary(*mine, cos, sin, inplace=True)

    contenders = {OURS: ours, "vLLM": find_vllm() or vllm.rotary(q, k, cos, sin)}
    judged = right(cases.TABLE, cases.case(1, min(tokens, 64), heads, dim, kv_heads=kv_heads), dtype)
    compare(work(SHAPES[shape], dtype, FORWARD, ", in place"), contenders, judged)
