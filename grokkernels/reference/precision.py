"""The dtype that the reference computes in."""

from __future__ import annotations

import torch


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for every other dtype."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
