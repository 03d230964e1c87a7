"""Cases of grouped_mm."""

from __future__ import annotations

import torch

from grokkernels.ops.grouped_mm import grouped_mm
from grokkernels.reference.grouped_mm import grouped_mm as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(groups: tuple[int, ...], depth: int, cols: int, *, unused: int = 0, mt: bool = False, why: str = "") -> Case:
    """Groups of these sizes and `unused` rows after them; with mt, w is the transposed view of an (E, N, K) weight."""

    def build(generator: torch.Generator) -> Arguments:
        x = normal(generator, sum(groups) + unused, depth)
        w = normal(generator, len(groups), *((cols, depth) if mt else (depth, cols)), std=max(depth, 1) ** -0.5)
        offsets = torch.tensor(groups, dtype=torch.int32).cumsum(0).int()
        return {"x": x, "w": w.mT if mt else w, "offsets": offsets}

    words = [f"{'+'.join(map(str, groups))} rows {depth}x{cols}"]
    words += [f"{unused} unused"] * (unused > 0) + ["mT"] * mt
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=grouped_mm,
    architectures=("sm_80", "sm_90"),
    reference=reference,
    grad=("x", "w"),
    cases=(
        case((1,), 1, 1, why="one product"),
        case((3,), 5, 7, why="one group, below any vector"),
        case((6, 6), 16, 64, why="exact AVX-512 tiles"),
        case((7, 0, 5, 1), 33, 65, why="an empty group, tails in every direction"),
        case((0, 0, 9), 20, 19, why="only the last group has rows"),
        case((11, 0, 0), 20, 19, unused=4, why="rows past the last group"),
        case((0, 0), 8, 8, unused=3, why="no group has rows"),
        case((0, 0), 8, 8, why="no row at all"),
        case((2, 3), 8, 0, why="no column"),
        case((200, 3), 40, 24, why="more rows than are packed at once"),
        case((5, 4), 300, 130, why="two blocks of the sum, two column tiles"),
        case((4, 9), 48, 32, mt=True, why="the layout of nn.Linear weights"),
        case((7, 0, 21), 67, 131, mt=True, unused=1),
        case((1,) * 16, 24, 40, why="many small groups"),
        case((300,), 264, 264, why="a group so large that Hopper's blocks work in pairs, the gradient's too"),
        case((260,), 24, 40, mt=True, why="the same with the weights of nn.Linear"),
    ),
)
