"""Lengths that change from call to call are no reason to compile: 50 of them, forward and backward, row by row.

What decides whether Triton compiles anew is the type of each argument, each constexpr, each pointer's alignment and
the compiler's options: numbers count for nothing, `kernel` tells triton.jit so. Launches are noted here instead of run,
and their different keys counted.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from grokkernels import dispatch
from grokkernels.testing import judge
from grokkernels.testing.case import Case, Table
from grokkernels.testing.cases import rms_norm
from grokkernels.triton.kernel import Launch, executing

LENGTHS = [1, 2, 3, 5, 7, 8, 13, 16, 17, 31, *range(32, 2000, 50)]
# A case of each table for a number of tokens, and how often each of its kernels may be compiled for all of them.
CASES: dict[str, tuple[Table, Callable[[int], Case]]] = {
    "rms_norm": (rms_norm.TABLE, lambda n: rms_norm.case(n, 64, residual=True)),
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


def test_every_row_is_here() -> None:
    rows = {row.name for row in dispatch.ROWS.values() if "triton" in row.supports}
    assert {table.name for table, _ in CASES.values()} >= rows - {"merge_attention_states"}


@pytest.mark.parametrize("name", CASES)
def test_lengths_do_not_compile(name: str) -> None:
    assert len(LENGTHS) == 50
    table, case = CASES[name]
    keys: dict[str, set[tuple]] = {}
    with executing(lambda launch: keys.setdefault(launch.kernel.name, set()).add(key(launch))):
        for n in LENGTHS:
            arguments = judge.in_dtype(case(n).arguments(), torch.float32)
            judge.run(lambda **kw: table.op(**kw, backend="triton"), arguments, table.grad, None)
    assert keys
    assert {kernel: len(found) for kernel, found in keys.items()} == dict.fromkeys(keys, 1)
