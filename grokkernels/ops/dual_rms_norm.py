"""dual_rms_norm: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.dual_rms_norm import dual_rms_norm as reference

__all__ = ["dual_rms_norm"]

_Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _bwd_fake(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    x: torch.Tensor,
    h: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    post_rstd: torch.Tensor,
    pre_rstd: torch.Tensor,
    zero_centered: bool,
) -> _Four:
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        post_weight.new_empty(post_weight.shape),
        pre_weight.new_empty(pre_weight.shape),
    )


_bwd = dispatch.define(
    "dual_rms_norm_bwd",
    "(Tensor dy, Tensor? dh, Tensor x, Tensor h, Tensor post_weight, Tensor pre_weight, Tensor post_rstd, "
    "Tensor pre_rstd, bool zero_centered) -> (Tensor dx, Tensor dresidual, Tensor dpost_weight, Tensor dpre_weight)",
    _bwd_fake,
)


def _fwd_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    eps: float,
    zero_centered: bool,
) -> _Four:
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape), *rstd


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, _, post_weight, pre_weight, _, ctx.zero_centered = inputs
    _, h, post_rstd, pre_rstd = output
    ctx.save_for_backward(x, h, post_weight, pre_weight, post_rstd, pre_rstd)


def _fwd_backward(
    ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None, _dpost_rstd: None, _dpre_rstd: None
) -> tuple[torch.Tensor | None, ...]:
    if dy is None and dh is None:
        return None, None, None, None, None, None
    saved = ctx.saved_tensors
    if dy is None:  # y was not used: nothing comes through the pre-norm
        dy = torch.zeros_like(saved[0])
    return *_bwd.on(ctx.backend)(dy, dh, *saved, ctx.zero_centered), None, None


_fwd = dispatch.define(
    "dual_rms_norm_fwd",
    "(Tensor x, Tensor residual, Tensor post_weight, Tensor pre_weight, float eps, bool zero_centered) "
    "-> (Tensor y, Tensor h, Tensor post_rstd, Tensor pre_rstd)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _supports_native(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
) -> str | None:
    if post_weight.dtype != pre_weight.dtype:
        return f"post_weight is {post_weight.dtype} and pre_weight {pre_weight.dtype}; they must agree"
    if post_weight.dtype == torch.float32:
        return dispatch.native_dtypes(x=x, residual=residual)
    return dispatch.native_dtypes(x=x, residual=residual, post_weight=post_weight)


ROW = dispatch.Row("dual_rms_norm", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})


def dual_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The seam of a sandwich-normed block: a branch's post-norm, the residual addition, the next branch's pre-norm.

    ``h = residual + rms_norm(x, post_weight)``, ``y = rms_norm(h, pre_weight)``, in one pass over memory.

    Args:
        x: ``(..., C)``, what a branch (attention, experts) gives: float32, bfloat16 or float16 (float64 on the
            reference).
        residual: same shape and dtype as x.
        post_weight, pre_weight: ``(C,)``, float32 or the dtype of x; a native backend wants both alike.
        eps: added to each mean of squares, inside the root; >= 0.
        zero_centered: scale by ``1 + weight`` in both norms.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``(y, h)``, both like x. The post-norm is not rounded before the addition; y is made from h as returned
        (rounded). Gradients reach x, residual and both weights.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; the arrangement is that of Grok-1.
    """
    checks.floating("x", x)
    checks.floating("residual", residual, dtypes=(x.dtype,))
    checks.floating("post_weight", post_weight)
    checks.floating("pre_weight", pre_weight)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    checks.shape("residual", residual, x.shape, "of x")
    checks.shape("post_weight", post_weight, (x.shape[-1],), "(C,)")
    checks.shape("pre_weight", pre_weight, (x.shape[-1],), "(C,)")
    checks.at_least("eps", eps, 0.0)
    device = checks.same_device(x=x, residual=residual, post_weight=post_weight, pre_weight=pre_weight)
    chosen = ROW.choose(backend, device, x, residual, post_weight, pre_weight)
    if chosen == "reference":
        return reference(x, residual, post_weight, pre_weight, eps, zero_centered=zero_centered)
    y, h, _, _ = _fwd.on(chosen)(x, residual, post_weight, pre_weight, eps, zero_centered)
    return y, h
