"""Cases of gated_activation."""

from __future__ import annotations

import torch

from grokkernels.ops.gated_activation import KINDS, gated_activation
from grokkernels.reference.gated_activation import gated_activation as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(*shape: int, kind: str = "gelu_tanh", std: float = 1.0, why: str = "") -> Case:
    """gate and up of this shape; gate of this standard deviation."""

    def build(generator: torch.Generator) -> Arguments:
        return {"gate": normal(generator, *shape, std=std), "up": normal(generator, *shape), "kind": kind}

    words = ["x".join(map(str, shape)), kind] + ([] if std == 1.0 else [f"std={std:g}"])
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=gated_activation,
    reference=reference,
    grad=("gate", "up"),
    cases=(
        *(case(3, 67, kind=kind, why="vectors and a tail") for kind in KINDS),
        *(case(5, 48, kind=kind, why="whole vectors") for kind in KINDS),
        *(case(40, 50, kind=kind, std=5.0, why="both tails of the activation") for kind in KINDS),
        case(1, 1, why="one element"),
        case(2, 3, 16, why="leading dims to flatten"),
        case(2, 9001, kind="silu", why="blocks that end inside a row"),
        case(9001, kind="silu", why="one dim"),
        case(300, 129, kind="gelu", why="several rows per thread, odd rows"),
        case(0, 8, why="no row"),
        case(4, 0, why="no column"),
    ),
)
