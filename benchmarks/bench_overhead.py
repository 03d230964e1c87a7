"""What a call costs around its kernel: one row, no gradients: pytest benchmarks/bench_overhead.py --benchmark-only

The arithmetic takes well below a microsecond here. No bytes are counted: memory sets no limit. All contenders have one
thread: beside other work on the machine, waiting for a second one takes vLLM milliseconds, and that is no overhead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import grokkernels
from benchmarks.bench_merge_attention_states import plain as plain_merge
from benchmarks.harness import machine, vllm
from benchmarks.harness.judging import right
from benchmarks.harness.peers import Absent, find_vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.testing import cases
from grokkernels.testing.case import Case

TABLES = cases.tables()  # loads the files of cases
COLS = 16
# The words for the shape, the case that judges ours, the contenders' calls.
Small = tuple[str, Case, dict[str, Callable[[], Any] | Absent]]

X, OTHER = torch.randn(2, 1, COLS)
WEIGHT = torch.rand(COLS)
Q, K, V = torch.randn(3, 1, 1, 1, COLS)


def normed(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (COLS,), WEIGHT, 1e-5)


def rms_norm() -> Small:
    calls = {
        OURS: lambda: grokkernels.rms_norm(X, WEIGHT),
        "torch fused": lambda: normed(X),
        "vLLM": find_vllm() or (lambda: vllm.rms_norm(X, WEIGHT, 1e-5)),
    }
    return f"1 x {COLS}", cases.rms_norm.case(1, COLS), calls


def dual_rms_norm() -> Small:
    def separate() -> tuple[torch.Tensor, torch.Tensor]:
        h = OTHER + normed(X)
        return normed(h), h

    calls = {OURS: lambda: grokkernels.dual_rms_norm(X, OTHER, WEIGHT, WEIGHT), "torch fused": separate}
    return f"1 x {COLS}", cases.dual_rms_norm.case(1, COLS), calls


def gated_activation() -> Small:
    both = torch.cat([X, OTHER], -1)
    calls = {
        OURS: lambda: grokkernels.gated_activation(X, OTHER),
        "torch": lambda: F.gelu(X, approximate="tanh") * OTHER,
        "vLLM": find_vllm() or (lambda: vllm.gated(both, "gelu_tanh")),
    }
    return f"1 x {COLS}", cases.gated_activation.case(1, COLS), calls


def moe_gate() -> Small:
    calls = {
        OURS: lambda: grokkernels.moe_gate(X, 2).weights,
        "torch": lambda: X.softmax(dim=-1).topk(2).values,
    }
    return f"top-2 of {COLS}, T 1", cases.moe_gate.case(1, COLS, top_k=2), calls


def rotary() -> Small:
    q, k = Q.clone(), K.clone()
    cos, sin = grokkernels.rotary_tables(COLS, 4)

    def ours() -> None:
        grokkernels.rotary(q, k, cos, sin, inplace=True)

    calls = {OURS: ours, "vLLM": find_vllm() or vllm.rotary(Q, K, cos, sin)}
    return f"in place, T 1, heads 1/1 of {COLS}", cases.rotary.case(1, 1, 1, COLS, kv_heads=1), calls


def merge_attention_states() -> Small:
    states = Q, torch.randn(1, 1, 1), K, torch.randn(1, 1, 1)
    calls = {
        OURS: lambda: grokkernels.merge_attention_states(*states),
        "torch": lambda: plain_merge(*states),
    }
    return f"T 1, 1 head of {COLS}", cases.merge_attention_states.case(1, 1, 1, COLS), calls


def cross_entropy() -> Small:
    targets = torch.tensor([3])
    calls = {
        OURS: lambda: grokkernels.cross_entropy(X, targets),
        "torch": lambda: F.cross_entropy(X, targets),
    }
    return f"1 x {COLS}", cases.cross_entropy.case(1, COLS), calls


def flash_attention() -> Small:
    heads_first = [x.transpose(1, 2) for x in (Q, K, V)]
    calls = {
        OURS: lambda: grokkernels.flash_attention(Q, K, V),
        "torch fused": lambda: F.scaled_dot_product_attention(*heads_first),
    }
    return f"decode, 1 key, heads 1/1 of {COLS}", cases.flash_attention.case(1, 1, 1, 1, 1, COLS), calls


OPS = (
    rms_norm,
    dual_rms_norm,
    gated_activation,
    moe_gate,
    rotary,
    merge_attention_states,
    cross_entropy,
    flash_attention,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    machine.limits()  # those of all threads, once for the process
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("small", OPS, ids=lambda small: small.__name__)
def test_overhead(compare: Any, small: Callable[[], Small]) -> None:
    words, case, calls = small()
    name = small.__name__
    compare(Work("overhead", f"{name}, {words}", "float32"), calls, right(TABLES[name], case, torch.float32))
