"""Integers at the edge of what their types hold: every op takes them for what they are, or refuses them in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import grokkernels as gk
from grokkernels.ops.moe_gate import Routing

LEAST, MOST = -(2**63), 2**63 - 1
BACKENDS = ["reference", "cpu", "emulated", "triton"]


def _drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


Q, KV = _drawn(1, 3, 2, 16), _drawn(1, 5, 1, 16)


def _attention(backend: str, **options: Any) -> Any:
    return gk.flash_attention(Q, KV, KV, return_lse=True, backend=backend, **options)


def _varlen(backend: str, **options: Any) -> Any:
    ends = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    return gk.flash_attention_varlen(Q[0], KV[0], KV[0], *ends, MOST, MOST, backend=backend, **options)


def _loss(backend: str, ignore_index: int, dtype: torch.dtype, target: int = 0) -> Any:
    targets = torch.tensor([target, 0, 1, 6, 2], dtype=dtype)
    return (
        gk.cross_entropy(_drawn(5, 7), targets, ignore_index=ignore_index, backend=backend),
        gk.linear_cross_entropy(_drawn(5, 4), _drawn(7, 4), targets, ignore_index=ignore_index, backend=backend),
    )


EXPERTS = torch.tensor([[0, 1], [LEAST, MOST], [2**32, 1], [-(2**32), 0]])


def _permuted(backend: str, indices: torch.Tensor, capacity: int | None = None, experts: int = 2) -> Any:
    return gk.moe_permute(_drawn(4, 3), indices, experts, capacity=capacity, backend=backend)


def _experts(backend: str, indices: torch.Tensor, capacity_factor: float | None = None) -> Any:
    routing = Routing(_drawn(4, 2), indices, *[torch.zeros(())] * 3)
    up, down = _drawn(2, 5, 3), _drawn(2, 3, 5)
    return gk.moe_experts(_drawn(4, 3), up, up, down, routing, capacity_factor=capacity_factor, backend=backend)


# Two calls that mean the same: the first with a number that no narrower type holds.
SAME: dict[str, tuple[Callable[[str], Any], Callable[[str], Any]]] = {
    "window right": (lambda b: _attention(b, window=(-1, MOST)), _attention),
    "window left": (lambda b: _attention(b, window=(MOST, -1)), _attention),
    "window of 32 bits": (lambda b: _attention(b, window=(2**31, 2**31 - 1)), _attention),
    "window past every key": (lambda b: _attention(b, window=(2**29, 2**29)), _attention),
    "window causal": (lambda b: _attention(b, window=(2**32, MOST), causal=True), lambda b: _attention(b, causal=True)),
    "window varlen": (lambda b: _varlen(b, window=(MOST, MOST)), _varlen),
    "temperature_len": (lambda b: _attention(b, temperature_len=MOST), _attention),
    "q_start far": (
        lambda b: _attention(b, q_start=2**28, window=(2**28, -1)),
        lambda b: _attention(b, q_start=9, window=(9, -1)),
    ),
    "q_start before": (
        lambda b: _attention(b, q_start=torch.tensor([-(2**28)]), causal=True),
        lambda b: _attention(b, q_start=-3, causal=True),
    ),
    "ignore_index 2**40, int32": (lambda b: _loss(b, 2**40, torch.int32), lambda b: _loss(b, -100, torch.int32)),
    "ignore_index 2**32, int32": (lambda b: _loss(b, 2**32, torch.int32), lambda b: _loss(b, -100, torch.int32)),
    "ignore_index least": (
        lambda b: _loss(b, LEAST, torch.int64, LEAST),
        lambda b: _loss(b, -100, torch.int64, -100),
    ),
    "ignore_index most": (lambda b: _loss(b, MOST, torch.int64, MOST), lambda b: _loss(b, -100, torch.int64, -100)),
    "expert indices": (
        lambda b: _permuted(b, EXPERTS),
        lambda b: _permuted(b, torch.tensor([[0, 1], [-1, 2], [-1, 1], [2, 0]])),
    ),
    "capacity": (lambda b: _permuted(b, EXPERTS, MOST), lambda b: _permuted(b, EXPERTS)),
    "experts' indices": (
        lambda b: _experts(b, EXPERTS),
        lambda b: _experts(b, torch.tensor([[0, 1], [-1, 2], [-1, 1], [2, 0]])),
    ),
    "capacity_factor": (lambda b: _experts(b, EXPERTS, 1e300), lambda b: _experts(b, EXPERTS)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SAME)
def test_the_number_counts_and_not_its_last_bits(name: str, backend: str) -> None:
    for one, other in zip(*(torch.utils._pytree.tree_leaves(call(backend)) for call in SAME[name]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


TABLES = _drawn(8, 8), _drawn(8, 8)

REFUSED: dict[str, Callable[[], Any]] = {
    r"window must hold two integers >= -1 \(-1: no limit\), got": lambda: _attention("cpu", window=(LEAST, -1)),
    r"q_start must be from -268435456 to 268435456, got 9223372036854775807": lambda: _attention("cpu", q_start=MOST),
    r"q_start must be from -268435456 to 268435456, got -9223372036854775808": lambda: _attention(
        "cpu", q_start=torch.tensor([LEAST])
    ),
    r"temperature_len must be from 0 to 9223372036854775807, got 9223372036854775808": lambda: _attention(
        "cpu", temperature_len=2**63
    ),
    r"ignore_index must be from .* to 9223372036854775807, got 9223372036854775808": lambda: _loss(
        "cpu", 2**63, torch.int64
    ),
    r"targets\[0\] is -9223372036854775808; allowed are 0 to 6": lambda: _loss("cpu", -100, torch.int64, LEAST),
    r"targets\[0\] is 4294967296; allowed are 0 to 6": lambda: _loss("cpu", -100, torch.int64, 2**32),
    r"num_experts must be from 1 to 2147483647, got 2147483648": lambda: _permuted("cpu", EXPERTS, experts=2**31),
    r"capacity must be from 0 to 9223372036854775807, got 9223372036854775808": lambda: _permuted(
        "cpu", EXPERTS, 2**63
    ),
    r"positions must lie in \[0, 8\), .* got positions from 9223372036854775807": lambda: gk.rotary(
        Q, None, *TABLES, positions=MOST, backend="cpu"
    ),
    r"positions must lie in \[0, 8\), .* got positions from -9223372036854775808 to 9223372036854775807": lambda: (
        gk.rotary(Q, None, *TABLES, positions=torch.tensor([[LEAST, MOST, 0]]), backend="cpu")
    ),
    r"cu_seqlens must rise from 0 to the 3 tokens of q, got \[0, 4294967299\]": lambda: gk.rotary(
        Q[0], None, *TABLES, cu_seqlens=torch.tensor([0, 2**32 + 3]), backend="cpu"
    ),
    r"top_k must be from 1 to 4, got 9223372036854775807": lambda: gk.moe_gate(_drawn(3, 4), MOST, backend="cpu"),
    r"seed must be from -9223372036854775808 to 18446744073709551615": lambda: gk.moe_gate(
        _drawn(3, 4), 2, jitter=0.1, seed=2**64, backend="cpu"
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_meant_is_refused_in_words(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        REFUSED[words]()


def test_offsets_that_lose_their_high_bits_are_refused_in_a_compiled_call() -> None:
    """The kernel looks at them there: as int32 they would rise from 0 to the number of tokens."""
    compiled = torch.compile(gk.rotary, backend="aot_eager")
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        compiled(Q[0], None, *TABLES, cu_seqlens=torch.tensor([0, 2**32 + 3]), backend="cpu")
