"""Cases of linear_cross_entropy."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels.ops.linear_cross_entropy import linear_cross_entropy
from grokkernels.reference.linear_cross_entropy import linear_cross_entropy as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(
    rows: int,
    width: int,
    vocabulary: int,
    *,
    ignored: float = 0.0,
    targets_dtype: torch.dtype = torch.int64,
    std: float = 2.0,
    why: str = "",
    **options: Any,
) -> Case:
    """x (rows, width) and a weight that makes logits of standard deviation std, a share of the targets ignored."""

    def build(generator: torch.Generator) -> Arguments:
        x = normal(generator, rows, width)
        weight = normal(generator, vocabulary, width, std=std * width**-0.5)
        targets = torch.randint(0, vocabulary, (rows,), generator=generator)
        skip = torch.rand(rows, generator=generator) < ignored
        targets[skip] = options.get("ignore_index", -100)
        return {"x": x, "weight": weight, "targets": targets.to(targets_dtype), **options}

    words = [f"{rows}x{width}x{vocabulary}", *(f"{k}={v}" for k, v in options.items())]
    words += [f"{ignored:g} ignored"] * (ignored > 0) + ["int32 targets"] * (targets_dtype == torch.int32)
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=linear_cross_entropy,
    reference=reference,
    grad=("x", "weight"),
    cases=(
        case(3, 5, 7, why="shorter than any vector"),
        case(8, 48, 64, reduction="sum", why="full vectors"),
        case(30, 33, 700, reduction="none", why="one gradient per row; two tiles of columns"),
        case(200, 20, 130, why="two blocks of rows, for dweight two panels of them"),
        case(25, 300, 90, why="a width of several panels, with tails"),
        case(5, 530, 60, reduction="sum", why="dx and dweight in two blocks of the width"),
        case(4, 16, 4096 + 512 + 9, why="two ranges of columns, the second of two tiles"),
        case(40, 24, 100, ignored=0.4, why="rows that are not counted are gathered around"),
        case(21, 24, 60, ignored=0.4, ignore_index=3, reduction="none", why="an ignore_index inside the vocabulary"),
        case(4, 24, 40, ignored=1.0, why="nothing counted: loss and gradients are 0"),
        case(0, 8, 40, why="no row"),
        case(0, 8, 40, reduction="none"),
        case(12, 40, 200, softcap=30.0, logit_scale=0.5773502691896257, why="Grok-1's output multiplier, and a cap"),
        case(12, 40, 200, z_loss=1e-2, label_smoothing=0.1, softcap=20.0, ignored=0.3, why="everything at once"),
        case(12, 40, 200, z_loss=1e-3, label_smoothing=0.2, reduction="none"),
        case(9, 16, 33, targets_dtype=torch.int32, ignored=0.3),
    ),
)
