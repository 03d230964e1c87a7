"""optim.AdamW beside torch's and DeepSpeed's: pytest benchmarks/bench_adamw.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.judging import right
from benchmarks.harness.passes import DTYPES, word
from benchmarks.harness.peers import Absent, compiled, on_cpu
from benchmarks.harness.work import OURS, Work
from grokkernels.optim import AdamW
from grokkernels.testing.cases import adamw as cases

SHAPES = {"51M in one": [(51_000_000,)], "300 of 16384": [(128, 128)] * 300}


def optimizer(make: Callable[[list[torch.nn.Parameter]], Any], shape: str, dtype: torch.dtype) -> Callable[[], None]:
    params = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in SHAPES[shape]]
    for p in params:
        p.grad = torch.randn_like(p)
    step = make(params).step
    return lambda: step() and None


def deepspeed(params: list[torch.nn.Parameter]) -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, lr=1e-3, adamw_mode=True)


def peers(shape: str, dtype: torch.dtype) -> dict[str, Callable[[], None] | Absent]:
    found: dict[str, Callable[[], None] | Absent] = {
        "torch": optimizer(lambda p: torch.optim.AdamW(p, foreach=True), shape, dtype),
        "torch fused": optimizer(lambda p: torch.optim.AdamW(p, fused=True), shape, dtype),
        "DeepSpeed": on_cpu("deepspeed") or optimizer(deepspeed, shape, dtype),
    }
    if len(SHAPES[shape]) == 1:
        found["torch.compile"] = compiled(optimizer(lambda p: torch.optim.AdamW(p), shape, dtype))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw(compare: Any, shape: str, dtype: torch.dtype) -> None:
    """Parameter, gradient and both float32 moments are read, all but the gradient written."""
    count = sum(torch.Size(size).numel() for size in SHAPES[shape])
    described = Work(
        *("adamw", shape, word(dtype), "step"),
        read=count * (2 * dtype.itemsize + 8),
        written=count * (dtype.itemsize + 8),
    )
    contenders = {OURS: optimizer(AdamW, shape, dtype), **peers(shape, dtype)}
    compare(described, contenders, right(cases.TABLE, cases.case((300, 100), (77,), lr=0.1), dtype))


@pytest.mark.parametrize("count", [10**4, 10**5, 10**6, 10**7])
def test_parameters(compare: Any, count: int) -> None:
    SHAPES[f"{count}"] = [(count,)]
    functions = {OURS: AdamW, "torch fused": lambda p: torch.optim.AdamW(p, fused=True)}
    contenders = {name: optimizer(make, f"{count}", torch.float32) for name, make in functions.items()}
    described = Work(
        *("adamw", f"{count}", "float32", "step"), read=count * 16, written=count * 12, curve=("parameters", count)
    )
    compare(described, contenders, right(cases.TABLE, cases.case((300, 100), (77,), lr=0.1), torch.float32))
