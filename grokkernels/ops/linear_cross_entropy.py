"""linear_cross_entropy: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.ops.cross_entropy import LOSS_OPTIONS, check_loss_options, check_targets
from grokkernels.reference.linear_cross_entropy import linear_cross_entropy as reference

__all__ = ["linear_cross_entropy"]


def _bwd_fake(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if need_dx else (0,)), weight.new_empty(weight.shape if need_dweight else (0,))


_bwd = dispatch.define(
    "linear_cross_entropy_bwd",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor targets, Tensor lse, bool need_dx, bool need_dweight, "
    f"{LOSS_OPTIONS}) -> (Tensor dx, Tensor dweight)",
    _bwd_fake,
)


def _fwd_fake(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.shape[0]
    loss = x.new_empty((rows,) if options[-1] == "none" else (), dtype=torch.float32)
    return loss, x.new_empty((rows,), dtype=torch.float64)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, targets, *ctx.options = inputs
    ctx.save_for_backward(x, weight, targets, output[1])


def _fwd_backward(ctx: Any, dloss: torch.Tensor | None, _dlse: None) -> tuple[torch.Tensor | None, ...]:
    rest = (None,) * (1 + len(ctx.options))
    if dloss is None:
        return None, None, *rest
    x, weight, targets, lse = ctx.saved_tensors
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    dx, dweight = _bwd.on(ctx.backend)(dloss, x, weight, targets, lse, need_dx, need_dweight, *ctx.options)
    return dx if need_dx else None, dweight if need_dweight else None, *rest


_fwd = dispatch.define(
    "linear_cross_entropy_fwd",
    f"(Tensor x, Tensor weight, Tensor targets, {LOSS_OPTIONS}) -> (Tensor loss, Tensor lse)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _supports_native(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> str | None:
    return dispatch.native_dtypes(x=x, weight=weight)


ROW = dispatch.Row(
    "linear_cross_entropy", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native}
)


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
    backend: str | None = None,
) -> torch.Tensor:
    """`cross_entropy` of ``x @ weight.T`` that never holds the ``(N, V)`` logits, forward or backward.

    Args:
        x: ``(N, C)``, float32, bfloat16 or float16 (float64 on the reference).
        weight: ``(V, C)``, as in nn.Linear, in the dtype of x.
        targets: ``(N,)``, int64 or int32, each in [0, V) or ignore_index.
        softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction: as in `cross_entropy`; rows of x whose
            target is ignored are not read.
        backend: who computes; see `grokkernels.use`. The reference does hold the logits.

    On a CUDA device nothing looks at the targets: one outside the vocabulary makes its row's loss and gradient NaN, and
    with them dweight. There dlogits have the dtype of x between the products of the backward pass.

    Returns:
        ``()``, or ``(N,)`` for reduction "none"; float32 (float64 for float64 x). The logits are float32 and not
        rounded. Gradients reach x and weight, right for every reduction; the one that nobody asks for is not computed.
        Float32 products are made of several narrower ones on cuda, where an infinity in x or weight gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a target outside the vocabulary
            (RuntimeError under torch.compile and torch.func), or a backend that cannot run it.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
    """
    checks.floating("x", x)
    checks.floating("weight", weight)
    checks.shape("x", x, (None, None), "(N, C)")
    checks.shape("weight", weight, (None, x.shape[1]), "(V, C)")
    if x.shape[1] < 1:
        raise ValueError(f"C must be at least 1, got x of shape {tuple(x.shape)}")
    check_loss_options(softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction)
    device = checks.same_device(x=x, weight=weight, targets=targets)
    check_targets(targets, x.shape[0], weight.shape[0], ignore_index)
    chosen = ROW.choose(backend, device, x, weight, targets)
    if chosen == "reference":
        return reference(
            x,
            weight,
            targets,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    return _fwd.on(chosen)(x, weight, targets, softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction)[
        0
    ]
