"""moe_permute and moe_unpermute: token order to expert order, and back as a weighted sum."""

from __future__ import annotations

import torch

from grokkernels.reference.precision import accumulation_dtype


def moe_permute(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, *, capacity: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (N, C), indices (N, K) -> rows (N*K, C), slots (N, K) int32, offsets (E,) int32.

    rows holds a copy of x[n] for each (n, k), ordered by expert, then n, then k; group e ends before row offsets[e].
    slots[n, k] is the row of (n, k), or -1 where it is dropped: its index is outside [0, E), or `capacity` earlier
    (n, k) chose the same expert. Rows past offsets[-1] are zero.
    """
    top_k = indices.shape[1]
    expert = indices.reshape(-1).long()
    chosen = expert.unsqueeze(1) == torch.arange(num_experts, device=x.device)  # (N*K, E)
    if capacity is not None:
        chosen = chosen & (chosen.cumsum(dim=0) <= capacity)
    kept = chosen.any(dim=1)
    group = torch.where(kept, expert, num_experts)
    order = group.argsort(stable=True)  # row -> (n, k); the dropped ones come last
    slots = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=x.device))
    rows = x[order // top_k].masked_fill(~kept[order].unsqueeze(1), 0)
    return rows, slots.masked_fill(~kept, -1).view_as(indices).int(), chosen.sum(dim=0).cumsum(dim=0).int()


def moe_unpermute(y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """y (N*K, C), weights (N, K), slots (N, K) -> (N, C): sum over k, in order, of weights[n,k] * y[slots[n,k]].

    A slot of -1 adds nothing.
    """
    acc = accumulation_dtype(y)
    tokens, top_k = slots.shape
    out = torch.zeros(tokens, y.shape[1], dtype=acc, device=y.device)
    for k in range(top_k):
        slot = slots[:, k].long()
        weight = weights[:, k].to(acc).masked_fill(slot < 0, 0).unsqueeze(1)
        out = out + weight * y[slot.clamp(min=0)].to(acc).masked_fill(slot.unsqueeze(1) < 0, 0)
    return out.to(y.dtype)
