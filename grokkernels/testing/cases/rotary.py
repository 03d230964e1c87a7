"""Cases of rotary."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels.ops.rotary import rotary
from grokkernels.reference.rotary import rotary as reference
from grokkernels.reference.rotary import rotary_tables
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


@builder
def case(
    *shape: int,
    kv_heads: int | None = None,
    rotated: int | None = None,
    max_position: int = 64,
    positions: Any = None,
    cu_seqlens: list[int] | None = None,
    interleaved: bool = False,
    why: str = "",
) -> Case:
    """q of shape (B, T, H, D) or (total, H, D); k with `kv_heads`. Lists stand for integer tensors."""

    def build(generator: torch.Generator) -> Arguments:
        *leading, heads, dim = shape
        cos, sin = rotary_tables(dim if rotated is None else rotated, max_position)
        q = normal(generator, *leading, heads, dim)
        k = None if kv_heads is None else normal(generator, *leading, kv_heads, dim)
        arguments: Arguments = {"q": q, "k": k, "cos": cos, "sin": sin, "interleaved": interleaved}
        arguments["positions"] = torch.tensor(positions) if isinstance(positions, list) else positions
        if cu_seqlens is not None:
            arguments["cu_seqlens"] = torch.tensor(cu_seqlens, dtype=torch.int32)
        return arguments

    words = ["x".join(map(str, shape)), "no k" if kv_heads is None else f"k {kv_heads}"]
    words += [] if rotated is None else [f"rotated={rotated}"]
    words += [] if positions is None else [f"positions={positions}"]
    words += [] if cu_seqlens is None else [f"cu_seqlens={cu_seqlens}"]
    return Case(" ".join(words + ["interleaved"] * interleaved), build, why)


TABLE = Table(
    op=rotary,
    reference=reference,
    grad=("q", "k"),
    cases=(
        case(1, 1, 1, 2, positions=5, why="one pair"),
        case(2, 5, 3, 6, kv_heads=1, why="less than any vector, an odd number of pairs"),
        case(2, 5, 3, 6, kv_heads=1, interleaved=True),
        case(2, 7, 4, 64, kv_heads=2, why="whole vectors"),
        case(2, 7, 4, 64, kv_heads=2, interleaved=True),
        case(1, 9, 2, 74, kv_heads=2, interleaved=True, why="vectors and a tail"),
        case(1, 9, 2, 74, kv_heads=2),
        case(1, 3, 2, 80, kv_heads=1, rotated=20, why="partial: 60 dims pass"),
        case(1, 3, 2, 81, kv_heads=1, rotated=20, interleaved=True, why="an odd head dim"),
        case(1, 40, 12, 128, kv_heads=4, why="enough work for two threads"),
        case(1, 4, 2, 8, positions=7),
        case(3, 4, 2, 8, kv_heads=1, positions=[9, 0, 60], why="up to the last row of the tables"),
        case(2, 3, 2, 8, kv_heads=1, positions=[[4, 63, 0], [1, 1, 2]]),
        case(9, 2, 8, kv_heads=1, cu_seqlens=[0, 2, 2, 9], why="packed, an empty sequence"),
        case(9, 2, 8, kv_heads=1, cu_seqlens=[0, 2, 2, 9], positions=[5, 0, 11]),
        case(4, 2, 8, cu_seqlens=[0, 3, 4], positions=[3, 2, 1, 0]),
        case(2, 0, 2, 8, kv_heads=1, why="no token"),
    ),
)
