"""grouped_mm: one matrix product per group of rows."""

from __future__ import annotations

import torch

from grokkernels.reference.precision import accumulation_dtype
from grokkernels.reference.values import known


def grouped_mm(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """x (M, K), w (E, K, N), offsets (E,) -> (M, N): rows offsets[e-1] .. offsets[e] of x, times w[e].

    offsets are the cumulative row counts (group e ends before row offsets[e]), as in torch's F.grouped_mm. Groups may
    be empty. Rows past offsets[-1] give 0 and get gradient 0.
    """
    acc = accumulation_dtype(x)
    groups, start = [], 0
    for expert, end in enumerate(offsets.tolist() if known(offsets) else [x.shape[0]] * w.shape[0]):
        groups.append((x[start:end].to(acc) @ w[expert].to(acc)).to(x.dtype))
        start = end
    groups.append(x.new_zeros(x.shape[0] - start, w.shape[2]))
    return torch.cat(groups)
