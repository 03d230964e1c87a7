"""adamw: one step of Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grokkernels.reference.precision import accumulation_dtype


@torch.no_grad()
def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    step: int,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_norm: float | None = None,
    maximize: bool = False,
    norm: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Update params and both moments in place; `step` counts from 1. Equal to torch.optim.AdamW's update.

    g <- g * min(1, max_norm / (norm + 1e-6)) if max_norm is given, norm = sqrt(sum of all g^2), and -g if maximize
    m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2
    p <- p (1 - lr weight_decay) - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)

    `norm` stands for that norm where these gradients are not all of them. Where it is not finite nothing is updated.
    Grads are left as they are. Returns the norm before clipping, () on grads' device, or None without max_norm.
    """
    clip: torch.Tensor | float = 1.0
    if max_norm is None:
        norm = None
    else:
        norm = global_norm(grads) if norm is None else norm
        if not torch.isfinite(norm):
            return norm
        clip = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for p, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        acc = accumulation_dtype(p)
        gradient = g.to(acc) * clip * (-1 if maximize else 1)
        first = beta1 * m.to(acc) + (1 - beta1) * gradient
        second = beta2 * v.to(acc) + (1 - beta2) * gradient.square()
        denominator = (second / (1 - beta2**step)).sqrt() + eps
        p.copy_(p.to(acc) * (1 - lr * weight_decay) - lr / (1 - beta1**step) * first / denominator)
        m.copy_(first)
        v.copy_(second)
    return norm


def global_norm(grads: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of all gradients as one vector: () float32, float64 if any gradient is; 0 for no gradient."""
    if not grads:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(g, dtype=accumulation_dtype(g)) for g in grads]
    widest = torch.float64 if any(n.dtype == torch.float64 for n in norms) else torch.float32
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device, widest) for n in norms]))
