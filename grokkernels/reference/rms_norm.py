"""rms_norm: y = h * rsqrt(mean(h^2) + eps) * weight, h = x + residual."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
    zero_centered: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """x (..., C), weight (C,), residual like x -> y, or (y, h) with a residual. Statistics in float32 or better."""
    h = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = weight.to(wide) + 1 if zero_centered else weight.to(wide)
    hw = h.to(wide)
    y = (hw * torch.rsqrt(hw.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)
    return y if residual is None else (y, h)
