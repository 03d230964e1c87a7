"""linear_cross_entropy: cross_entropy of x @ weight.T."""

from __future__ import annotations

import torch

from grokkernels.reference.cross_entropy import cross_entropy
from grokkernels.reference.precision import accumulation_dtype


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """x (N, C), weight (V, C), targets (N,) -> cross_entropy(x @ weight.T, targets, ...); the logits are not rounded.

    This plain form does hold the (N, V) logits. Ignored rows of x are not read.
    """
    acc = accumulation_dtype(x)
    x = x.to(acc).masked_fill((targets.long() == ignore_index).unsqueeze(1), 0)
    return cross_entropy(
        x @ weight.to(acc).T,
        targets,
        softcap=softcap,
        logit_scale=logit_scale,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=reduction,
    )
