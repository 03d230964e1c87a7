"""Cases of cross_entropy."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels.ops.cross_entropy import cross_entropy
from grokkernels.reference.cross_entropy import cross_entropy as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(
    rows: int,
    vocabulary: int,
    *,
    ignored: float = 0.0,
    targets_dtype: torch.dtype = torch.int64,
    std: float = 2.0,
    masked: int = 0,
    why: str = "",
    **options: Any,
) -> Case:
    """Logits (rows, vocabulary), a share of the targets ignored, the last `masked` words at -infinity."""

    def build(generator: torch.Generator) -> Arguments:
        logits = normal(generator, rows, vocabulary, std=std)
        if masked:
            logits[:, -masked:] = -torch.inf
        targets = torch.randint(0, vocabulary - masked, (rows,), generator=generator)
        skip = torch.rand(rows, generator=generator) < ignored
        targets[skip] = options.get("ignore_index", -100)
        return {"logits": logits, "targets": targets.to(targets_dtype), **options}

    words = [f"{rows}x{vocabulary}", *(f"{k}={v}" for k, v in options.items())]
    words += [f"{ignored:g} ignored"] * (ignored > 0) + [f"{masked} masked"] * (masked > 0)
    words += ["int32 targets"] * (targets_dtype == torch.int32) + [f"std={std:g}"] * (std != 2.0)
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=cross_entropy,
    reference=reference,
    grad=("logits",),
    cases=(
        case(1, 1, z_loss=0.1, std=1.0, why="one word: p is 1 and only the z-loss is left"),
        case(3, 7, why="shorter than any vector"),
        case(5, 32, why="two full AVX-512 vectors: no tail"),
        case(4, 67, reduction="sum", why="pairs, a vector and a tail"),
        case(6, 1000, reduction="none", why="one gradient per row"),
        case(2, 1029, why="a block of columns and a few more"),
        case(2, 8192 + 1024 + 3, reduction="none", why="two ranges of columns per row, the second of two blocks"),
        case(1, 131072, why="Grok's vocabulary, one row shared between cores"),
        case(40, 300, ignored=0.4, why="rows that are not counted, several rows per thread"),
        case(7, 40, ignored=0.4, ignore_index=3, reduction="none", why="an ignore_index inside the vocabulary"),
        case(4, 40, ignored=1.0, why="nothing counted: the mean is 0"),
        case(0, 40, why="no row: the mean is 0"),
        case(0, 40, reduction="none"),
        case(9, 50, softcap=30.0, logit_scale=0.5773502691896257, why="Grok-1's output multiplier, and a cap"),
        case(3, 9000, softcap=50.0, logit_scale=0.5, std=40.0, why="logits past the cap"),
        case(9, 50, logit_scale=-0.7, why="a negative scale turns the tail's padding around"),
        case(9, 50, z_loss=1e-2, reduction="sum"),
        case(9, 50, label_smoothing=0.1, reduction="none"),
        case(3, 2500, label_smoothing=0.2, z_loss=1e-3, softcap=20.0, ignored=0.3, why="everything at once"),
        case(9, 50, label_smoothing=1.0, why="the target does not matter"),
        case(9, 50, masked=11, why="a vocabulary padded with -infinity"),
        case(5, 20, std=100.0, reduction="none", why="exponentials far outside float's range without the maximum"),
        case(8, 33, targets_dtype=torch.int32, ignored=0.3),
    ),
)
