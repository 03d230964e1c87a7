"""gated_activation: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.gated_activation import gated_activation as reference

__all__ = ["gated_activation"]

KINDS = ("gelu_tanh", "gelu", "silu", "relu")  # in the order of csrc/gated_activation.h


def _bwd_fake(dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


_bwd = dispatch.define(
    "gated_activation_bwd", "(Tensor dy, Tensor gate, Tensor up, int kind) -> (Tensor dgate, Tensor dup)", _bwd_fake
)


def _fwd_fake(gate: torch.Tensor, up: torch.Tensor, kind: int) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _fwd_backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None
    gate, up = ctx.saved_tensors
    return *_bwd.on(ctx.backend)(dy, gate, up, ctx.kind), None


_fwd = dispatch.define(
    "gated_activation_fwd",
    "(Tensor gate, Tensor up, int kind) -> Tensor",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _supports_native(gate: torch.Tensor, up: torch.Tensor, kind: str = "gelu_tanh") -> str | None:
    return dispatch.native_dtypes(gate=gate, up=up)


ROW = dispatch.Row("gated_activation", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})


def gated_activation(
    gate: torch.Tensor, up: torch.Tensor, kind: str = "gelu_tanh", *, backend: str | None = None
) -> torch.Tensor:
    """A gated linear unit after its two projections: ``act(gate) * up``.

    Args:
        gate: ``(..., C)``, float32, bfloat16 or float16 (float64 on the reference). Rows may lie any even distance
            apart: the two halves of one tensor are read where they are.
        up: same shape and dtype as gate.
        kind: the activation, with g = gate:
            "gelu_tanh" ``g/2 (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))``, "gelu" ``g/2 (1 + erf(g/sqrt(2)))``,
            "silu" ``g / (1 + e^-g)``, "relu" ``max(g, 0)`` with slope 0 at 0.
        backend: who computes; see `grokkernels.use`.

    Returns:
        A tensor like gate, computed in float32 and rounded once. Gradients reach gate and up. At an infinite gate
        act and its slope are their limits: 0 and 0 below, gate and 1 above (where torch's own give NaN). The gradient
        of gate is the product ``dy * up * act'(gate)``: where the slope is 0 an infinite or NaN up gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, an unknown kind, or a backend that
            cannot run it.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    checks.floating("gate", gate)
    checks.floating("up", up, dtypes=(gate.dtype,))
    if gate.dim() == 0:
        raise ValueError("gate must have at least one dimension, got a scalar")
    checks.shape("up", up, gate.shape, "of gate")
    checks.choice("kind", kind, KINDS)
    device = checks.same_device(gate=gate, up=up)
    chosen = ROW.choose(backend, device, gate, up)
    if chosen == "reference":
        return reference(gate, up, kind)
    return _fwd.on(chosen)(gate, up, KINDS.index(kind))
