"""rms_norm: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.rms_norm import rms_norm as reference

__all__ = ["rms_norm"]


def _bwd_fake(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


_bwd = dispatch.define(
    "rms_norm_bwd",
    "(Tensor dy, Tensor? dh, Tensor x, Tensor weight, Tensor rstd, bool zero_centered) -> (Tensor dx, Tensor dweight)",
    _bwd_fake,
)


def _rows(x: torch.Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty((_rows(x),), dtype=torch.float32)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])


def _fwd_backward(ctx: Any, dy: torch.Tensor | None, _drstd: None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = _bwd.on(ctx.backend)(dy, None, x, weight, rstd, ctx.zero_centered)
    return dx, dweight, None, None


_fwd = dispatch.define(
    "rms_norm_fwd",
    "(Tensor x, Tensor weight, float eps, bool zero_centered) -> (Tensor y, Tensor rstd)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _add_fwd_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty((_rows(x),), dtype=torch.float32)


def _add_fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, _, weight, _, ctx.zero_centered = inputs
    _, h, rstd = output
    ctx.save_for_backward(h, weight, rstd)


def _add_fwd_backward(
    ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None, _drstd: None
) -> tuple[torch.Tensor | None, ...]:
    if dy is None:  # y was not used: the sum passes its gradient on
        return dh, dh, None, None, None
    h, weight, rstd = ctx.saved_tensors
    dx, dweight = _bwd.on(ctx.backend)(dy, dh, h, weight, rstd, ctx.zero_centered)
    return dx, dx, dweight, None, None


_add_fwd = dispatch.define(
    "add_rms_norm_fwd",
    "(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centered) -> (Tensor y, Tensor h, Tensor rstd)",
    _add_fwd_fake,
    setup_context=_add_fwd_setup,
    backward=_add_fwd_backward,
)


def _supports_native(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    zero_centered: bool = False,
) -> str | None:
    if weight.dtype == torch.float32:
        return dispatch.native_dtypes(x=x, residual=residual)
    return dispatch.native_dtypes(x=x, residual=residual, weight=weight)


ROW = dispatch.Row("rms_norm", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    zero_centered: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root mean square norm over the last dim: ``y = h * rsqrt(mean(h^2) + eps) * weight``.

    Args:
        x: ``(..., C)``, float32, bfloat16 or float16 (float64 on the reference); C up to 2^20.
        weight: ``(C,)``, float32 or the dtype of x.
        eps: added to the mean of squares, inside the root; >= 0.
        residual: same shape and dtype as x. Then ``h = x + residual``, rounded to that dtype, else ``h = x``.
        zero_centered: scale by ``1 + weight``.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``y`` like x; with a residual ``(y, h)``. The mean and the product are float32, rounded once at the end.
        Gradients reach x, weight and residual.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    checks.floating("x", x)
    checks.floating("weight", weight)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    checks.shape("weight", weight, (x.shape[-1],), "(C,)")
    checks.at_least("eps", eps, 0.0)
    if residual is not None:
        checks.floating("residual", residual, dtypes=(x.dtype,))
        checks.shape("residual", residual, x.shape, "of x")
    device = checks.same_device(x=x, weight=weight, residual=residual)
    chosen = ROW.choose(backend, device, x, weight, residual=residual)
    if chosen == "reference":
        return reference(x, weight, eps, residual=residual, zero_centered=zero_centered)
    if residual is None:
        return _fwd.on(chosen)(x, weight, eps, zero_centered)[0]
    y, h, _ = _add_fwd.on(chosen)(x, residual, weight, eps, zero_centered)
    return y, h
