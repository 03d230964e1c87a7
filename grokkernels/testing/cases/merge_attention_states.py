"""Cases of merge_attention_states."""

from __future__ import annotations

import torch

from grokkernels.ops.merge_attention_states import merge_attention_states
from grokkernels.reference.merge_attention_states import merge_attention_states as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(*shape: int, spread: float = 1.0, dead: bool = False, why: str = "") -> Case:
    """o1, o2 of shape (B, T, H, D); lse with standard deviation `spread`, partly -inf if `dead`."""

    def build(generator: torch.Generator) -> Arguments:
        batch, tokens, heads, _ = shape
        lse1, lse2 = (normal(generator, batch, heads, tokens, std=spread, dtype=torch.float32) + 3 for _ in range(2))
        if dead:  # a row dead in the first state, in the second, in both
            lse1[..., 0::4] = -torch.inf
            lse2[..., 1::4] = -torch.inf
            lse1[..., 2::4] = -torch.inf
            lse2[..., 2::4] = -torch.inf
        return {"o1": normal(generator, *shape), "lse1": lse1, "o2": normal(generator, *shape), "lse2": lse2}

    words = ["x".join(map(str, shape))] + ([] if spread == 1.0 else [f"spread={spread:g}"]) + ["dead"] * dead
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=merge_attention_states,
    reference=reference,
    grad=("o1", "lse1", "o2", "lse2"),
    cases=(
        case(1, 40, 1, 1, why="rows of one element"),
        case(2, 3, 5, 7, why="shorter than any vector"),
        case(1, 4, 16, 64, why="whole vectors, of heads too"),
        case(2, 3, 19, 80, why="more heads than lanes, and a tail"),
        case(1, 50, 8, 128, why="several tokens per thread"),
        case(1, 9, 2, 33, spread=40.0, why="one state outweighs the other"),
        case(2, 8, 3, 24, dead=True, why="rows without keys"),
        case(1, 0, 2, 8, why="no token"),
    ),
)
