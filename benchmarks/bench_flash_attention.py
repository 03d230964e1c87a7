"""flash_attention against PyTorch's scaled_dot_product_attention, causal, and decoding with grouped heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from grokkernels.testing import judge
from grokkernels.testing.cases import flash_attention as cases

# B, T, S, H, Hkv, D
SHAPES = [(1, 512, 512, 8, 8, 128), (1, 2048, 2048, 8, 8, 128), (1, 2048, 2048, 8, 8, 64), (1, 1, 4096, 48, 8, 128)]


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return grokkernels.flash_attention(q, k, v, causal=True, backend="cpu")


def torch_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    causal, grouped = q.shape[1] > 1, q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


@pytest.fixture(scope="module", autouse=True)
def _right_before_fast() -> None:
    """No time is printed for a kernel that breaks the float64 rule."""
    case = cases.case(1, 200, 200, 8, 2, 128, causal=True)
    for dtype in (torch.float32, torch.bfloat16):
        verdict = judge.judge(cases.TABLE, case, dtype, "cpu")
        assert verdict.passed, verdict


@pytest.mark.parametrize("function", [ours, torch_sdpa])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{} T{} S{} H{}/{} D{}".format(*s))
def test_flash_attention(
    benchmark: Any, shape: tuple[int, ...], dtype: torch.dtype, backward: bool, function: Callable[..., torch.Tensor]
) -> None:
    batch, queries, keys, heads, kv_heads, dim = shape
    if backward and queries == 1:
        pytest.skip("decoding has no backward")
    q = torch.randn(batch, queries, heads, dim, dtype=dtype, requires_grad=backward)
    k, v = (torch.randn(batch, keys, kv_heads, dim, dtype=dtype, requires_grad=backward) for _ in range(2))
    dout = torch.randn_like(q)

    def call() -> None:
        o = function(q, k, v)
        if backward:
            torch.autograd.grad(o, (q, k, v), dout)

    benchmark(call)
