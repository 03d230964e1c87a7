"""moe_experts beside torch and vLLM: pytest benchmarks/bench_moe_experts.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness import vllm
from benchmarks.harness.judging import drawn, right
from benchmarks.harness.passes import BOTH, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import Absent, find_vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.reference.moe_gate import Routing
from grokkernels.testing.cases import moe_experts as cases

# Tokens, width, width of an expert, experts, experts per token: Qwen3's small experts, and Grok-1's eight large ones at
# a sixth of its width and a sixteenth of theirs.
SHAPES = {
    "E64 top-8, T 512": (512, 2048, 768, 64, 8),
    "E64 top-8, T 16": (16, 2048, 768, 64, 8),
    "E64 top-8, T 1": (1, 2048, 768, 64, 8),
    "E8 top-2, T 512": (512, 1024, 2048, 8, 2),
    "E8 top-2, T 1": (1, 1024, 2048, 8, 2),
}
Experts = Callable[..., torch.Tensor]


def loop(indices: torch.Tensor) -> Experts:
    def call(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor):
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for e in range(gate.shape[0]):
            token, k = torch.where(indices == e)
            if token.numel():
                hidden = F.silu(x[token] @ gate[e].mT) * (x[token] @ up[e].mT)
                y = y.index_add(0, token, (hidden @ down[e].mT).float() * weights[token, k].unsqueeze(1))
        return y.to(x.dtype)

    return call


def grouped(indices: torch.Tensor) -> Experts:
    def call(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor):
        expert = indices.flatten().long()
        order = expert.argsort(stable=True)
        offs = torch.bincount(expert, minlength=gate.shape[0]).cumsum(0).int()
        rows = x[order // indices.shape[1]]
        hidden = F.silu(F.grouped_mm(rows, gate.mT, offs=offs)) * F.grouped_mm(rows, up.mT, offs=offs)
        out = F.grouped_mm(hidden, down.mT, offs=offs)
        y = torch.empty_like(out).index_copy(0, order, out).view(*indices.shape, -1)
        return (y * weights.unsqueeze(-1)).sum(1).to(x.dtype)

    return call


def ours(indices: torch.Tensor, experts: int) -> Experts:
    def call(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor):
        counts, nothing = indices.new_zeros(experts), weights.new_zeros(())
        routing = Routing(weights, indices, counts, nothing, nothing)
        return grokkernels.moe_experts(x, gate, up, down, routing, activation="silu")

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", [FORWARD, BOTH])
@pytest.mark.parametrize("shape", SHAPES)
def test_moe_experts(compare: Any, shape: str, direction: str, dtype: torch.dtype) -> None:
    tokens, cols, hidden, experts, top_k = SHAPES[shape]
    if direction == BOTH and tokens < 512:
        pytest.skip("so few tokens are not trained on")
    arguments = drawn(cases.case(tokens, cols, hidden, experts, top_k), dtype)
    indices = arguments.pop("indices")
    tensors = tuple(arguments.values())
    functions = {OURS: ours(indices, experts), "torch": loop(indices), "torch fused": grouped(indices)}
    contenders = calls(functions, tensors, direction)
    if direction == BOTH:
        contenders["vLLM"] = Absent("vLLM has no backward")
    elif dtype != torch.bfloat16:
        contenders["vLLM"] = Absent("vLLM's experts are for bfloat16")
    else:
        contenders["vLLM"] = find_vllm() or vllm.experts(*tensors, indices)
    used = min(experts, indices.unique().numel())
    passes = 1 if direction == FORWARD else 3
    compare(
        Work(
            *("moe_experts", f"{shape}, {cols} x {hidden}", word(dtype), direction),
            read=3 * used * cols * hidden * dtype.itemsize * passes,
            flops=6 * tokens * top_k * cols * hidden * passes,
        ),
        contenders,
        right(cases.TABLE, cases.case(16, 64, 96, experts, top_k, activation="silu"), dtype),
    )
