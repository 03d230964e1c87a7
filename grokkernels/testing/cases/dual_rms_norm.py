"""Cases of dual_rms_norm."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels.ops.dual_rms_norm import dual_rms_norm
from grokkernels.reference.dual_rms_norm import dual_rms_norm as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(*shape: int, weight_dtype: torch.dtype = torch.float64, why: str = "", **options: Any) -> Case:
    """x and residual of this shape, with the options of dual_rms_norm."""

    def build(generator: torch.Generator) -> Arguments:
        arguments = {"x": normal(generator, *shape), "residual": normal(generator, *shape), **options}
        for name in ("post_weight", "pre_weight"):
            weight = normal(generator, shape[-1], std=0.2, dtype=weight_dtype)
            arguments[name] = weight if options.get("zero_centered") else weight + 1
        return arguments

    words = ["x".join(map(str, shape)), *(f"{k}={v}" for k, v in options.items())]
    return Case(" ".join(words + ["float32 weights"] * (weight_dtype == torch.float32)), build, why)


TABLE = Table(
    op=dual_rms_norm,
    reference=reference,
    grad=("x", "residual", "post_weight", "pre_weight"),
    cases=(
        case(1, 1, eps=0.5, why="one element; a small eps would leave a gradient of nothing but cancellation"),
        case(3, 7, why="shorter than any vector"),
        case(2, 3, 16, why="one full AVX-512 vector, leading dims to flatten"),
        case(11, 67, why="four vectors and a tail; rows in groups and single"),
        case(4, 1000, why="a tail in the unrolled loop"),
        case(200, 96, why="several groups of rows per thread, and sums emptied between them"),
        case(3000, 24, why="many rows: the error of the weight gradients must not grow with their number"),
        case(2, 6144, why="the width of Grok-1"),
        case(5, 20001, why="rows too long to be taken in groups"),
        case(2, 9008, why="a row longer than the registers of a block of 512 threads"),
        case(0, 8, why="no row at all"),
        case(7, 48, zero_centered=True),
        case(9, 48, weight_dtype=torch.float32, why="Grok keeps float32 scales beside bfloat16 activations"),
        case(4, 64, eps=1e-2, why="an eps that shows in the result"),
    ),
)
