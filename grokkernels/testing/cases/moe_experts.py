"""Cases of moe_experts. The table's op takes the routing's two tensors one by one, so that each is an argument."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import ops
from grokkernels.reference.moe_experts import moe_experts as experts_reference
from grokkernels.reference.moe_gate import Routing
from grokkernels.testing.case import Arguments, Case, Table, builder, normal
from grokkernels.testing.cases.moe_permute import routing


def _routing(weights: torch.Tensor, indices: torch.Tensor) -> Routing:
    nothing = weights.new_zeros(())
    return Routing(weights, indices, indices.new_zeros(1), nothing, nothing)


def moe_experts(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The public op on a routing of these weights and indices."""
    return ops.moe_experts(x, gate_proj, up_proj, down_proj, _routing(weights, indices), **options)


def reference(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The reference on the same."""
    return experts_reference(x, gate_proj, up_proj, down_proj, _routing(weights, indices), **options)


@builder
def case(
    tokens: int | tuple[int, ...],
    cols: int,
    hidden_cols: int,
    experts: int,
    top_k: int,
    how: str = "even",
    *,
    mt: bool = False,
    why: str = "",
    **options: Any,
) -> Case:
    """x (tokens, cols) to experts of this width, by `routing`; with mt the weights are views of transposed ones."""
    leading = (tokens,) if isinstance(tokens, int) else tokens

    def build(generator: torch.Generator) -> Arguments:
        indices = routing(generator, torch.Size(leading).numel(), experts, top_k, how)
        weights = torch.rand(indices.shape, generator=generator) + 0.1

        def matrices(out: int, into: int) -> torch.Tensor:
            size = (into, out) if mt else (out, into)
            made = normal(generator, experts, *size, std=into**-0.5)
            return made.mT if mt else made

        return {
            "x": normal(generator, *leading, cols),
            "gate_proj": matrices(hidden_cols, cols),
            "up_proj": matrices(hidden_cols, cols),
            "down_proj": matrices(cols, hidden_cols),
            "weights": weights,
            "indices": indices,
            **options,
        }

    words = [f"{'x'.join(map(str, leading))} {cols}x{hidden_cols} E={experts} K={top_k} {how}"] + ["mT"] * mt
    return Case(" ".join([*words, *(f"{k}={v}" for k, v in options.items())]), build, why)


TABLE = Table(
    op=moe_experts,
    architectures=("sm_80", "sm_90"),
    reference=reference,
    grad=("x", "gate_proj", "up_proj", "down_proj", "weights"),
    cases=(
        case(1, 24, 40, 64, 32, why="one token; few weights would have a gradient judged by luck"),
        case(0, 8, 16, 4, 2, why="no token: every weight's gradient is zero"),
        case(9, 17, 33, 1, 1, why="one expert, tails in every direction"),
        case(37, 64, 130, 8, 2, "uneven", why="Grok's eight experts, top-2; two tiles of the hidden width"),
        case((2, 3, 5), 24, 32, 4, 2, why="leading dims to flatten"),
        case(19, 24, 32, 4, 2, "uneven", mt=True, why="weights that lie the other way"),
        case(12, 16, 24, 64, 8, why="many small experts, some of them empty"),
        case(210, 32, 40, 4, 2, "one", why="more rows in one group than are packed at once"),
        case(23, 24, 32, 4, 2, "dropped", why="indices outside [0, E) add nothing"),
        case(30, 24, 32, 4, 2, "uneven", capacity_factor=0.8, why="later tokens are dropped"),
        case(8, 24, 32, 4, 2, capacity_factor=0.0, why="everything is dropped"),
        case(7, 300, 280, 2, 1, why="several panels in every sum"),
        case(300, 72, 136, 1, 1, why="an expert so large that Hopper's blocks work in pairs"),
        case(14, 24, 67, 4, 2, activation="gelu"),
        case(14, 24, 67, 4, 2, activation="silu"),
        case(14, 24, 67, 4, 2, activation="relu"),
    ),
)
