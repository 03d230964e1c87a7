"""moe_experts: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

import math
from typing import Any

import torch

from grokkernels import derivatives, dispatch
from grokkernels.ops import checks
from grokkernels.ops.moe_permute import int32_indices
from grokkernels.reference.moe_experts import moe_experts as reference
from grokkernels.reference.moe_gate import Routing

__all__ = ["moe_experts"]

# As csrc/common/activation.h numbers them.
ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu")

Tensors = tuple[torch.Tensor, ...]


def _bwd_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    activation: int,
) -> Tensors:
    return tuple(t.new_empty(t.shape) for t in (x, gate_proj, up_proj, down_proj, weights))


_bwd = dispatch.define(
    "moe_experts_bwd",
    "(Tensor dy, Tensor x, Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor weights, Tensor gate, Tensor up, "
    "Tensor slots, Tensor offsets, int activation) -> "
    "(Tensor dx, Tensor dgate_proj, Tensor dup_proj, Tensor ddown_proj, Tensor dweights)",
    _bwd_fake,
)


def _fwd_fake(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    activation: int,
    capacity: int | None,
    keep: bool,
) -> Tensors:
    kept = (indices.shape[0] * indices.shape[1] if keep else 0, gate_proj.shape[1])
    slots, offsets = indices.new_empty(indices.shape), indices.new_empty((gate_proj.shape[0],))
    return x.new_empty(x.shape), x.new_empty(kept), x.new_empty(kept), slots, offsets


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _indices, ctx.activation, _capacity, _keep = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _fwd_backward(ctx: Any, dy: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    return *_bwd.on(ctx.backend)(dy, *ctx.saved_tensors, ctx.activation), None, None, None, None


_fwd = dispatch.define(
    "moe_experts_fwd",
    "(Tensor x, Tensor gate_proj, Tensor up_proj, Tensor down_proj, Tensor weights, Tensor indices, int activation, "
    "int? capacity, bool keep) -> (Tensor y, Tensor gate, Tensor up, Tensor slots, Tensor offsets)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _supports_native(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    routing: Routing,
    *,
    activation: str = "gelu_tanh",
    capacity_factor: float | None = None,
) -> str | None:
    if routing.weights.dtype != torch.float32:
        return f"routing.weights is {routing.weights.dtype}; float32 is supported"
    return dispatch.native_dtypes(x=x, gate_proj=gate_proj, up_proj=up_proj, down_proj=down_proj)


ROW = dispatch.Row("moe_experts", dict.fromkeys(("cpu", "cuda", "triton"), _supports_native))


def moe_experts(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    routing: Routing,
    *,
    activation: str = "gelu_tanh",
    capacity_factor: float | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """A routed mixture of gated feed-forward networks: ``y_n = sum_k w_nk * down_e(act(gate_e x_n) * up_e x_n)``.

    Args:
        x: ``(..., C)``, the N tokens; float32, bfloat16 or float16 (float64 on the reference).
        gate_proj, up_proj: ``(E, F, C)``, the dtype of x, any strides.
        down_proj: ``(E, C, F)``, the dtype of x, any strides.
        routing: from `moe_gate`: of it ``weights (N, K)`` float32 and ``indices (N, K)`` int32 or int64 are read. An
            index outside ``[0, E)`` adds nothing.
        activation: "gelu_tanh", "gelu" (erf), "silu" or "relu".
        capacity_factor: an expert takes its first ``ceil(capacity_factor * N * K / E)`` tokens and drops the rest.
            None: none is dropped.
        backend: who computes; see `grokkernels.use`.

    Returns:
        Like x. Products are summed in float32; act(gate) * up is rounded to the dtype of x between them, and the sum
        over k, in the order k = 0, 1, ..., is rounded once: bitwise repeatable. Gradients reach x, the three weights
        (zero where an expert got no token) and routing.weights. The backward pass keeps gate and up, ``(N*K, F)`` each.
        Float32 products are made of several narrower ones on cuda, where an infinity gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.

    Source: Shazeer et al., "Outrageously Large Neural Networks", 2017; Shazeer, "GLU Variants", 2020.
    """
    checks.floating("x", x)
    if x.dim() == 0:
        raise ValueError("x must have at least one dimension, got a scalar")
    for name, tensor in (("gate_proj", gate_proj), ("up_proj", up_proj), ("down_proj", down_proj)):
        checks.floating(name, tensor, dtypes=(x.dtype,))
    cols = x.shape[-1]
    checks.shape("gate_proj", gate_proj, (None, None, cols), "(E, F, C)")
    experts, hidden_cols, _ = gate_proj.shape
    if experts == 0 or cols == 0:
        raise ValueError(f"gate_proj must have E >= 1 and C >= 1, got {tuple(gate_proj.shape)}")
    checks.shape("up_proj", up_proj, (experts, hidden_cols, cols), "(E, F, C)")
    checks.shape("down_proj", down_proj, (experts, cols, hidden_cols), "(E, C, F)")
    weights, indices = routing.weights, routing.indices
    checks.floating("routing.weights", weights, dtypes=(torch.float32, torch.float64))
    checks.integers("routing.indices", indices)
    checks.shape("routing.indices", indices, (x.numel() // cols, None), "(N, K)")
    checks.shape("routing.weights", weights, indices.shape, "of routing.indices")
    checks.choice("activation", activation, ACTIVATIONS)
    capacity = None
    if capacity_factor is not None:
        checks.at_least("capacity_factor", capacity_factor, 0.0)
        capacity = math.ceil(min(capacity_factor * indices.numel() / experts, indices.numel()))
    tensors = {"x": x, "gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj}
    device = checks.same_device(**tensors, **{"routing.weights": weights, "routing.indices": indices})
    options: dict[str, Any] = {"activation": activation, "capacity_factor": capacity_factor}
    chosen = ROW.choose(backend, device, *tensors.values(), routing, **options)
    if chosen == "reference":
        return reference(*tensors.values(), routing, **options)
    keep = derivatives.wanted(*tensors.values(), weights)
    y, *_ = _fwd.on(chosen)(
        x.reshape(-1, cols),
        gate_proj,
        up_proj,
        down_proj,
        weights,
        int32_indices(indices, experts),
        ACTIVATIONS.index(activation),
        capacity,
        keep,
    )
    return y.view(x.shape)
