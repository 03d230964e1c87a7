"""gated_activation: act(gate) * up, the gated linear units of Shazeer 2020 (arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from grokkernels.reference.precision import accumulation_dtype

ACTIVATIONS = {
    # g/2 * (1 + tanh(sqrt(2/pi) * (g + 0.044715 g^3)))
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    # g/2 * (1 + erf(g / sqrt(2)))
    "gelu": F.gelu,
    # g * sigmoid(g)
    "silu": F.silu,
    # max(g, 0), with derivative 0 at 0, written so that the derivative is a factor: 0 times a NaN is NaN
    "relu": lambda gate: gate * ~(gate <= 0),
}


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str = "gelu_tanh") -> torch.Tensor:
    """gate, up of one shape -> act(gate) * up, the same shape, in gate's dtype."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"kind must be one of {', '.join(ACTIVATIONS)}, got {kind!r}")
    acc = accumulation_dtype(gate)
    return (_activation(gate.to(acc), kind) * up.to(acc)).to(gate.dtype)


def _activation(gate: torch.Tensor, kind: str) -> torch.Tensor:
    """act(gate), with its limits, 0 and gate, where terms of the formula overflow; so too its derivative, 0 and 1."""
    high, low = gate > 1e4, gate < -1e4
    value = ACTIVATIONS[kind](gate.masked_fill(high | low, 0))
    return torch.where(high, gate, value)
