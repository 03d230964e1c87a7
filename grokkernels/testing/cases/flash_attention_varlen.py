"""Cases of flash_attention_varlen."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch

from grokkernels.ops.flash_attention import flash_attention_varlen
from grokkernels.reference.flash_attention import flash_attention_varlen as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal
from grokkernels.testing.cases.flash_attention import extras


@builder
def case(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    *shape: int,
    value_dim: int | None = None,
    rest: int = 0,
    why: str = "",
    **options: Any,
) -> Case:
    """Sequences of these lengths, shape H, Hkv, D; `rest` rows of q, k and v belong to no sequence."""
    heads, kv_heads, dim = shape

    def build(generator: torch.Generator) -> Arguments:
        return {
            "q": normal(generator, sum(queries) + rest, heads, dim),
            "k": normal(generator, sum(keys) + rest, kv_heads, dim),
            "v": normal(generator, sum(keys) + rest, kv_heads, value_dim or dim),
            "cu_seqlens_q": torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, *accumulate(keys)], dtype=torch.int32),
            "max_seqlen_q": max(queries, default=0),
            "max_seqlen_k": max(keys, default=0),
            "return_lse": True,
            **extras(generator, len(queries), heads, options),
        }

    words = [f"T{queries} S{keys}".replace(" ", ""), f"H{heads}/{kv_heads} D{dim}"]
    words += [f"Dv{value_dim}"] * (value_dim is not None) + [f"rest={rest}"] * (rest > 0)
    words += [f"{key}={value}" for key, value in options.items()]
    return Case(" ".join(words).replace("=True", ""), build, why)


TABLE = Table(
    op=flash_attention_varlen,
    reference=reference,
    grad=("q", "k", "v", "sinks"),
    architectures=("sm_80", "sm_90"),
    cases=(
        case((7,), (9,), 2, 1, 32, why="one sequence"),
        case((30, 17, 53), (30, 17, 53), 4, 2, 64, causal=True),
        case((5, 0, 3, 0), (5, 6, 0, 0), 2, 2, 16, why="sequences without queries, keys or both"),
        case((100, 200), (300, 97), 1, 1, 32, causal=True, why="unequal lengths, several tiles each"),
        case((1, 1, 1), (2000, 10, 100), 8, 2, 32, causal=True, why="decoding; only the long one is cut into chunks"),
        case((26, 14), (15, 29), 8, 4, 16, rest=3, sinks=True, why="rows past the last sequence"),
        case((40, 60), (50, 30), 6, 2, 32, value_dim=24, softcap=5.0, window=(16, 8), sinks=True),
        case((20, 30), (40, 50), 2, 1, 32, alibi="per sequence", temperature_len=8, q_start=(20, 5), causal=True),
    ),
)
