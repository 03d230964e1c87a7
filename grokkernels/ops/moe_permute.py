"""moe_permute and moe_unpermute: the contract. What they take, what comes back, derivatives, backends."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.moe_permute import moe_permute as permute_reference
from grokkernels.reference.moe_permute import moe_unpermute as unpermute_reference

__all__ = ["moe_permute", "moe_unpermute"]


def _permute_bwd_fake(drows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return drows.new_empty((slots.shape[0], drows.shape[1]))


_permute_bwd = dispatch.define("moe_permute_bwd", "(Tensor drows, Tensor slots) -> Tensor", _permute_bwd_fake)


def _permute_fake(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = x.new_empty((indices.shape[0] * indices.shape[1], x.shape[1]))
    return rows, indices.new_empty(indices.shape), indices.new_empty((num_experts,))


def _permute_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])


def _permute_backward(ctx: Any, drows: torch.Tensor | None, *_: None) -> tuple[torch.Tensor | None, ...]:
    dx = None if drows is None else _permute_bwd.on(ctx.backend)(drows, *ctx.saved_tensors)
    return dx, None, None, None


_permute = dispatch.define(
    "moe_permute_fwd",
    "(Tensor x, Tensor indices, int num_experts, int? capacity) -> (Tensor rows, Tensor slots, Tensor offsets)",
    _permute_fake,
    setup_context=_permute_setup,
    backward=_permute_backward,
)


def _unpermute_bwd_fake(
    dout: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return y.new_empty(y.shape), weights.new_empty(weights.shape)


_unpermute_bwd = dispatch.define(
    "moe_unpermute_bwd",
    "(Tensor dout, Tensor y, Tensor weights, Tensor slots) -> (Tensor dy, Tensor dweights)",
    _unpermute_bwd_fake,
)


def _unpermute_fake(y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return y.new_empty((slots.shape[0], y.shape[1]))


def _unpermute_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _unpermute_backward(ctx: Any, dout: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dout is None:
        return None, None, None
    return *_unpermute_bwd.on(ctx.backend)(dout, *ctx.saved_tensors), None


_unpermute = dispatch.define(
    "moe_unpermute_fwd",
    "(Tensor y, Tensor weights, Tensor slots) -> Tensor",
    _unpermute_fake,
    setup_context=_unpermute_setup,
    backward=_unpermute_backward,
)


def _permute_supports_native(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, *, capacity: int | None = None
) -> str | None:
    return dispatch.native_dtypes(x=x)


def _unpermute_supports_native(y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> str | None:
    if weights.dtype != torch.float32:
        return f"weights is {weights.dtype}; float32 is supported"
    return dispatch.native_dtypes(y=y)


PERMUTE = dispatch.Row("moe_permute", dict.fromkeys(("cpu", "cuda", "triton"), _permute_supports_native))
UNPERMUTE = dispatch.Row("moe_unpermute", dict.fromkeys(("cpu", "cuda", "triton"), _unpermute_supports_native))


def int32_indices(indices: torch.Tensor, num_experts: int) -> torch.Tensor:
    """The indices as int32, where those of int64 that do not fit become a number outside [0, num_experts) too."""
    return indices if indices.dtype == torch.int32 else indices.clamp(-1, num_experts).int()


def moe_permute(
    x: torch.Tensor,
    indices: torch.Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Copies each token to the rows of the experts it goes to: the order that `grouped_mm` takes.

    The order is stable: by expert, then token, then k.

    Args:
        x: ``(N, C)``, float32, bfloat16 or float16 (float64 on the reference).
        indices: ``(N, K)`` int32 or int64, the experts of each token. One outside ``[0, num_experts)`` drops the pair
            (n, k); `moe_gate` writes -1 for a token that goes nowhere.
        num_experts: E.
        capacity: the most rows of one expert; those of later tokens are dropped. None: no limit.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``rows (N*K, C)``, zero past the last one used; ``slots (N, K)`` int32, the row of each (n, k), -1 when
        dropped; ``offsets (E,)`` int32, the row where each expert's group ends. Gradients reach x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.
    """
    checks.floating("x", x)
    checks.integers("indices", indices)
    checks.shape("indices", indices, (None, None), "(N, K)")
    checks.shape("x", x, (indices.shape[0], None), "(N, C)")
    checks.integer("num_experts", num_experts, 1, 2**31 - 1)
    if capacity is not None:
        checks.integer("capacity", capacity, 0, 2**63 - 1)
    device = checks.same_device(x=x, indices=indices)
    chosen = PERMUTE.choose(backend, device, x, indices, num_experts, capacity=capacity)
    if chosen == "reference":
        return permute_reference(x, indices, num_experts, capacity=capacity)
    return _permute.on(chosen)(x, int32_indices(indices, num_experts), num_experts, capacity)


def moe_unpermute(
    y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, *, backend: str | None = None
) -> torch.Tensor:
    """Back to token order, as a weighted sum: ``out[n] = sum_k weights[n,k] * y[slots[n,k]]``.

    Args:
        y: ``(N*K, C)``, rows in expert order; float32, bfloat16 or float16 (float64 on the reference).
        weights: ``(N, K)`` float32.
        slots: ``(N, K)`` int32 from `moe_permute`: no row twice, and -1 for a pair that adds nothing.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``(N, C)`` in the dtype of y, summed in float32 in the order k = 0, 1, ... and rounded once. Gradients reach y,
        whose rows that no slot names get 0, and weights.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or a backend that cannot run it.
    """
    checks.floating("y", y)
    checks.floating("weights", weights, dtypes=(torch.float32, torch.float64))
    checks.floating("slots", slots, dtypes=(torch.int32,))
    checks.shape("slots", slots, (None, None), "(N, K)")
    checks.shape("weights", weights, slots.shape, "of slots")
    checks.shape("y", y, (slots.numel(), None), "(N*K, C)")
    device = checks.same_device(y=y, weights=weights, slots=slots)
    chosen = UNPERMUTE.choose(backend, device, y, weights, slots)
    if chosen == "reference":
        return unpermute_reference(y, weights, slots)
    return _unpermute.on(chosen)(y, weights, slots)
