"""cross_entropy beside torch: pytest benchmarks/bench_cross_entropy.py --benchmark-only"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.harness.judging import right
from benchmarks.harness.passes import DIRECTIONS, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import compiled
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import cross_entropy as cases

# rows, vocabulary, softcap: Grok's vocabulary, the cap that Grok-1's attention has, a small vocabulary with many rows.
SHAPES = ((256, 131072, 0.0), (256, 131072, 30.0), (4096, 4096, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(compare: Any, shape: tuple[int, int, float], direction: str, dtype: torch.dtype) -> None:
    rows, vocabulary, softcap = shape
    logits, targets = torch.randn(rows, vocabulary).to(dtype), torch.randint(0, vocabulary, (rows,))

    def plain(logits: torch.Tensor) -> torch.Tensor:
        z = logits.float()
        return F.cross_entropy(softcap * torch.tanh(z / softcap) if softcap else z, targets)

    functions = {
        OURS: lambda logits: grokkernels.cross_entropy(logits, targets, softcap=softcap).float(),
        "torch": plain,
        "torch.compile": compiled(plain),
    }
    size = rows * vocabulary * dtype.itemsize
    read, written = (size, 0) if direction == FORWARD else (2 * size, size)
    words = f"{rows} x {vocabulary}" + (f", softcap {softcap:g}" if softcap else "")
    compare(
        Work("cross_entropy", words, word(dtype), direction, read=read, written=written),
        calls(functions, (logits,), direction),
        right(cases.TABLE, cases.case(8, vocabulary, softcap=softcap, reduction="none"), dtype),
    )
