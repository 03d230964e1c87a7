"""cross_entropy: the loss of a language model's logits."""

from __future__ import annotations

import torch

from grokkernels.reference.precision import accumulation_dtype


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """logits (N, V), targets (N,) int64 or int32 -> () or, for reduction "none", (N,); float32, or float64 like logits.

    z = logit_scale * logits, then softcap * tanh(z / softcap) if softcap > 0.
    loss_n = -sum_v q_v log softmax(z)_v + z_loss * logsumexp(z)^2,
    with q = (1 - label_smoothing) * onehot(target) + label_smoothing / V.
    Rows whose target is ignore_index give 0; "mean" divides by the number of the others, and is 0 if there are none.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    counted = targets.long() != ignore_index
    z = logits.to(accumulation_dtype(logits)).masked_fill(~counted.unsqueeze(1), 0) * logit_scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, dim=-1)
    target = z.gather(1, targets.long().masked_fill(~counted, 0).unsqueeze(1)).squeeze(1)
    if label_smoothing > 0:
        target = (1 - label_smoothing) * target + label_smoothing * z.mean(dim=-1)
    loss = (lse - target + z_loss * lse.square()).masked_fill(~counted, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum().clamp(min=1)
