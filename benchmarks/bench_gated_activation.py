"""gated_activation beside torch and vLLM: pytest benchmarks/bench_gated_activation.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness import vllm
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import compiled, find_vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import gated_activation as cases

# The last is one expert's share of 1024 tokens in Grok-1.
SHAPES = {"training": ("silu", 4096, 8192), "Grok-1": ("gelu_tanh", 256, 32768), "decode": ("gelu_tanh", 1, 32768)}
PLAIN = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_activation(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    kind, rows, cols = SHAPES[shape]
    gate, up = torch.randn(2, rows, cols).to(dtype)
    functions = {
        OURS: lambda gate, up: grokkernels.gated_activation(gate, up, kind),
        "torch": PLAIN[kind],
        "torch.compile": compiled(PLAIN[kind]),
    }
    contenders = calls(functions, (gate, up), direction)
    if direction == FORWARD:
        both = torch.cat([gate, up], -1)
        contenders["vLLM"] = find_vllm() or (lambda: vllm.gated(both, kind))
    size = rows * cols * dtype.itemsize
    read, written = (2 * size, size) if direction == FORWARD else (5 * size, 3 * size)
    compare(
        Work("gated_activation", f"{kind}, {rows} x {cols}", word(dtype), direction, read=read, written=written),
        contenders,
        right(cases.TABLE, cases.case(min(rows, 8), cols, kind=kind), dtype),
    )
