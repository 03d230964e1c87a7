"""moe_gate beside torch and onnxruntime: pytest benchmarks/bench_moe_gate.py --benchmark-only

The peers choose and weigh; ours also counts and has both losses.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import grokkernels
from benchmarks.harness import onnx
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, FORWARD, calls
from benchmarks.harness.peers import Absent, compiled, on_cpu
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import moe_gate as cases

# tokens, experts, experts per token
SHAPES = {"Qwen3": (4096, 128, 8), "Qwen3, decode": (32, 128, 8), "Grok-1": (4096, 8, 2), "Grok-1, decode": (1, 8, 2)}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moe_gate(compare: Any, shape: str, direction: str) -> None:
    tokens, experts, top_k = SHAPES[shape]
    logits = torch.randn(tokens, experts)

    def plain(logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(dim=-1).topk(top_k).values

    functions = {
        OURS: lambda logits: grokkernels.moe_gate(logits, top_k).weights,
        "torch": plain,
        "torch.compile": compiled(plain),
    }
    contenders = calls(functions, (logits,), direction)
    if direction == FORWARD:
        contenders["onnxruntime"] = on_cpu("onnxruntime") or onnx.softmax_top_k(logits, top_k)
    else:
        contenders["onnxruntime"] = Absent("onnxruntime has no backward")
    size = tokens * experts * 4
    read, written = (size, 0) if direction == FORWARD else (2 * size, size)
    described = Work(
        "moe_gate", f"top-{top_k} of {experts}, T {tokens}", "float32", direction, read=read, written=written
    )
    compare(described, contenders, right(cases.TABLE, cases.case(64, experts, top_k=top_k), torch.float32))


@pytest.mark.parametrize("experts", [8, 32, 128, 512])
def test_experts(compare: Any, experts: int) -> None:
    logits = torch.randn(4096, experts)
    functions = {
        OURS: lambda logits: grokkernels.moe_gate(logits, 2).weights,
        "torch": lambda logits: logits.softmax(dim=-1).topk(2).values,
    }
    described = Work(
        "moe_gate", f"top-2 of {experts}, T 4096", "float32", read=4096 * experts * 4, curve=("experts", experts)
    )
    judged = right(cases.TABLE, cases.case(64, experts, top_k=2), torch.float32)
    compare(described, calls(functions, (logits,), FORWARD), judged)
