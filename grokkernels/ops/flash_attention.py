"""flash_attention: the contract, for batches of equal sequences and for packed ones (`_varlen`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.flash_attention import flash_attention as reference
from grokkernels.reference.flash_attention import flash_attention_varlen as reference_varlen

__all__ = ["flash_attention", "flash_attention_varlen"]

_MAX_DIM = 256

# The farthest positions of a first query. A side of a window that reaches twice as far is no limit.
_FAR = 2**28

# What both passes take after their tensors, in one order.
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? q_start, Tensor? sinks, Tensor? alibi_slopes, "
    "bool causal, float scale, float softcap, int left, int right, int temperature_len"
)
_SINKS = 6  # place of sinks among the arguments of the forward pass


def _bwd_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    top: torch.Tensor,
    inv: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    q_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    dsinks = q.new_empty((0 if sinks is None else sinks.shape[0],), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks


_bwd = dispatch.define(
    "flash_attention_bwd",
    f"(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor top, Tensor inv, {_OPTIONS}) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)",
    _bwd_fake,
)


def _fwd_fake(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *outer, queries, heads, _ = q.shape
    lse, top, inv = (q.new_empty((*outer, heads, queries), dtype=torch.float32) for _ in range(3))
    return q.new_empty((*outer, queries, heads, v.shape[-1])), lse, top, inv


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, *tensors = inputs[:8]
    ctx.options = inputs[8:]
    o, _, top, inv = output
    ctx.mark_non_differentiable(top, inv)
    ctx.save_for_backward(q, k, v, o, top, inv, *tensors)


def _fwd_backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None, *_: None) -> tuple[Any, ...]:
    gradients: list[Any] = [None] * (8 + len(ctx.options))
    if dout is None and dlse is None:
        return tuple(gradients)
    q, k, v, o, top, inv, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(o)
    dq, dk, dv, dsinks = _bwd.on(ctx.backend)(dout, dlse, q, k, v, o, top, inv, *tensors, *ctx.options)
    gradients[:3] = dq, dk, dv
    if tensors[_SINKS - 3] is not None:
        gradients[_SINKS] = dsinks
    return tuple(gradients)


_fwd = dispatch.define(
    "flash_attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor o, Tensor lse, Tensor top, Tensor inv)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
    constants=("alibi_slopes",),
)


def _supports_native(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **options: Any) -> str | None:
    return dispatch.native_dtypes(q=q, k=k, v=v)


ROW = dispatch.Row("flash_attention", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})
ROW_VARLEN = dispatch.Row(
    "flash_attention_varlen", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native}
)


# How q, k and v are laid out.
_DENSE = ("(B, T, H, D)", "(B, S, Hkv, D)", "(B, S, Hkv, Dv)")
_PACKED = ("(total_q, H, D)", "(total_k, Hkv, D)", "(total_k, Hkv, Dv)")


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forms: tuple[str, str, str]) -> None:
    """dtypes and shapes of q, k and v, which `forms` spells."""
    checks.floating("q", q)
    if q.dim() != forms[0].count(",") + 1:
        raise ValueError(f"q must have shape {forms[0]}, got {tuple(q.shape)}")
    checks.floating("k", k, dtypes=(q.dtype,))
    checks.floating("v", v, dtypes=(q.dtype,))
    *_, heads, dim = sizes = q.shape
    batch = sizes[:-3]  # (B,) or ()
    checks.shape("k", k, (*batch, None, None, dim), forms[1])
    *_, keys, kv_heads, _ = k.shape
    checks.shape("v", v, (*batch, keys, kv_heads, None), forms[2])
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"q must have a multiple of the heads of k, got H = {heads} and Hkv = {kv_heads}")
    for name, size in (("q", dim), ("v", v.shape[-1])):
        if not 1 <= size <= _MAX_DIM:
            raise ValueError(f"{name} must have a head dim from 1 to {_MAX_DIM}, got {size}")


def _check_options(
    q: torch.Tensor,
    batch: int,
    *,
    scale: float | None,
    softcap: float,
    window: tuple[int, int],
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    temperature_len: int,
    q_start: int | torch.Tensor | None,
    dropout_p: float,
    seed: int | None,
) -> None:
    """The options that both public functions take."""
    heads = q.shape[-2]
    if scale is not None and not -float("inf") < scale < float("inf"):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    checks.at_least("softcap", softcap, 0.0)
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be (left, right), -1 for no limit, got {window!r}")
    for side in window:
        if not isinstance(side, (int, torch.SymInt)) or side < -1:
            raise ValueError(f"window must hold two integers >= -1 (-1: no limit), got {window!r}")
    checks.integer("temperature_len", temperature_len, 0, 2**63 - 1)
    if temperature_len == 1:
        raise ValueError(f"temperature_len must be 0 (none) or at least 2, got {temperature_len!r}")
    widest = (torch.float32, torch.float64) if q.dtype == torch.float64 else (torch.float32,)
    if sinks is not None:
        checks.floating("sinks", sinks, dtypes=widest)
        checks.shape("sinks", sinks, (heads,), "(H,)")
    if alibi_slopes is not None:
        checks.floating("alibi_slopes", alibi_slopes, dtypes=widest)
        if alibi_slopes.dim() == 2:
            checks.shape("alibi_slopes", alibi_slopes, (batch, heads), "(B, H)")
        else:
            checks.shape("alibi_slopes", alibi_slopes, (heads,), "(H,)")
        if alibi_slopes.requires_grad:
            raise ValueError("alibi_slopes must not require a gradient: it is a constant here, detach it")
    if isinstance(q_start, torch.Tensor):
        checks.integers("q_start", q_start)
        checks.shape("q_start", q_start, (batch,), "(B,)")
        if not torch.compiler.is_compiling() and type(q_start) is torch.Tensor and q_start.is_cpu:
            for start in q_start.tolist():
                checks.integer("q_start", start, -_FAR, _FAR)
    elif q_start is not None:
        if not isinstance(q_start, (int, torch.SymInt)):
            raise TypeError(f"q_start must be None, an int or an integer tensor (B,), got {type(q_start).__name__}")
        checks.integer("q_start", q_start, -_FAR, _FAR)
    if dropout_p != 0.0:
        raise ValueError(f"dropout_p must be 0: attention dropout is not implemented, got {dropout_p!r}")
    if seed is not None:
        raise ValueError(f"seed must be None: it belongs to dropout, which is not implemented, got {seed!r}")


def _reach(window: tuple[int, int]) -> tuple[int, int]:
    """The window, -1 for a side that reaches past every key."""
    left, right = (-1 if side >= 2 * _FAR else side for side in window)
    return left, right


def _starts(q_start: int | torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor | None:
    """q_start as the kernels take it: int64 (B,), on their device."""
    if q_start is None:
        return None
    if isinstance(q_start, torch.Tensor):
        return q_start.to(torch.int64)
    return torch.full((batch,), q_start, dtype=torch.int64, device=device)


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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in O(T) memory: ``o = softmax(scores) v`` for each sequence and head.

    A score is ``scale * q.k``, then ``softcap * tanh(score / softcap)``, then the temperature's factor, then the ALiBi
    bias; keys outside the masks do not count. Query t stands at position ``i = t + S - T`` (the last query at the last
    key) or ``i = t + q_start``, key j at position j.

    Args:
        q: ``(B, T, H, D)``, float32, bfloat16 or float16 (float64 on the reference); D from 1 to 256. Any strides; only
            a tensor whose last dim is not dense is copied, here as in k and v (on CUDA also one whose rows do not
            begin at multiples of 16 bytes).
        k: ``(B, S, Hkv, D)``, dtype of q. H is a multiple of Hkv; query head h reads kv head ``h // (H / Hkv)``.
        v: ``(B, S, Hkv, Dv)``, dtype of q; Dv from 1 to 256.
        causal: a query sees the keys at ``j <= i``.
        scale: factor of q.k; None stands for ``D**-0.5``.
        softcap: bound of the scores, 0 for none.
        window: keys seen before and after position i, ``i - left <= j <= i + right``; -1, or 2**29 and
            more, for no limit on that side.
        sinks: ``(H,)`` float32, differentiable: ``exp(sink)`` joins each softmax's denominator.
        alibi_slopes: ``(H,)`` or ``(B, H)`` float32, without gradient: ``slope * |i - j|`` is subtracted.
        temperature_len: scores at positions ``i > temperature_len`` are multiplied by
            ``log2(i) / log2(temperature_len)``; 0 for none, else at least 2.
        q_start: position of the first query, an int or an integer tensor ``(B,)``; from -2**28 to 2**28 (a tensor on a
            device, or in a traced call, is not looked at).
        dropout_p: must be 0.
        seed: must be None; it belongs to dropout.
        deterministic: accepted for the sake of other libraries' callers; results repeat bit for bit in any case.
        return_lse: also return the logarithm of each softmax's denominator, sink included.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``o (B, T, H, Dv)`` in q's dtype, or ``(o, lse)`` with lse ``(B, H, T)`` float32, natural logarithm. A query
        that sees no key gives 0, and lse -inf (with a sink: the sink). Gradients reach q, k, v and sinks, through o and
        through lse. A query's result does not depend on the rest of the batch. An infinity or NaN in q, k or v reaches,
        on the reference and on the CPU, what it should through visible keys and nothing else. On cuda and triton all
        of that is not finite too, and more: it may pass into the gradients of keys that its query does not see, lse
        may be -inf instead of NaN, and an infinity may count as NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.

    Sources: Dao et al., "FlashAttention", 2022; Press et al., "Train short, test long" (ALiBi), 2021; softcap and
    temperature as in Grok-1 and Grok-2.
    """
    _check_tensors(q, k, v, _DENSE)
    _check_options(
        q,
        q.shape[0],
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        temperature_len=temperature_len,
        q_start=q_start,
        dropout_p=dropout_p,
        seed=seed,
    )
    starts = q_start if isinstance(q_start, torch.Tensor) else None
    device = checks.same_device(q=q, k=k, v=v, sinks=sinks, alibi_slopes=alibi_slopes, q_start=starts)
    chosen = ROW.choose(backend, device, q, k, v)
    if chosen == "reference":
        return reference(
            q,
            k,
            v,
            causal=causal,
            scale=scale,
            softcap=softcap,
            window=_reach(window),
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            temperature_len=temperature_len,
            q_start=q_start,
            return_lse=return_lse,
        )
    o, lse, _, _ = _fwd.on(chosen)(
        q,
        k,
        v,
        None,
        None,
        _starts(q_start, q.shape[0], q.device),
        sinks,
        alibi_slopes,
        causal,
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        *_reach(window),
        temperature_len,
    )
    return (o, lse) if return_lse else o


