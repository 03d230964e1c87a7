"""Cases of rms_norm."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels.ops.rms_norm import rms_norm
from grokkernels.reference.rms_norm import rms_norm as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(
    *shape: int, residual: bool = False, weight_dtype: torch.dtype = torch.float64, why: str = "", **options: Any
) -> Case:
    """x of this shape, with the options of rms_norm."""

    def build(generator: torch.Generator) -> Arguments:
        x = normal(generator, *shape)
        weight = normal(generator, shape[-1], std=0.2, dtype=weight_dtype)
        weight = weight if options.get("zero_centered") else weight + 1
        arguments = {"x": x, "weight": weight, **options}
        if residual:
            arguments["residual"] = normal(generator, *shape)
        return arguments

    words = ["x".join(map(str, shape)), *(f"{k}={v}" for k, v in options.items())]
    words += ["residual"] * residual + ["float32 weight"] * (weight_dtype == torch.float32)
    return Case(" ".join(words), build, why)


TABLE = Table(
    op=rms_norm,
    reference=reference,
    grad=("x", "weight", "residual"),
    cases=(
        case(1, 1, eps=0.5, why="one element; a small eps would leave a gradient of nothing but cancellation"),
        case(3, 7, why="shorter than any vector"),
        case(2, 3, 16, why="one full AVX-512 vector, leading dims to flatten"),
        case(5, 67, why="four vectors and a tail"),
        case(4, 1000, why="a tail in the unrolled loop"),
        case(64, 256, why="several rows per thread"),
        case(3000, 24, why="many rows: the error of the weight gradient must not grow with their number"),
        case(1100, 520, why="many rows of several warps: a block takes some of them one after another"),
        case(2, 6144, why="the width of Grok-1"),
        case(1, 70001, why="a row longer than the first-level cache"),
        case(2, 20000, residual=True, why="a row longer than the registers of a block of 512 threads"),
        case(0, 8, why="no row at all"),
        case(33, 96, residual=True, why="the pair x + residual"),
        case(2, 5, 129, residual=True, zero_centered=True),
        case(7, 48, zero_centered=True),
        case(7, 48, weight_dtype=torch.float32, why="Grok keeps float32 scales beside bfloat16 activations"),
        case(9, 48, residual=True, weight_dtype=torch.float32),
        case(4, 64, eps=0.0),
        case(4, 64, eps=1e-2, why="an eps that shows in the result"),
    ),
)
