"""cross_entropy: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.cross_entropy import cross_entropy as reference

__all__ = ["cross_entropy"]

LOSS_OPTIONS = "float softcap, float logit_scale, float z_loss, float label_smoothing, int ignore_index, str reduction"


def _bwd_fake(
    dloss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor, lse: torch.Tensor, *options: Any
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


_bwd = dispatch.define(
    "cross_entropy_bwd",
    f"(Tensor dloss, Tensor logits, Tensor targets, Tensor lse, {LOSS_OPTIONS}) -> Tensor dlogits",
    _bwd_fake,
)


def _fwd_fake(logits: torch.Tensor, targets: torch.Tensor, *options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if options[-1] == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty((rows,), dtype=torch.float64)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets, output[1])


def _fwd_backward(ctx: Any, dloss: torch.Tensor | None, _dlse: None) -> tuple[torch.Tensor | None, ...]:
    rest = (None,) * (1 + len(ctx.options))
    if dloss is None:
        return None, *rest
    logits, targets, lse = ctx.saved_tensors
    return _bwd.on(ctx.backend)(dloss, logits, targets, lse, *ctx.options), *rest


_fwd = dispatch.define(
    "cross_entropy_fwd",
    f"(Tensor logits, Tensor targets, {LOSS_OPTIONS}) -> (Tensor loss, Tensor lse)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def check_loss_options(
    softcap: float, logit_scale: float, z_loss: float, label_smoothing: float, ignore_index: int, reduction: str
) -> None:
    """The options that cross_entropy shares with linear_cross_entropy."""
    checks.at_least("softcap", softcap, 0.0)
    checks.at_least("z_loss", z_loss, 0.0)
    if not -float("inf") < logit_scale < float("inf"):
        raise ValueError(f"logit_scale must be a finite number, got {logit_scale!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    checks.integer("ignore_index", ignore_index, -(2**63), 2**63 - 1)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))


def check_targets(targets: torch.Tensor, rows: int, vocabulary: int, ignore_index: int) -> None:
    """Targets (rows,) inside the vocabulary or ignored. The numbers are looked at where they are readable; elsewhere
    the kernel refuses them with a RuntimeError on the CPU, and on a device their rows become NaN."""
    checks.integers("targets", targets)
    checks.shape("targets", targets, (rows,), "(N,)")
    if vocabulary < 1:
        raise ValueError("V must be at least 1, got an empty vocabulary")
    if rows == 0 or not checks.readable(targets):
        return
    low, high = torch.aminmax(targets)
    if low.item() >= 0 and high.item() < vocabulary:
        return
    outside = ((targets < 0) | (targets >= vocabulary)) & (targets.long() != ignore_index)
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"targets[{row}] is {int(targets[row])}; allowed are 0 to {vocabulary - 1} and ignore_index {ignore_index}"
        )


def _supports_native(logits: torch.Tensor, targets: torch.Tensor) -> str | None:
    return dispatch.native_dtypes(logits=logits)


ROW = dispatch.Row("cross_entropy", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})


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
    backend: str | None = None,
) -> torch.Tensor:
    """Cross entropy of logits against targets, with Grok's cap on the logits and the z-loss.

    With ``z = logit_scale * logits``, then ``softcap * tanh(z / softcap)`` if softcap > 0,
    ``loss = -sum_v q_v log softmax(z)_v + z_loss * logsumexp(z)^2`` per row,
    where ``q = (1 - label_smoothing) * onehot(target) + label_smoothing / V``.

    Args:
        logits: ``(N, V)``, float32, bfloat16 or float16 (float64 on the reference); -inf masks a word of the
            vocabulary. Rows may lie any distance apart.
        targets: ``(N,)``, int64 or int32, each in [0, V) or ignore_index. On a CUDA device nobody waits to look at
            them: one outside makes its row's loss and gradient NaN.
        softcap: >= 0; 0 for no cap.
        logit_scale: what the logits are multiplied by, before the cap.
        z_loss: weight of the squared logsumexp, >= 0.
        label_smoothing: in [0, 1].
        ignore_index: rows with this target are not read, and give no loss and no gradient.
        reduction: "mean" divides by the number of rows that are not ignored (0 if all are), "sum", or "none".
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``()``, or ``(N,)`` for reduction "none"; float32 (float64 for float64 logits). Gradients reach logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a target outside the vocabulary
            (on the CPU alone; RuntimeError under torch.compile and torch.func), or a backend that cannot run it.

    Source: the online logsumexp of Milakov and Gimelshein, arXiv:1805.02867; the z-loss of PaLM, arXiv:2204.02311.
    """
    checks.floating("logits", logits)
    checks.shape("logits", logits, (None, None), "(N, V)")
    check_loss_options(softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction)
    device = checks.same_device(logits=logits, targets=targets)
    check_targets(targets, logits.shape[0], logits.shape[1], ignore_index)
    chosen = ROW.choose(backend, device, logits, targets)
    if chosen == "reference":
        return reference(
            logits,
            targets,
            softcap=softcap,
            logit_scale=logit_scale,
            z_loss=z_loss,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    return _fwd.on(chosen)(logits, targets, softcap, logit_scale, z_loss, label_smoothing, ignore_index, reduction)[0]
