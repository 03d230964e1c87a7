"""rms_norm: y = x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

import torch

from grokkernels.reference.precision import accumulation_dtype


def normalize(x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool) -> torch.Tensor:
    """The formula itself, on x (..., C) that already has the accumulation dtype. The result is not rounded."""
    rstd = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    scale = weight.to(x.dtype)
    return x * rstd * (1 + scale if zero_centered else scale)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    zero_centered: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x (..., C), weight (C,) -> y (..., C); with a residual (..., C): (y, h), h = x + residual, y = rms_norm(h).

    `zero_centered` multiplies by 1 + weight. y is made from h as returned, that is rounded to x's dtype, so the fused
    form equals the addition followed by the norm.
    """
    acc = accumulation_dtype(x)
    if residual is None:
        return normalize(x.to(acc), weight, eps, zero_centered).to(x.dtype)
    h = (x.to(acc) + residual.to(acc)).to(x.dtype)
    return normalize(h.to(acc), weight, eps, zero_centered).to(x.dtype), h
