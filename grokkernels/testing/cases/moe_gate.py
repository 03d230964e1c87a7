"""Cases of moe_gate.

The judge wants the integers of the reference in the same dtype, so inputs are such that float32 rounding, which differs
between two right implementations, cannot decide a choice: drawn logits lie far enough apart (of a few thousand drawn
scores, no two that compete agree to 1e-6), and equal ones are equal to the bit, which both must break by the index.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from grokkernels.ops.moe_gate import moe_gate
from grokkernels.reference.moe_gate import moe_gate as reference
from grokkernels.testing.case import Arguments, Case, Table, builder, normal

inf, nan = float("inf"), float("nan")


@builder
def case(
    *shape: int,
    top_k: int,
    bias: float = 0.0,
    std: float = 1.0,
    change: Callable[[torch.Tensor], None] | None = None,
    name: str = "",
    why: str = "",
    **options: Any,
) -> Case:
    """Normal logits of this shape and std, altered by `change`; with a normal bias of std `bias` unless that is 0."""

    def build(generator: torch.Generator) -> Arguments:
        arguments: Arguments = {"logits": normal(generator, *shape, std=std), "top_k": top_k, **options}
        if change is not None:
            change(arguments["logits"])
        if bias:
            arguments["bias"] = normal(generator, shape[-1], std=bias, dtype=torch.float32)
        return arguments

    words = [f"{'x'.join(map(str, shape))} top-{top_k}", *(f"{k}={v}" for k, v in options.items())]
    words += [f"bias {bias}"] * bool(bias) + [name] * bool(name)
    return Case(" ".join(words), build, why)


def _some_infinite(logits: torch.Tensor) -> None:
    logits[0, ::2] = -inf
    logits[1, 1] = inf
    logits[2] = -inf
    logits[3, 1:] = -inf


def _some_nan(logits: torch.Tensor) -> None:
    logits[1, 3] = nan
    logits[-1] = nan


def _halves(logits: torch.Tensor) -> None:
    logits.mul_(2).round_().div_(2)


TABLE = Table(
    op=moe_gate,
    reference=reference,
    grad=("logits",),
    cases=(
        case(11, 8, top_k=2, why="Grok-1; fewer rows than an AVX-512 register has lanes"),
        case(1, 1, top_k=1, why="one expert: weight 1, and a gradient from the z loss alone"),
        case(2, 3, 8, top_k=2, softcap=30.0, std=20.0, why="Grok-2: a cap that bends; leading dims to flatten"),
        case(0, 8, top_k=2, why="no token at all"),
        case(16, 128, top_k=8, renormalize=True, why="Qwen3; exactly one AVX-512 register of rows"),
        case(200, 128, top_k=8, why="several blocks of rows and both threads, with a tail"),
        case(
            *(48, 256),
            top_k=8,
            scoring="sigmoid",
            bias=0.1,
            num_groups=8,
            topk_groups=4,
            renormalize=True,
            routed_scale=2.5,
            why="DeepSeek-V3",
        ),
        case(20, 160, top_k=6, num_groups=8, topk_groups=3, routed_scale=16.0, why="DeepSeek-V2: groups, no bias"),
        case(9, 37, top_k=5, scoring="sigmoid", why="E no multiple of any vector; K between the sizes in registers"),
        case(18, 67, top_k=3, softcap=2.0, jitter=0.1, seed=2**40 + 7, why="noise, drawn alike by every backend"),
        case(*(4, 384), top_k=8, scoring="sigmoid", bias=0.1, renormalize=True, routed_scale=2.827, why="Kimi K2"),
        case(3, 1024, top_k=12, why="many experts; top-k in memory"),
        case(7, 20, top_k=20, bias=0.5, why="all experts chosen: a sort"),
        case(
            *(18, 24),
            top_k=4,
            order="topk_then_softmax",
            softcap=5.0,
            std=4.0,
            bias=1.0,
            routed_scale=1.5,
            why="Mixtral's order, with everything that it takes",
        ),
        case(11, 12, top_k=2, order="topk_then_softmax", num_groups=4, topk_groups=2, jitter=0.25, seed=-1),
        case(17, 6, top_k=2, bias=0.3, num_groups=6, topk_groups=2, why="groups of one: no second best"),
        case(33, 16, top_k=4, change=_halves, name="ties", why="equal to the bit: the lower index first"),
        case(12, 32, top_k=10, change=_halves, num_groups=4, topk_groups=2, order="topk_then_softmax", name="ties"),
        case(5, 8, top_k=3, change=_some_infinite, name="infinities", why="masked experts; +infinity routes nowhere"),
        case(5, 8, top_k=3, order="topk_then_softmax", change=_some_infinite, name="infinities", why="chosen at -inf"),
        case(5, 8, top_k=3, softcap=3.0, change=_some_infinite, name="infinities", why="a cap makes them finite"),
        case(5, 8, top_k=3, scoring="sigmoid", renormalize=True, change=_some_infinite, name="infinities"),
        case(6, 8, top_k=2, renormalize=True, change=_some_nan, name="nan", why="routes nowhere, spoils no other row"),
        case(6, 8, top_k=2, order="topk_then_softmax", softcap=2.0, change=_some_nan, name="nan"),
    ),
)
