"""adamw: the contract of the update that `grokkernels.optim.AdamW` makes. Nothing here is differentiable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.overlap import check_apart
from grokkernels.reference import adamw as reference
from grokkernels.reference.values import known

__all__ = ["adamw"]

Tensors = Sequence[torch.Tensor]

_global_norm = dispatch.define(
    "global_norm",
    "(Tensor[] tensors) -> Tensor norm",
    lambda tensors: tensors[0].new_empty((), dtype=torch.float32),
)

_adamw = dispatch.define(
    "adamw",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, "
    "Tensor? norm, float lr, float beta1, float beta2, float eps, float weight_decay, float max_norm, bool maximize"
    ") -> ()",
    lambda *arguments: None,
)


def _fills_memory(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of the dims."""
    if tensor.is_contiguous():
        return True
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


def _supports_native(params: Tensors, grads: Tensors, exp_avgs: Tensors = (), exp_avg_sqs: Tensors = ()) -> str | None:
    for i, param in enumerate(params):
        if param.dtype not in dispatch.NATIVE_DTYPES:
            return f"params[{i}] is {param.dtype}; float32, bfloat16 and float16 are supported"
        if not _fills_memory(param):
            return f"params[{i}] has gaps or overlaps in memory: shape {tuple(param.shape)}, strides {param.stride()}"
    for name, states in (("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        for i, (state, param) in enumerate(zip(states, params, strict=False)):
            if state.dtype != torch.float32:
                return f"{name}[{i}] is {state.dtype}; the moments must be float32"
            if state.stride() != param.stride() and state.numel() > 1:
                return f"{name}[{i}] does not lie in memory as params[{i}] does"
    for i, grad in enumerate(grads):
        if grad.dtype not in dispatch.NATIVE_DTYPES:
            return f"grads[{i}] is {grad.dtype}; float32, bfloat16 and float16 are supported"
    return None


ROW = dispatch.Row("adamw", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})


def _check_list(name: str, tensors: Tensors, like: Tensors, device: torch.device) -> None:
    if len(tensors) != len(like):
        raise ValueError(f"{name} must have one tensor for each of params, {len(like)}, got {len(tensors)}")
    for i, (tensor, param) in enumerate(zip(tensors, like, strict=True)):
        if tensor.layout != torch.strided:
            raise ValueError(f"{name}[{i}] must be a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.shape != param.shape:
            raise ValueError(
                f"{name}[{i}] must have the shape of params[{i}], {tuple(param.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name}[{i}] is on {tensor.device} and params[0] on {device}: all must be on one device")


@torch.no_grad()
def global_norm(grads: Tensors, *, backend: str | None = None) -> torch.Tensor:
    """The Euclidean norm of all gradients as one vector: () float32 (float64 if one of them is); 0 for no gradient.

    Squares are float32, their sums double precision in a fixed order, so a norm beyond 1.8e19 counts as infinite.
    Errors: ValueError for a sparse gradient, or gradients on several devices.
    """
    if not grads:
        return torch.zeros(())
    _check_list("grads", grads, grads, grads[0].device)
    chosen = ROW.choose(backend, grads[0].device, (), grads)
    return reference.global_norm(grads) if chosen == "reference" else _global_norm.on(chosen)(list(grads))


@torch.no_grad()
def adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    steps: Tensors,
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_norm: float | None = None,
    norm: torch.Tensor | None = None,
    maximize: bool = False,
    backend: str | None = None,
) -> torch.Tensor | None:
    """One step of AdamW over many tensors, in place.

    ``g <- g * min(1, max_norm / (norm + 1e-6))`` with a max_norm, and -g to maximize;
    ``m <- beta1 m + (1 - beta1) g``; ``v <- beta2 v + (1 - beta2) g^2``;
    ``p <- p (1 - lr weight_decay) - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)``.

    Args:
        params: any shapes; float32, bfloat16 or float16, also mixed (float64 on the reference). Updated.
        grads: like params, in their dtypes. Not changed.
        exp_avgs, exp_avg_sqs: the moments m and v: float32 (float64 for float64 params), laid out like params. Updated.
        steps: (), float32, on the device of params: steps made so far for each of them, a tensor of its own for each.
            Each is raised by one.
        lr, beta1, beta2, eps, weight_decay: the hyperparameters; betas in [0, 1), the others >= 0.
        max_norm: clip the global norm of the gradients at this, >= 0.
        norm: that norm, () float32, where `grads` are not all of the gradients; else it is taken over `grads`.
        maximize: ascend.
        backend: who computes; see `grokkernels.use`.

    On a CUDA device the host waits for nothing: norm and steps are read and the step is made or left out over there.

    Returns:
        The norm before clipping, () float32; None without a max_norm. Where it is not finite nothing is updated,
        steps included.

    Raises:
        TypeError, ValueError: lists or tensors that do not fit together, sparse gradients, a hyperparameter out of
            range, or a backend that cannot run it. Tensors that share memory where one of them is updated: ValueError,
            or RuntimeError from a native kernel.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101.
    """
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        checks.at_least(name, value, 0.0)
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name} must lie in [0, 1), got {value!r}")
    if max_norm is not None:
        checks.at_least("max_norm", max_norm, 0.0)
    if not params:
        return global_norm(grads, backend=backend) if norm is None and max_norm is not None else norm
    device = params[0].device
    for i, param in enumerate(params):
        checks.floating(f"params[{i}]", param)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _check_list(name, tensors, params, device)
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        if grad.dtype != param.dtype:
            raise TypeError(f"grads[{i}] must have the dtype of params[{i}], {param.dtype}, got {grad.dtype}")
    if len(steps) != len(params):
        raise ValueError(f"steps must have one tensor for each of params, {len(params)}, got {len(steps)}")
    for i, step in enumerate(steps):
        if step.dtype != torch.float32 or step.dim() != 0 or step.device != device:
            raise ValueError(f"steps[{i}] must be a 0-d float32 tensor on {device}, got {step.dtype} on {step.device}")
    written = [*params, *exp_avgs, *exp_avg_sqs, *steps]
    if len({id(tensor) for tensor in written}) != len(written):
        raise ValueError("params, exp_avgs, exp_avg_sqs and steps must be tensors of their own, one is given twice")
    if max_norm is not None and norm is not None and (norm.dim() != 0 or norm.device != device):
        raise ValueError(
            f"norm must be a 0-d float32 tensor on {device}, got shape {tuple(norm.shape)} on {norm.device}"
        )

    chosen = ROW.choose(backend, device, params, grads, exp_avgs, exp_avg_sqs)
    if max_norm is None:
        norm = None
    elif norm is None:
        norm = global_norm(grads, backend=chosen)
    if chosen in ("triton", "reference") and not torch.compiler.is_compiling():  # the others look in their launchers
        written = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps}
        named = {f"{name}[{i}]": t for name, tensors in written.items() for i, t in enumerate(tensors)}
        check_apart(named, {f"grads[{i}]": grad for i, grad in enumerate(grads)})
    if chosen != "reference":
        _adamw.on(chosen)(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps), norm,
            lr, beta1, beta2, eps, weight_decay, 0.0 if max_norm is None else max_norm, maximize,
        )  # fmt: skip
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *steps])
        return norm
    if norm is not None and known(norm) and not torch.isfinite(norm):
        return norm
    for p, g, m, v, step in zip(params, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        reference.adamw_step(
            [p], [g], [m], [v], int(step) if known(step) else 1,
            lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
            max_norm=max_norm, maximize=maximize, norm=norm,
        )  # fmt: skip
    return norm
