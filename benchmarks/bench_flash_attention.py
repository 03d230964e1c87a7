"""flash_attention beside torch and vLLM: pytest benchmarks/bench_flash_attention.py --benchmark-only"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import grokkernels
from benchmarks.harness import vllm
from benchmarks.harness.judging import DEVICE, right
from benchmarks.harness.passes import BOTH, DTYPES, FORWARD, calls, word
from benchmarks.harness.peers import Absent, compiled, find_vllm
from benchmarks.harness.work import OURS, Work
from grokkernels.testing.cases import flash_attention as cases

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# T, H, Hkv, D, softcap
TRAINING = [
    *((512, 8, 8, 64, 0.0), (512, 8, 8, 128, 0.0), (2048, 8, 8, 64, 0.0), (2048, 8, 8, 128, 0.0)),
    *((2048, 32, 8, 128, 0.0), (2048, 8, 8, 128, 30.0), (8192, 8, 8, 64, 0.0), (8192, 8, 8, 128, 0.0)),
    (1024, 48, 8, 128, 30.0),  # Grok-1's heads
]
BACKWARD = [(512, 8, 8, 128, 0.0), (2048, 8, 8, 128, 0.0), (2048, 8, 8, 128, 30.0), (8192, 8, 8, 64, 0.0)]
# Keys, H, Hkv, D
DECODE = [(4096, 8, 8, 128), (4096, 32, 8, 128), (4096, 48, 8, 128), (32768, 32, 8, 128), (32768, 48, 8, 128)]


def eager(softcap: float) -> Attention:
    """Matrix products and a softmax, in the dtype of q."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if q.shape[2] > 1:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return call


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    causal, grouped = q.shape[1] > 1, q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def flex(softcap: float, tokens: int) -> Attention:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, tokens, tokens, device=DEVICE)
    run = compiled(flex_attention)

    def cap(score: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return run(q, k, v, score_mod=cap, block_mask=mask, enable_gqa=grouped).transpose(1, 2)

    return call


def inputs(
    queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(1, queries, heads, dim).to(dtype),
        *(torch.randn(1, keys, kv_heads, dim).to(dtype) for _ in range(2)),
    )


def contenders(shape: tuple, tensors: tuple[torch.Tensor, ...], direction: str) -> dict[str, Any]:
    tokens, *_, softcap = shape
    functions: dict[str, Attention | Absent] = {
        OURS: lambda q, k, v: grokkernels.flash_attention(q, k, v, causal=True, softcap=softcap),
    }
    if tokens <= 2048:
        functions["torch"] = eager(softcap)
    functions["torch fused"] = sdpa if softcap == 0.0 else Absent("torch's fused attention has no softcap")
    if softcap and direction == FORWARD:
        functions["torch.compile"] = flex(softcap, tokens)
    elif tokens <= 2048:
        functions["torch.compile"] = compiled(eager(softcap))
    found = calls(functions, tensors, direction)
    if direction == FORWARD:
        found["vLLM"] = find_vllm() or vllm.attention(*tensors, causal=True, softcap=softcap)
    else:
        found["vLLM"] = Absent("vLLM has no backward")
    return found


def work(shape: tuple, dtype: torch.dtype, direction: str, **more: Any) -> Work:
    """Two products forward, five backward, of half the square."""
    tokens, heads, kv_heads, dim, softcap = shape
    flops = (4 if direction == FORWARD else 14) * tokens * tokens * heads * dim // 2
    words = f"causal, T {tokens}, heads {heads}/{kv_heads} of {dim}" + (f", softcap {softcap:g}" if softcap else "")
    return Work("flash_attention", words, word(dtype), direction, flops=flops, **more)


def judged(heads: int, kv_heads: int, dim: int, softcap: float, dtype: torch.dtype) -> Callable[[], None]:
    return right(cases.TABLE, cases.case(1, 200, 200, heads, kv_heads, dim, causal=True, softcap=softcap), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", TRAINING, ids=str)
def test_forward(compare: Any, shape: tuple, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, dim, softcap = shape
    tensors = inputs(tokens, tokens, heads, kv_heads, dim, dtype)
    check = judged(heads, kv_heads, dim, softcap, dtype)
    compare(work(shape, dtype, FORWARD), contenders(shape, tensors, FORWARD), check)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", BACKWARD, ids=str)
def test_forward_and_backward(compare: Any, shape: tuple, dtype: torch.dtype) -> None:
    tokens, heads, kv_heads, dim, softcap = shape
    tensors = inputs(tokens, tokens, heads, kv_heads, dim, dtype)
    compare(work(shape, dtype, BOTH), contenders(shape, tensors, BOTH), judged(heads, kv_heads, dim, softcap, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("shape", DECODE, ids=str)
def test_decode(compare: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """One query: bytes are those of k and v."""
    keys, heads, kv_heads, dim = shape
    tensors = inputs(1, keys, heads, kv_heads, dim, dtype)

    def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """torch's fused attention with the heads of a group as queries: faster than its enable_gqa."""
        group = q.view(1, kv_heads, heads // kv_heads, dim)
        out = F.scaled_dot_product_attention(group, k.transpose(1, 2), v.transpose(1, 2))
        return out.view(1, 1, heads, dim)

    functions = {
        OURS: lambda q, k, v: grokkernels.flash_attention(q, k, v),
        "torch": eager(0.0),
        "torch fused": folded,
    }
    found = calls(functions, tensors, FORWARD)
    found["vLLM"] = find_vllm() or vllm.attention(*tensors, causal=True)
    described = Work(
        *("flash_attention", f"decode, {keys} keys, heads {heads}/{kv_heads} of {dim}", word(dtype)),
        read=2 * keys * kv_heads * dim * dtype.itemsize,
    )
    check = right(cases.TABLE, cases.case(1, 1, 1000, heads, kv_heads, dim), dtype)
    compare(described, found, check)


@pytest.mark.parametrize("dtype", DTYPES, ids=word)
@pytest.mark.parametrize("tokens", [128, 512, 2048, 8192])
def test_tokens(compare: Any, tokens: int, dtype: torch.dtype) -> None:
    shape = (tokens, 4, 4, 128, 0.0)
    tensors = inputs(tokens, tokens, 4, 4, 128, dtype)
    functions = {OURS: lambda q, k, v: grokkernels.flash_attention(q, k, v, causal=True), "torch fused": sdpa}
    described = work(shape, dtype, FORWARD, curve=("tokens", tokens))
    compare(described, calls(functions, tensors, FORWARD), judged(4, 4, 128, 0.0, dtype))
