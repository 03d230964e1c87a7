"""merge_attention_states: attention over a union of key sets, from the attention over each of the two."""

from __future__ import annotations

import torch

from grokkernels.reference.precision import accumulation_dtype


def merge_attention_states(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """o1, o2 (B,T,H,D), lse1, lse2 (B,H,T) -> o = sum_i exp(lse_i - lse) o_i, lse = log(exp(lse1) + exp(lse2)).

    A row where both are -inf gives output 0 and lse -inf, with gradient 0. A sink must be part of one state only.
    """
    acc = accumulation_dtype(o1)
    lse1, lse2 = lse1.to(acc), lse2.to(acc)
    top = torch.maximum(lse1, lse2).detach()
    top = top.masked_fill(top == -torch.inf, 0)
    weight1, weight2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    total = weight1 + weight2
    dead = total == 0
    total = total.masked_fill(dead, 1)
    share1, share2 = ((w / total).transpose(1, 2).unsqueeze(-1) for w in (weight1, weight2))  # (B,T,H,1)
    o = share1 * o1.to(acc) + share2 * o2.to(acc)
    return o.to(o1.dtype), (top + torch.log(total)).masked_fill(dead, -torch.inf)
