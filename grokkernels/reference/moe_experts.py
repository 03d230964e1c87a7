"""moe_experts: a routed mixture of gated feed-forward networks."""

from __future__ import annotations

import math

import torch

from grokkernels.reference.gated_activation import gated_activation
from grokkernels.reference.grouped_mm import grouped_mm
from grokkernels.reference.moe_gate import Routing
from grokkernels.reference.moe_permute import moe_permute, moe_unpermute


def moe_experts(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    routing: Routing,
    *,
    activation: str = "gelu_tanh",
    capacity_factor: float | None = None,
) -> torch.Tensor:
    """x (..., C), gate_proj and up_proj (E, F, C), down_proj (E, C, F) -> (..., C).

    y_n = sum_k weights[n,k] * down_e(act(gate_e x_n) * up_e x_n), e = indices[n,k]. With a capacity_factor an expert
    takes its first ceil(capacity_factor * N * K / E) tokens and drops the rest.
    """
    experts = gate_proj.shape[0]
    tokens = x.reshape(-1, x.shape[-1])
    capacity = None
    if capacity_factor is not None:
        pairs = routing.indices.numel()
        capacity = math.ceil(min(capacity_factor * pairs / experts, pairs))
    rows, slots, offsets = moe_permute(tokens, routing.indices, experts, capacity=capacity)
    gate = grouped_mm(rows, gate_proj.transpose(1, 2), offsets)
    up = grouped_mm(rows, up_proj.transpose(1, 2), offsets)
    down = grouped_mm(gated_activation(gate, up, activation), down_proj.transpose(1, 2), offsets)
    return moe_unpermute(down, routing.weights, slots).view(x.shape)
