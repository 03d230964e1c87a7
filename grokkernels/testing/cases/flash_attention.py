"""Cases of flash_attention."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels.ops.flash_attention import flash_attention
from grokkernels.reference.flash_attention import flash_attention as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal


def extras(generator: torch.Generator, batch: int, heads: int, options: dict[str, Any]) -> Arguments:
    """The options as arguments; the words "sinks", "alibi" and "alibi per sequence" stand for drawn tensors."""
    arguments: Arguments = {key: value for key, value in options.items() if key not in ("sinks", "alibi")}
    if options.get("sinks"):
        arguments["sinks"] = normal(generator, heads, dtype=torch.float32)
    if options.get("alibi"):
        shape = (batch, heads) if options["alibi"] == "per sequence" else (heads,)
        arguments["alibi_slopes"] = torch.rand(shape, generator=generator) / 2
    if isinstance(options.get("q_start"), tuple):
        arguments["q_start"] = torch.tensor(options["q_start"])
    return arguments


@builder
def case(
    *shape: int, size: float = 1.0, value_dim: int | None = None, packed: bool = False, why: str = "", **options: Any
) -> Case:
    """q of shape (B, T, H, D) and k of (B, S, Hkv, D), given as B, T, S, H, Hkv, D. `size` is q's standard deviation.

    `packed` draws q, k and v as slices of one tensor (B, T, 3, H, D).
    """
    batch, queries, keys, heads, kv_heads, dim = shape

    def build(generator: torch.Generator) -> Arguments:
        if packed:
            assert (queries, heads, value_dim) == (keys, kv_heads, None)
            q, k, v = normal(generator, batch, queries, 3, heads, dim).unbind(2)
        else:
            q = normal(generator, batch, queries, heads, dim, std=size)
            k = normal(generator, batch, keys, kv_heads, dim)
            v = normal(generator, batch, keys, kv_heads, value_dim or dim)
        return {"q": q, "k": k, "v": v, "return_lse": True, **extras(generator, batch, heads, options)}

    words = [f"B{batch} T{queries} S{keys} H{heads}/{kv_heads} D{dim}"]
    words += [f"Dv{value_dim}"] * (value_dim is not None) + [f"size={size:g}"] * (size != 1)
    words += [f"{key}={value}" for key, value in options.items()]
    return Case(" ".join(words).replace("=True", ""), build, why)


TABLE = Table(
    op=flash_attention,
    reference=reference,
    grad=("q", "k", "v", "sinks"),
    architectures=("sm_80", "sm_90"),
    cases=(
        # sizes around the tiles: blocks of 96 keys, panels of 12, 24, 48 and 64 rows, tasks of 192 rows
        case(1, 3, 2, 1, 1, 1, why="head dim 1"),
        case(2, 5, 7, 2, 2, 16, why="smaller than any tile"),
        case(1, 48, 95, 2, 2, 64, why="one key short of a block"),
        case(1, 49, 96, 2, 1, 64, why="one row past a panel, one whole block"),
        case(1, 64, 97, 1, 1, 128, why="one key past a block"),
        case(1, 191, 193, 1, 1, 32, causal=True, why="one row short of a task, two blocks and a key"),
        case(1, 192, 192, 1, 1, 24, causal=True, why="one whole task; a head dim of half an AVX-512 vector"),
        case(1, 193, 191, 1, 1, 32, why="one row past a task"),
        case(2, 65, 200, 3, 1, 80, causal=True, why="rows of a group of three straddle panels"),
        case(1, 70, 70, 2, 2, 96, causal=True),
        case(1, 40, 50, 1, 1, 192),
        case(1, 33, 100, 2, 2, 256, causal=True, why="the largest head dim"),
        case(1, 30, 40, 2, 2, 72, value_dim=40, why="v of a narrower head"),
        case(1, 30, 40, 2, 1, 17, value_dim=33, causal=True, why="odd head dims, v wider"),
        # nothing to do
        case(2, 0, 5, 2, 1, 16, why="no query: k and v have zero gradients"),
        case(2, 5, 0, 2, 1, 16, why="no key: zeros"),
        case(1, 3, 0, 2, 2, 16, sinks=True, why="no key but a sink: lse is the sink"),
        case(0, 4, 4, 2, 2, 16, why="no sequence"),
        # one option each
        case(2, 70, 70, 4, 4, 32, causal=True),
        case(1, 50, 20, 2, 2, 32, causal=True, why="T > S: the first rows see no key"),
        case(1, 20, 110, 2, 2, 32, causal=True, why="T < S: aligned to the last key"),
        case(1, 40, 60, 4, 4, 32, scale=0.25),
        case(1, 20, 30, 2, 2, 32, scale=-0.1, why="a negative scale turns the maximum around"),
        case(1, 40, 60, 2, 2, 32, softcap=5.0),
        case(1, 40, 60, 2, 2, 64, size=40.0, softcap=30.0, causal=True, why="Grok's cap on scores far beyond it"),
        case(1, 30, 40, 6, 1, 128, softcap=30.0, causal=True, why="Grok's head dim, cap and heads per key"),
        case(1, 20, 30, 2, 1, 128, alibi=True, softcap=10.0),
        case(1, 20, 30, 1, 1, 256, softcap=10.0, causal=True),
        case(1, 30, 40, 2, 2, 256, alibi=True),
        case(1, 110, 110, 1, 1, 32, window=(20, -1)),
        case(1, 110, 110, 1, 1, 32, window=(-1, 20)),
        case(1, 220, 220, 1, 1, 32, window=(30, 0), causal=True, why="blocks before the window are never visited"),
        case(1, 40, 40, 16, 16, 32, window=(0, 0), softcap=2.0, sinks=True, why="each query sees one key"),
        case(1, 20, 200, 2, 2, 16, window=(5, 5), q_start=60, why="keys before and after all windows are never read"),
        case(1, 60, 20, 2, 2, 16, window=(3, 3), why="T > S: windows that lie before the first key are empty"),
        case(1, 40, 30, 2, 2, 16, window=(2, 2), q_start=10, why="windows that lie past the last key are empty"),
        case(2, 30, 40, 16, 8, 32, sinks=True, why="heads enough that the worst error of dsinks is no lottery"),
        case(2, 30, 40, 4, 2, 32, alibi=True),
        case(2, 30, 40, 4, 2, 32, alibi="per sequence", causal=True),
        case(1, 60, 100, 4, 4, 32, temperature_len=16, causal=True),
        case(2, 20, 60, 2, 2, 32, q_start=30, causal=True, why="an int: all sequences start at 30"),
        case(3, 20, 60, 2, 2, 32, q_start=(0, 40, -10), causal=True, why="a start per sequence; one begins before 0"),
        # heads
        case(1, 30, 30, 48, 8, 32, causal=True, why="the heads of Grok-1"),
        case(1, 40, 40, 5, 1, 64, causal=True, why="one kv head for all"),
        # decoding
        case(2, 1, 300, 8, 2, 64, causal=True),
        case(1, 1, 2000, 2, 2, 64, why="keys cut into chunks"),
        case(2, 1, 1921, 16, 2, 32, softcap=30.0, sinks=True, causal=True, why="a last chunk of one key"),
        case(1, 3, 2100, 6, 1, 32, window=(1500, -1), causal=True, why="the first chunk is partly out of the window"),
        case(1, 2, 2500, 1, 1, 16, window=(700, 0), why="chunks that no row sees"),
        # together
        case(1, 100, 150, 6, 2, 64, value_dim=48, causal=True, softcap=10.0, sinks=True, window=(60, -1)),
        case(
            2, 70, 90, 4, 1, 32, causal=True, softcap=8.0, sinks=True, alibi=True, temperature_len=24, window=(50, -1)
        ),
        case(2, 25, 25, 3, 3, 64, packed=True, causal=True, why="slices of one qkv tensor"),
    ),
)
