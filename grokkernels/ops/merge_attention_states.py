"""merge_attention_states: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.merge_attention_states import merge_attention_states as reference

__all__ = ["merge_attention_states"]


def _bwd_fake(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    o1: torch.Tensor,
    lse1: torch.Tensor,
    o2: torch.Tensor,
    lse2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return o1.new_empty(o1.shape), o1.new_empty(o1.shape), lse1.new_empty(lse1.shape), lse2.new_empty(lse2.shape)


_bwd = dispatch.define(
    "merge_attention_states_bwd",
    "(Tensor dout, Tensor? dlse, Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) "
    "-> (Tensor do1, Tensor do2, Tensor dlse1, Tensor dlse2)",
    _bwd_fake,
)


def _fwd_fake(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _fwd_backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dout is None and dlse is None:
        return None, None, None, None
    o1, lse1, o2, lse2 = ctx.saved_tensors
    if dout is None:  # o was not used
        dout = torch.zeros_like(o1)
    do1, do2, dlse1, dlse2 = _bwd.on(ctx.backend)(dout, dlse, o1, lse1, o2, lse2)
    return do1, dlse1, do2, dlse2


_fwd = dispatch.define(
    "merge_attention_states_fwd",
    "(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor o, Tensor lse)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _supports_native(o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor) -> str | None:
    if lse1.dtype != torch.float32 or lse2.dtype != torch.float32:
        return f"lse1 is {lse1.dtype} and lse2 {lse2.dtype}; float32 is supported"
    return dispatch.native_dtypes(o1=o1, o2=o2)


ROW = dispatch.Row(
    "merge_attention_states", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native}
)


def merge_attention_states(
    o1: torch.Tensor,
    lse1: torch.Tensor,
    o2: torch.Tensor,
    lse2: torch.Tensor,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the attention over each: cascade, ring, split caches.

    ``o = sum_i exp(lse_i - lse) o_i`` with ``lse = log(exp(lse1) + exp(lse2))``.

    Args:
        o1, o2: ``(B, T, H, D)``, float32, bfloat16 or float16 (float64 on the reference), both alike, any strides.
        lse1, lse2: ``(B, H, T)``, float32 (with float64 outputs float64): natural logarithms, -inf for a row without
            keys. A sink must be part of one of the two states only.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``(o, lse)``, like o1 and lse1. A row that is -inf in both has output 0 and lse -inf, and its gradients are 0.
        Gradients reach all four arguments.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.

    Source: the merge of partial softmaxes, Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    checks.floating("o1", o1)
    checks.shape("o1", o1, (None,) * 4, "(B, T, H, D)")
    checks.floating("o2", o2, dtypes=(o1.dtype,))
    checks.shape("o2", o2, o1.shape, "of o1")
    statistics = (torch.float32, torch.float64) if o1.dtype == torch.float64 else (torch.float32,)
    batch, tokens, heads, _ = o1.shape
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        checks.floating(name, lse, dtypes=statistics)
        checks.shape(name, lse, (batch, heads, tokens), "(B, H, T)")
    device = checks.same_device(o1=o1, lse1=lse1, o2=o2, lse2=lse2)
    chosen = ROW.choose(backend, device, o1, lse1, o2, lse2)
    if chosen == "reference":
        return reference(o1, lse1, o2, lse2)
    return _fwd.on(chosen)(o1, lse1, o2, lse2)
