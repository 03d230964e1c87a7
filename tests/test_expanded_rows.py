"""Rows that lie on one another, as mean pooling's gradient has them: read as what they are, and nothing beyond."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import grokkernels as gk

SHAPE = (2, 5, 12)
STRIDES = [(12, 0, 1), (0, 12, 1), (0, 0, 1), (0, 0, 0), (12, 1, 0)]
WEIGHT = torch.linspace(0.5, 1.5, SHAPE[-1])

OPS: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, **kw: gk.rms_norm(x, WEIGHT, **kw),
    "add_rms_norm": lambda x, **kw: gk.rms_norm(x, WEIGHT, residual=x, **kw)[0],
    "dual_rms_norm": lambda x, **kw: gk.dual_rms_norm(x, x, WEIGHT, WEIGHT, **kw)[0],
    "gated_activation": lambda x, **kw: gk.gated_activation(x, x, **kw),
    "moe_gate": lambda x, **kw: gk.moe_gate(x, top_k=12, **kw)[0].view(SHAPE),
}


def _between_nans(strides: tuple[int, ...]) -> torch.Tensor:
    memory = torch.full((500,), torch.nan)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(SHAPE, strides, strict=True))
    memory[100 : 100 + extent] = torch.linspace(-1, 2, extent)
    return memory.as_strided(SHAPE, strides, 100)


@pytest.mark.parametrize("strides", STRIDES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "emulated", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_rows_on_one_another(op: str, backend: str, strides: tuple[int, ...]) -> None:
    x, dy = _between_nans(strides), _between_nans(strides)
    same = x.clone(memory_format=torch.contiguous_format), dy.clone(memory_format=torch.contiguous_format)

    def call(x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.detach().requires_grad_()
        y = OPS[op](leaf, backend=backend)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    for got, expected in zip(call(x, dy), call(*same), strict=True):
        torch.testing.assert_close(got, expected)


def test_mean_pooling_after_a_norm() -> None:
    x = torch.randn(2, 50, 64, requires_grad=True)
    pooled = gk.rms_norm(x, torch.ones(64), backend="cpu").mean(1)
    (gradient,) = torch.autograd.grad((pooled * pooled.detach()).sum(), x)
    y = torch.nn.functional.rms_norm(x, (64,), eps=1e-6).mean(1)
    (expected,) = torch.autograd.grad((y * y.detach()).sum(), x)
    torch.testing.assert_close(gradient, expected)
