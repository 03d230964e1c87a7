"""Cases of moe_permute, and the routings that the cases of its neighbours share."""

from __future__ import annotations

import torch

from grokkernels.ops.moe_permute import moe_permute
from grokkernels.reference.moe_permute import moe_permute as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


def routing(generator: torch.Generator, tokens: int, experts: int, top_k: int, how: str = "even") -> torch.Tensor:
    """indices (N, K) int32, each token's experts distinct.

    how: "even" draws all experts alike; "uneven" makes low ones likelier; "one" sends every first choice to expert 0;
    "dropped" replaces a quarter by indices outside [0, E).
    """
    scores = torch.rand(tokens, experts, generator=generator)
    if how == "uneven":
        scores = scores * torch.linspace(3, 0.1, experts)
    if how == "one":
        scores[:, 0] = 2.0
    indices = scores.topk(top_k, dim=1).indices.int()
    if how == "dropped":
        outside = torch.tensor([-1, experts, 2**31 - 1, -(2**31)], dtype=torch.int32)
        which = torch.randint(0, 4, indices.shape, generator=generator)
        indices = torch.where(torch.rand(indices.shape, generator=generator) < 0.25, outside[which], indices)
    return indices


@builder
def case(
    tokens: int,
    cols: int,
    experts: int,
    top_k: int,
    how: str = "even",
    *,
    capacity: int | None = None,
    wide: bool = False,
    why: str = "",
) -> Case:
    """x (tokens, cols) to the experts of `routing`; wide indices are int64."""

    def build(generator: torch.Generator) -> Arguments:
        indices = routing(generator, tokens, experts, top_k, how)
        if wide:
            indices = indices.long() + 2**32 * (indices < 0)
        x = normal(generator, tokens, cols)
        return {"x": x, "indices": indices, "num_experts": experts, "capacity": capacity}

    words = [f"{tokens}x{cols} E={experts} K={top_k} {how}"]
    words += [f"capacity={capacity}"] * (capacity is not None) + ["int64"] * wide
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=moe_permute,
    reference=reference,
    grad=("x",),
    cases=(
        case(1, 5, 4, 2, why="one token"),
        case(0, 5, 4, 2, why="no token"),
        case(7, 17, 1, 1, why="one expert"),
        case(33, 67, 8, 2, why="Grok's eight experts, top-2"),
        case(33, 67, 8, 2, "uneven", why="groups of different sizes"),
        case(20, 16, 64, 8, why="many small experts, some of them empty"),
        case(19, 40, 4, 2, "one", why="one expert gets every token"),
        case(40, 24, 4, 2, "dropped", why="indices outside [0, E) go nowhere"),
        case(40, 24, 4, 2, "dropped", wide=True, why="indices that int32 cannot hold"),
        case(40, 24, 4, 2, "uneven", capacity=9, why="later tokens are dropped"),
        case(6, 8, 4, 2, capacity=0, why="everything is dropped"),
        case(17000, 1, 8, 2, "uneven", capacity=3000, why="several chunks in the histogram"),
        case(700, 1, 2500, 8, "dropped", capacity=3, why="more experts than a device counts at a time, two chunks"),
        case(21, 64, 6, 3, "uneven", capacity=9, why="rows of whole 16-byte vectors"),
    ),
)
