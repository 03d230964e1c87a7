"""moe_gate: which experts each token goes to, with which weights, and the two losses that keep the gate in shape.

Per token: z = softcap * tanh(logits / softcap) (after the jitter), scores p = softmax(z) or sigmoid(z). The experts are
the K with the largest p + bias (topk_then_softmax: largest z + bias), the lower index first among equals; the weights
come from p without the bias (topk_then_softmax: softmax over the K chosen z).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from grokkernels.reference.philox import uniform
from grokkernels.reference.precision import accumulation_dtype


class Routing(NamedTuple):
    """What moe_gate returns and moe_experts takes."""

    weights: torch.Tensor  # (N, K) float32
    indices: torch.Tensor  # (N, K) int32, the largest score first; -1: nowhere
    tokens_per_expert: torch.Tensor  # (E,) int32
    load_balance_loss: torch.Tensor  # () float32
    z_loss: torch.Tensor  # () float32


def moe_gate(
    logits: torch.Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    softcap: float = 0.0,
    bias: torch.Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    renormalize: bool = False,
    routed_scale: float = 1.0,
    order: str = "softmax_then_topk",
    jitter: float = 0.0,
    seed: int | None = None,
) -> Routing:
    """logits (..., E), flattened to (N, E) -> Routing.

    - jitter multiplies logit number m = n*E + e by 1 + jitter * (2 u_m - 1), u_m = philox.uniform(m, seed).
    - num_groups: experts lie in groups of E/num_groups neighbours; only experts of the topk_groups best groups can be
      chosen. A group's score is the sum of its two best p + bias when there is a bias (DeepSeek-V3, arXiv:2412.19437),
      and its best p when there is none (DeepSeek-V2, arXiv:2405.04434).
    - renormalize divides the weights by max(their sum, 1e-20); routed_scale multiplies them last.
    - load_balance_loss = E * sum_e f_e * P_e, f_e = count_e / (N K), P_e = the mean over tokens of p (for sigmoid:
      p / sum p) (Switch Transformer, arXiv:2101.03961). z_loss = mean logsumexp(z)^2 (ST-MoE, arXiv:2202.08906).
    - A token whose logsumexp(z) is not finite (a NaN among its logits, or no usable one) routes nowhere: indices -1,
      weights 0, gradient 0; N counts the other tokens. With no token at all both losses are 0.
    Gradients reach the logits through weights and losses, never the bias.
    """
    if scoring not in ("softmax", "sigmoid"):
        raise ValueError(f"scoring must be 'softmax' or 'sigmoid', got {scoring!r}")
    if order not in ("softmax_then_topk", "topk_then_softmax"):
        raise ValueError(f"order must be 'softmax_then_topk' or 'topk_then_softmax', got {order!r}")
    topk_first = order == "topk_then_softmax"
    if topk_first and scoring == "sigmoid":
        raise ValueError("order 'topk_then_softmax' needs scoring 'softmax', got 'sigmoid'")
    experts = logits.shape[-1]
    z = logits.to(accumulation_dtype(logits)).reshape(-1, experts)
    if jitter:
        if seed is None:
            raise ValueError("seed must be an int when jitter is not 0, got None")
        index = torch.arange(z.numel(), device=z.device).view_as(z)
        z = z * (1 + jitter * (2 * uniform(index, seed, z.dtype) - 1))
    routed = torch.logsumexp(_cap(z.detach(), softcap), dim=-1, keepdim=True).isfinite()  # (N, 1)
    z = _cap(torch.where(routed, z, 0), softcap)

    p = torch.sigmoid(z) if scoring == "sigmoid" else torch.softmax(z, dim=-1)
    choice = (z if topk_first else p).detach()
    if bias is not None:
        choice = choice + bias.detach().to(choice.dtype)
    if num_groups > 1:
        choice = _limit_groups(choice, num_groups, topk_groups, 2 if bias is not None else 1)
    indices = _largest(choice, top_k)

    weights = torch.softmax(z.gather(1, indices), dim=-1) if topk_first else p.gather(1, indices)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-20)
    weights = (weights * routed_scale).masked_fill(~routed, 0)

    tokens = routed.sum().clamp(min=1)
    indices = indices.masked_fill(~routed, -1)
    counts = (indices.unsqueeze(-1) == torch.arange(experts, device=z.device)).sum(dim=(0, 1))
    share = p / p.sum(dim=-1, keepdim=True).clamp(min=1e-20) if scoring == "sigmoid" else p
    mean_share = share.masked_fill(~routed, 0).sum(dim=0) / tokens
    fraction = counts.to(p.dtype) / (tokens * top_k)  # two integers would divide in float32, for the oracle too
    load_balance_loss = experts * (fraction * mean_share).sum()
    z_loss = torch.logsumexp(z, dim=-1).square().masked_fill(~routed[:, 0], 0).sum() / tokens
    return Routing(weights, indices.int(), counts.int(), load_balance_loss, z_loss)


def _cap(z: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(z / softcap) if softcap > 0 else z


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of the last dim, the lower first among equals (torch.topk leaves it open)."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def _limit_groups(choice: torch.Tensor, num_groups: int, topk_groups: int, best: int) -> torch.Tensor:
    """choice (N, E) with -inf outside each token's best groups."""
    grouped = choice.unflatten(-1, (num_groups, -1))
    group_scores = grouped.sort(dim=-1, descending=True).values[..., :best].sum(dim=-1)
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter(1, _largest(group_scores, topk_groups), True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
