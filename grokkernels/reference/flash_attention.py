"""flash_attention: softmax(scores) v for one batch of sequences, or for packed ones.

The score of query t (at position i) and key j goes through these steps, in this order:
  1. scale * q.k
  2. softcap * tanh(s / softcap)                                 if softcap > 0
  3. s * log2(i) / log2(temperature_len)                         if temperature_len > 0 and i > temperature_len
  4. s - slope * |i - j|                                         if alibi_slopes (ALiBi, arXiv:2108.12409)
  5. -inf unless j <= i (causal), j >= i - left and j <= i + right (window; -1: no limit on that side)
  6. softmax over the keys, with exp(sink) added to its denominator if sinks
Position i counts from 0: i = t + S - T (aligned to the last key), or t + q_start; key j has position j.
lse is the natural logarithm of the softmax's whole denominator, the sink included.
"""

from __future__ import annotations

import math

import torch

from grokkernels.reference.precision import accumulation_dtype
from grokkernels.reference.values import known


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = (-1, -1),
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    temperature_len: int = 0,
    q_start: int | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q (B,T,H,D), k (B,S,Hkv,D), v (B,S,Hkv,Dv) -> o (B,T,H,Dv) [, lse (B,H,T)]; scale is D^-0.5 unless given.

    Query head h reads key head h // (H / Hkv). sinks (H,); alibi_slopes (H,) or (B,H); q_start an int or (B,).
    A row that sees no key gives output 0 and gradient 0, and lse -inf (with a sink: lse = sink).
    """
    if dropout_p:
        raise ValueError(f"dropout_p must be 0 (dropout is not implemented), got {dropout_p}")
    acc = accumulation_dtype(q)
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    i, j = _positions(batch, queries, keys, q_start, q.device)
    visible = _visible(i, j, causal, window)  # (B or 1, 1, T, S)

    # A key that no query sees is never read: its row may hold anything, in the gradient too.
    unseen = ~visible.any(dim=2)[:, 0, :, None, None]  # (B or 1, S, 1, 1)
    k, v = (x.to(acc).masked_fill(unseen, 0).repeat_interleave(group, dim=2) for x in (k, v))

    s = torch.einsum("bthd,bshd->bhts", q.to(acc), k) * (dim**-0.5 if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if temperature_len > 0:
        temperature = torch.log2(i.clamp(min=1).to(acc)) / math.log2(temperature_len)
        s = s * torch.where(i > temperature_len, temperature, 1)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(acc).view(-1, heads, 1, 1) * (i - j).abs()
    s = s.masked_fill(~visible, -torch.inf)

    # softmax, written out so that rows without a key, and S = 0, give 0 and not NaN
    top = s.detach().amax(dim=-1, keepdim=True) if keys else s.new_full((batch, heads, queries, 1), -torch.inf)
    if sinks is not None:
        sink = sinks.to(acc).view(1, heads, 1, 1)
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0)
    p = torch.exp(s - top)
    denominator = p.sum(dim=-1, keepdim=True)
    if sinks is not None:
        denominator = denominator + torch.exp(sink - top)
    dead = denominator == 0
    denominator = denominator.masked_fill(dead, 1)
    # A NaN among the scores stays with the keys that are seen.
    o = torch.einsum("bhts,bshd->bthd", (p / denominator).masked_fill(~visible, 0), v).to(q.dtype)
    if not return_lse:
        return o
    return o, (top + torch.log(denominator)).masked_fill(dead, -torch.inf).squeeze(-1)


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    window: tuple[int, int] = (-1, -1),
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    temperature_len: int = 0,
    q_start: int | torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """flash_attention on each of B packed sequences.

    q (total_q,H,D), k (total_k,Hkv,D), v (total_k,Hkv,Dv) -> o (total_q,H,Dv) [, lse (H,total_q)].
    Sequence b owns rows cu_seqlens_q[b] .. cu_seqlens_q[b+1] of q and cu_seqlens_k likewise of k and v. The two maxima
    are hints for kernels. Rows of q past the last sequence give 0 and -inf.
    """
    if block_table is not None:
        raise ValueError("block_table must be None: paged keys are not implemented")
    starts_q, starts_k = (
        offsets.tolist() if known(offsets) else [0] + [rows.shape[0]] * (offsets.shape[0] - 1)
        for offsets, rows in ((cu_seqlens_q, q), (cu_seqlens_k, k))
    )
    outputs, lses = [], []
    for b in range(len(starts_q) - 1):
        rows_q, rows_k = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        per_sequence_slopes = alibi_slopes is not None and alibi_slopes.dim() == 2
        o, lse = flash_attention(
            q[None, rows_q],
            k[None, rows_k],
            v[None, rows_k],
            causal=causal,
            scale=scale,
            softcap=softcap,
            window=window,
            sinks=sinks,
            alibi_slopes=alibi_slopes[b] if per_sequence_slopes else alibi_slopes,
            temperature_len=temperature_len,
            q_start=q_start[b : b + 1] if isinstance(q_start, torch.Tensor) else q_start,
            dropout_p=dropout_p,
            return_lse=True,
        )
        outputs.append(o[0])
        lses.append(lse[0])
    rest = q.shape[0] - starts_q[-1]
    outputs.append(q.new_zeros(rest, q.shape[1], v.shape[-1]))
    lses.append(q.new_full((q.shape[1], rest), -torch.inf, dtype=accumulation_dtype(q)))
    o = torch.cat(outputs)
    return (o, torch.cat(lses, dim=1)) if return_lse else o


def _positions(
    batch: int, queries: int, keys: int, q_start: int | torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """i (B or 1, 1, T, 1) and j (S,): the positions of queries and keys."""
    start = torch.as_tensor(keys - queries if q_start is None else q_start, device=device).long()
    i = start.view(-1, 1, 1, 1) + torch.arange(queries, device=device).view(1, 1, -1, 1)
    return i, torch.arange(keys, device=device)


def _visible(i: torch.Tensor, j: torch.Tensor, causal: bool, window: tuple[int, int]) -> torch.Tensor:
    left, right = window
    visible = torch.ones_like(j - i, dtype=torch.bool)
    if causal:
        visible = visible & (j <= i)
    if left >= 0:
        visible = visible & (i - j <= left)
    if right >= 0:
        visible = visible & (j - i <= right)
    return visible
