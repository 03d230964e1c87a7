"""dual_rms_norm: the seam between two sandwich-normed branches (post-norm, residual addition, next pre-norm)."""

from __future__ import annotations

import torch

from grokkernels.reference.precision import accumulation_dtype
from grokkernels.reference.rms_norm import normalize


def dual_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    eps: float = 1e-5,
    *,
    zero_centered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual (..., C), weights (C,) -> (y, h), both (..., C) in x's dtype.

    h = residual + rms_norm(x, post_weight) and y = rms_norm(h, pre_weight). The inner norm is not rounded before the
    addition; y is made from h as returned (rounded).
    """
    acc = accumulation_dtype(x)
    h = (residual.to(acc) + normalize(x.to(acc), post_weight, eps, zero_centered)).to(x.dtype)
    return normalize(h.to(acc), pre_weight, eps, zero_centered).to(x.dtype), h
