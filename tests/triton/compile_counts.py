"""How often kernels are compiled for 50 lengths: `python -m tests.triton.compile_counts`, without TRITON_INTERPRET.

Lengths that change from call to call are no reason to compile: 50 of them, forward and backward, row by row.

What decides whether Triton compiles anew is the type of each argument, each constexpr, each pointer's alignment and
the compiler's options: numbers count for nothing, `kernel` tells triton.jit so. Launches are noted here instead of run,
and their different keys counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import (
    adamw,
    cross_entropy,
    dual_rms_norm,
    flash_attention,
    flash_attention_varlen,
    gated_activation,
    grouped_mm,
    linear_cross_entropy,
    merge_attention_states,
    moe_experts,
    moe_gate,
    moe_permute,
    moe_unpermute,
    rms_norm,
    rotary,
)
from grokkernels.triton.kernel import Launch, executing

# What differs between the calls: tokens, rows, keys, parameters.
LENGTHS = [1, 2, 3, 5, 7, 8, 13, 16, 17, 31, *range(32, 2000, 50)]
CASES: dict[str, tuple[Table, Callable[[int], Case]]] = {
    "adamw": (adamw.TABLE, lambda n: adamw.case((n,), (n, 3), max_norm=1.0)),
    "cross_entropy": (cross_entropy.TABLE, lambda n: cross_entropy.case(n, 100)),
    "dual_rms_norm": (dual_rms_norm.TABLE, lambda n: dual_rms_norm.case(n, 64)),
    "flash_attention": (flash_attention.TABLE, lambda n: flash_attention.case(1, n, n, 2, 1, 32, causal=True)),
    "flash_attention keys": (flash_attention.TABLE, lambda n: flash_attention.case(1, 1, n, 2, 1, 32)),
    "flash_attention batch": (flash_attention.TABLE, lambda n: flash_attention.case(n, 3, 5, 2, 1, 32)),
    "flash_attention_varlen": (
        flash_attention_varlen.TABLE,
        lambda n: flash_attention_varlen.case((n, 3, 1), (n, 3, n), 2, 1, 32),
    ),
    "gated_activation": (gated_activation.TABLE, lambda n: gated_activation.case(n, 24)),
    "grouped_mm": (grouped_mm.TABLE, lambda n: grouped_mm.case((n, 0, 2 * n, 5), 32, 48)),
    "linear_cross_entropy": (linear_cross_entropy.TABLE, lambda n: linear_cross_entropy.case(n, 32, 100)),
    "merge_attention_states": (merge_attention_states.TABLE, lambda n: merge_attention_states.case(1, n, 2, 16)),
    "moe_experts": (moe_experts.TABLE, lambda n: moe_experts.case(n, 16, 24, 4, 2)),
    "moe_gate": (moe_gate.TABLE, lambda n: moe_gate.case(n, 8, top_k=2)),
    "moe_permute": (moe_permute.TABLE, lambda n: moe_permute.case(n, 16, 4, 2)),
    "moe_unpermute": (moe_unpermute.TABLE, lambda n: moe_unpermute.case(n, 16, 4, 2)),
    "rms_norm": (rms_norm.TABLE, lambda n: rms_norm.case(n, 64, residual=True)),
    "rotary": (rotary.TABLE, lambda n: rotary.case(1, n, 2, 16, max_position=2000)),
}


def key(launch: Launch) -> tuple:
    """What Triton compiles by."""
    constants = {name: launch.arguments[name] for name, kind in launch.signature().items() if kind == "constexpr"}
    return (
        launch.kernel.name,
        *launch.signature().values(),
        *constants.items(),
        *launch.aligned(),
        *launch.options.items(),
    )


def counts(name: str) -> dict[str, int]:
    """How often each kernel is compiled for all lengths."""
    table, case = CASES[name]
    keys: dict[str, set[tuple]] = {}
    with executing(lambda launch: keys.setdefault(launch.kernel.name, set()).add(key(launch))):
        for n in LENGTHS:
            arguments = judge.in_dtype(case(n).arguments(), torch.float32)
            judge.run(lambda **kw: table.op(**kw, backend="triton"), arguments, table.grad, None)
    return {kernel: len(found) for kernel, found in keys.items()}


if __name__ == "__main__":
    print(json.dumps({name: counts(name) for name in CASES}))
