"""merge_attention_states beside torch: pytest benchmarks/bench_merge_attention_states.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import compiled
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import merge_attention_states as cases


def plain(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    lse = torch.logaddexp(lse1, lse2)
    first, second = ((part - lse).exp().mT.unsqueeze(-1) for part in (lse1, lse2))
    return (o1 * first + o2 * second).to(o1.dtype), lse


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("tokens", [2048, 1])
def test_merge(compare: Any, tokens: int, direction: str, dtype: torch.dtype) -> None:
    o1, o2 = torch.randn(2, 1, tokens, 48, 128).to(dtype)
    lse1, lse2 = torch.randn(2, 1, 48, tokens)
    functions = {OURS: grokkernels.merge_attention_states, "torch": plain, "torch.compile": compiled(plain)}
    size = o1.numel() * dtype.itemsize
    read, written = (2 * size, size) if direction == FORWARD else (5 * size, 3 * size)
    compare(
        Work("merge_attention_states", f"T {tokens}, 48 heads of 128", word(dtype), direction, read, written),
        calls(functions, (o1, lse1, o2, lse2), direction),
        right(cases.TABLE, cases.case(1, 16, 4, 128), dtype),
    )
