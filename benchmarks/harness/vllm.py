"""vLLM's CPU operators as plain functions of tensors: torch.ops._C, once peers.vllm() has loaded them."""

from __future__ import annotations

from collections.abc import Callable

import torch

PAGE = 128  # tokens of a page of its cache


def instructions(dtype: torch.dtype) -> str:
    """The name by which vLLM calls its fastest kernels for this dtype here."""
    return "amx" if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else "vec"


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, softcap: float = 0.0
) -> Callable[[], torch.Tensor]:
    """q (1, T, H, D), k and v (1, S, Hkv, D). k and v are put into its paged cache beforehand: that is not timed."""
    (_, queries, heads, dim), (_, keys, kv_heads, _) = q.shape, k.shape
    isa, pages = instructions(q.dtype), -(-keys // PAGE)
    k_cache, v_cache = (torch.zeros(pages, kv_heads, PAGE, dim, dtype=q.dtype) for _ in range(2))
    torch.ops._C.cpu_attn_reshape_and_cache(k[0], v[0], k_cache, v_cache, torch.arange(keys), isa)
    starts = torch.tensor([0, queries], dtype=torch.int32)
    lengths = torch.tensor([keys], dtype=torch.int32)
    table = torch.arange(pages, dtype=torch.int32)[None]
    plan = torch.ops._C.get_scheduler_metadata(
        1, heads, kv_heads, dim, lengths, q.dtype, starts, causal, -1, isa, True, None
    )

    def call() -> torch.Tensor:
        out = torch.empty_like(q[0])
        torch.ops._C.cpu_attention_with_kv_cache(
            q[0], k_cache, v_cache, out, starts, lengths, dim**-0.5, causal, None, -1, table, softcap, plan, None, None
        )
        return out

    return call


def experts(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """SwiGLU experts, x (N, C), gate and up (E, F, C), down (E, C, F); packed beforehand, which is not timed."""
    isa = instructions(x.dtype)
    both = torch.cat([gate, up], 1).contiguous()
    w13, w2 = torch.empty_like(both), torch.empty_like(down)
    torch.ops._C.prepack_moe_weight(both, w13, isa)
    torch.ops._C.prepack_moe_weight(down.contiguous(), w2, isa)
    chosen = ids.int()

    def call() -> torch.Tensor:
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(out, x, w13, w2, None, None, weights, chosen, False, "silu", isa)
        return out

    return call


def rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Callable[[], object]:
    """q (1, T, H, D) and k are turned in place."""
    table = torch.cat([cos, sin], -1).to(q.dtype)
    positions = torch.arange(q.shape[1])
    flat_q, flat_k = (x.clone().view(q.shape[1], -1) for x in (q, k))
    return lambda: torch.ops._C.rotary_embedding(positions, flat_q, flat_k, q.shape[-1], table, True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.ops._C.rms_norm(y, x, weight, eps)
    return y


def gated(both: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows with the gate first, then up."""
    y = both.new_empty(both.shape[0], both.shape[1] // 2)
    {"gelu_tanh": torch.ops._C.gelu_tanh_and_mul, "silu": torch.ops._C.silu_and_mul}[kind](y, both)
    return y
