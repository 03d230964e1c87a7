"""moe_experts against a loop over experts and grouped_mm: pytest benchmarks/bench_moe_experts.py --benchmark-only"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.reference.moe_gate import Routing
from grokkernels.testing import judge
from grokkernels.testing.cases import moe_experts as cases

# tokens, C, F, E, K
SHAPES = ((512, 512, 1024, 8, 2), (1, 512, 1024, 8, 2), (1, 2048, 768, 64, 8), (16, 2048, 768, 64, 8))


def eager(x, gate_proj, up_proj, down_proj, routing):
    y = torch.zeros(x.shape, dtype=torch.float32)
    for e in range(gate_proj.shape[0]):
        token, k = torch.where(routing.indices == e)
        if token.numel():
            rows = x[token]
            hidden = F.gelu(rows @ gate_proj[e].mT, approximate="tanh") * (rows @ up_proj[e].mT)
            y = y.index_add(0, token, (hidden @ down_proj[e].mT).float() * routing.weights[token, k].unsqueeze(1))
    return y.to(x.dtype)


def grouped(x, gate_proj, up_proj, down_proj, routing):
    tokens, top_k = routing.indices.shape
    expert = routing.indices.flatten().long()
    order = expert.argsort(stable=True)
    offs = torch.bincount(expert, minlength=gate_proj.shape[0]).cumsum(0).int()
    rows = x[order // top_k]
    gate, up = (F.grouped_mm(rows, w.mT, offs=offs) for w in (gate_proj, up_proj))
    down = F.grouped_mm(F.gelu(gate, approximate="tanh") * up, down_proj.mT, offs=offs)
    y = torch.empty_like(down).index_copy(0, order, down).view(tokens, top_k, -1)
    return (y * routing.weights.unsqueeze(-1)).sum(1).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("how", ["cpu", "eager", "grouped_mm"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_moe_experts(benchmark, dtype, shape, how, backward):
    tokens, cols, hidden_cols, experts, top_k = shape
    if backward and tokens == 1:
        pytest.skip("one token is not trained on")
    verdict = judge.judge(cases.TABLE, cases.case(16, 64, 96, experts, top_k), dtype, "cpu")
    assert verdict.passed, verdict
    arguments = judge.in_dtype(cases.case(tokens, cols, hidden_cols, experts, top_k).arguments(), dtype)
    indices, weights = arguments.pop("indices"), arguments.pop("weights")
    leaves = [t.requires_grad_(backward) for t in (*arguments.values(), weights)]
    function = {"cpu": grokkernels.moe_experts, "eager": eager, "grouped_mm": grouped}[how]

    def run():
        routing = Routing(leaves[4], indices, indices.new_zeros(experts), weights.sum(), weights.sum())
        y = function(*leaves[:4], routing)
        if backward:
            torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    benchmark(run)
