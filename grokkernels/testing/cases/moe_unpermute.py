"""Cases of moe_unpermute."""

from __future__ import annotations

import torch

from grokkernels.ops.moe_permute import moe_unpermute
from grokkernels.reference.moe_permute import moe_permute
from grokkernels.reference.moe_permute import moe_unpermute as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal
from grokkernels.testing.cases.moe_permute import routing


@builder
def case(
    tokens: int, cols: int, experts: int, top_k: int, how: str = "even", *, capacity: int | None = None, why: str = ""
) -> Case:
    """y (tokens * top_k, cols), with the slots that moe_permute gives for this routing."""

    def build(generator: torch.Generator) -> Arguments:
        indices = routing(generator, tokens, experts, top_k, how)
        slots = moe_permute(torch.zeros(tokens, 1), indices, experts, capacity=capacity)[1]
        weights = normal(generator, tokens, top_k, dtype=torch.float32)
        return {"y": normal(generator, tokens * top_k, cols), "weights": weights, "slots": slots}

    words = [f"{tokens}x{cols} E={experts} K={top_k} {how}"] + [f"capacity={capacity}"] * (capacity is not None)
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=moe_unpermute,
    reference=reference,
    grad=("y", "weights"),
    cases=(
        case(1, 15, 4, 2, why="one token"),
        case(0, 5, 4, 2, why="no token"),
        case(5, 0, 4, 2, why="no column: the weights still get their zeros"),
        case(7, 17, 1, 1, why="one expert"),
        case(33, 67, 8, 2, why="Grok's eight experts, top-2"),
        case(20, 16, 64, 8, why="a sum over eight rows"),
        case(40, 24, 4, 2, "dropped", why="slots of -1 add nothing, rows without a slot get no gradient"),
        case(40, 24, 4, 2, "uneven", capacity=9),
        case(6, 24, 4, 2, capacity=0, why="everything is dropped"),
        case(21, 1096, 6, 3, "uneven", capacity=9, why="rows of whole 16-byte vectors, a warp with several"),
        case(3, 4100, 4, 2, why="two blocks in the dot product of the weights' gradient"),
    ),
)