def _check_offsets(name: str, offsets: torch.Tensor, total: int, longest: int, longest_name: str) -> None:
    """cu_seqlens: starts at 0, never falls, stays within the tensor, no sequence longer than announced.

    Only where they are readable; the native function looks again.
    """
    if not checks.readable(offsets):
        return
    values = offsets.tolist()
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    lengths = [end - begin for begin, end in pairwise(values)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"{name} must not fall from one entry to the next, got {values}")
    if values[-1] > total:
        raise ValueError(f"{name} must end at the {total} rows of its tensor or before, got {values[-1]}")
    if max(lengths, default=0) > longest:
        raise ValueError(f"{longest_name} must be at least the longest sequence, {max(lengths)}, got {longest}")


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
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` on each of B sequences that lie packed one after the other.

    Args:
        q: ``(total_q, H, D)``, as in `flash_attention`.
        k: ``(total_k, Hkv, D)``.
        v: ``(total_k, Hkv, Dv)``.
        cu_seqlens_q: ``(B + 1,)`` int32, from 0 on: sequence b owns the rows ``cu_seqlens_q[b]`` to
            ``cu_seqlens_q[b + 1]`` of q. Sequences may be empty. Rows past the last one give 0, and lse -inf. On a GPU
            the values are not looked at beforehand: offsets outside the tensor are taken as its ends, and where
            offsets fall the results are undefined, but nothing outside the tensors is read or written.
        cu_seqlens_k: ``(B + 1,)`` int32, likewise for k and v.
        max_seqlen_q: length of the longest sequence of queries, or more.
        max_seqlen_k: length of the longest sequence of keys, or more.
        block_table: must be None: paged keys are not implemented.

    The other options are those of `flash_attention`, with T and S each sequence's own lengths.

    Returns:
        ``o (total_q, H, Dv)``, or ``(o, lse)`` with lse ``(H, total_q)`` float32.

    Raises:
        TypeError, ValueError: as `flash_attention`; offsets in host memory that fall or leave their tensor.
    """
    if block_table is not None:
        raise ValueError("block_table must be None: paged keys are not implemented")
    _check_tensors(q, k, v, _PACKED)
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        checks.floating(name, offsets, dtypes=(torch.int32,))
        if offsets.dim() != 1 or offsets.shape[0] == 0:
            raise ValueError(f"{name} must have shape (B + 1,), got {tuple(offsets.shape)}")
    batch = cu_seqlens_q.shape[0] - 1
    checks.shape("cu_seqlens_k", cu_seqlens_k, (batch + 1,), "(B + 1,)")
    _check_offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, "max_seqlen_q")
    _check_offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k, "max_seqlen_k")
    _check_options(
        q,
        batch,
        scale=scale,
        softcap=softcap,
        window=window,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        temperature_len=temperature_len,
        q_start=q_start,
        dropout_p=dropout_p,
        seed=seed,
    )
    device = checks.same_device(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        q_start=q_start if isinstance(q_start, torch.Tensor) else None,
    )
    chosen = ROW_VARLEN.choose(backend, device, q, k, v)
    if chosen == "reference":
        return reference_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal=causal,
            scale=scale,
            softcap=softcap,
            window=_reach(window),
            sinks=sinks,
            alibi_slopes=alibi_slopes,
            temperature_len=temperature_len,
            q_start=q_start,
            return_lse=return_lse,
        )
    o, lse, _, _ = _fwd.on(chosen)(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        _starts(q_start, batch, q.device),
        sinks,
        alibi_slopes,
        causal,
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        *_reach(window),
        temperature_len,
    )
    return (o, lse) if return_lse else o
