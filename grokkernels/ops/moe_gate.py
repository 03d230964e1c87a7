"""moe_gate: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.moe_gate import Routing
from grokkernels.reference.moe_gate import moe_gate as reference

__all__ = ["Routing", "moe_gate"]

# How forward and backward both get from the logits to the weights.
_OPTIONS = (
    "int top_k, bool sigmoid, float softcap, bool renormalize, float routed_scale, bool topk_first, "
    "float jitter, int seed"
)


def _bwd_fake(
    dweights: torch.Tensor | None,
    dload_balance_loss: torch.Tensor | None,
    dz_loss: torch.Tensor | None,
    logits: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    *options: Any,
) -> torch.Tensor:
    return logits.new_empty(logits.shape)


_bwd = dispatch.define(
    "moe_gate_bwd",
    "(Tensor? dweights, Tensor? dload_balance_loss, Tensor? dz_loss, Tensor logits, Tensor indices, Tensor counts, "
    f"{_OPTIONS}) -> Tensor",
    _bwd_fake,
)


def _fwd_fake(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    *options: Any,
) -> tuple[torch.Tensor, ...]:
    experts = logits.shape[-1]
    tokens = logits.numel() // experts
    return (
        logits.new_empty((tokens, top_k), dtype=torch.float32),
        logits.new_empty((tokens, top_k), dtype=torch.int32),
        logits.new_empty((experts,), dtype=torch.int32),
        logits.new_empty((), dtype=torch.float32),
        logits.new_empty((), dtype=torch.float32),
    )


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, _, _, _, *ctx.options = inputs
    _, indices, counts, _, _ = output
    ctx.save_for_backward(logits, indices, counts)


def _fwd_backward(
    ctx: Any,
    dweights: torch.Tensor | None,
    _dindices: None,
    _dcounts: None,
    dload_balance_loss: torch.Tensor | None,
    dz_loss: torch.Tensor | None,
) -> tuple[torch.Tensor | None, ...]:
    nothing = (None,) * (3 + len(ctx.options))
    if dweights is None and dload_balance_loss is None and dz_loss is None:
        return None, *nothing
    dlogits = _bwd.on(ctx.backend)(dweights, dload_balance_loss, dz_loss, *ctx.saved_tensors, *ctx.options)
    return dlogits, *nothing


_fwd = dispatch.define(
    "moe_gate_fwd",
    f"(Tensor logits, Tensor? bias, int num_groups, int topk_groups, {_OPTIONS}) "
    "-> (Tensor weights, Tensor indices, Tensor counts, Tensor load_balance_loss, Tensor z_loss)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
)


def _supports_cpu(logits: torch.Tensor, top_k: int, **options: Any) -> str | None:
    return dispatch.native_dtypes(logits=logits)


def _supports_gpu(logits: torch.Tensor, top_k: int, **options: Any) -> str | None:
    if logits.shape[-1] > 1024:
        return f"logits has {logits.shape[-1]} experts; up to 1024 are supported"
    return dispatch.native_dtypes(logits=logits)


ROW = dispatch.Row("moe_gate", {"cpu": _supports_cpu, "cuda": _supports_gpu, "triton": _supports_gpu})


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
    backend: str | None = None,
) -> Routing:
    """Chooses `top_k` of E experts for each token, with weights, counts and the two losses of the gate.

    Per token ``z = softcap * tanh(logits / softcap)`` (the logits themselves without a softcap) and scores
    ``p = softmax(z)`` or ``sigmoid(z)``. The K experts with the largest ``p + bias`` are chosen, the lower index first
    among equals, and weighed by p.

    Args:
        logits: ``(..., E)``, float32, bfloat16 or float16 (float64 on the reference), flattened to ``(N, E)``; E >= 1.
        top_k: K, from 1 to E.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        softcap: the cap of the logits, >= 0; 0 is none.
        bias: ``(E,)`` float32, added to choose and not to weigh (DeepSeek-V3, arXiv:2412.19437); no gradient.
        num_groups: the experts lie in this many groups of neighbours; divides E.
        topk_groups: only experts of the this many best groups can be chosen, from 1 to num_groups, enough of them to
            hold top_k experts. A group's score is its best ``p``, with a bias the sum of its two best ``p + bias``.
        renormalize: divide the weights by the larger of their sum and 1e-20.
        routed_scale: multiplies the weights last; a finite number >= 0.
        order: ``"softmax_then_topk"``, or ``"topk_then_softmax"``: the largest ``z + bias`` are chosen and the weights
            are the softmax of their z; softmax scoring only.
        jitter: in [0, 1); multiplies logit m of the flattened ``(N, E)`` by ``1 + jitter * (2 u_m - 1)``, with u_m in
            [0, 1) drawn by Philox4x32-10 from m and the seed: the same on every backend.
        seed: an int of at most 64 bits; needed with a jitter.
        backend: who computes; see `grokkernels.use`.

    Returns:
        `Routing`: weights ``(N, K)`` float32 and indices ``(N, K)`` int32, the best choice first; tokens_per_expert
        ``(E,)`` int32; ``load_balance_loss = E * sum_e count_e / (N K) * mean_n p_ne`` (Switch Transformer,
        arXiv:2101.03961; sigmoid scores divided by their sum first) and ``z_loss = mean_n logsumexp(z_n)^2`` (ST-MoE,
        arXiv:2202.08906), both float32 scalars. A token whose logsumexp is not finite (a NaN among its logits; an
        infinity without a softcap; all -infinity) routes nowhere: indices -1, weights 0, gradient 0, left out of N.
        With no token left both losses are 0. An expert whose logit is -infinity has weight 0.
        Gradients reach the logits, through weights and losses.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, value or device, or a backend that cannot
        run it.
    """
    checks.floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape (..., E) with E >= 1, got {tuple(logits.shape)}")
    experts = logits.shape[-1]
    checks.integer("top_k", top_k, 1, experts)
    checks.choice("scoring", scoring, ("softmax", "sigmoid"))
    checks.choice("order", order, ("softmax_then_topk", "topk_then_softmax"))
    if order == "topk_then_softmax" and scoring != "softmax":
        raise ValueError(f"scoring must be 'softmax' with order 'topk_then_softmax', got {scoring!r}")
    checks.at_least("softcap", softcap, 0.0)
    checks.at_least("routed_scale", routed_scale, 0.0)
    if bias is not None:
        checks.floating(
            "bias", bias, dtypes=(torch.float32, logits.dtype) if logits.dtype == torch.float64 else (torch.float32,)
        )
        checks.shape("bias", bias, (experts,), "(E,)")
    checks.integer("num_groups", num_groups, 1, experts)
    if experts % num_groups != 0:
        raise ValueError(f"num_groups must divide the {experts} experts, got {num_groups}")
    checks.integer("topk_groups", topk_groups, 1, num_groups)
    if topk_groups * (experts // num_groups) < top_k:
        raise ValueError(
            f"topk_groups must be enough groups of {experts // num_groups} experts for top_k = {top_k}, "
            f"got {topk_groups}"
        )
    checks.at_least("jitter", jitter, 0.0)
    if jitter >= 1:
        raise ValueError(f"jitter must be below 1, got {jitter!r}")
    if jitter > 0 and seed is None:
        raise ValueError("seed must be an int when jitter is not 0, got None")
    if seed is not None:
        checks.integer("seed", seed, -(2**63), 2**64 - 1)
    device = checks.same_device(logits=logits, bias=bias)
    chosen = ROW.choose(backend, device, logits, top_k)
    if chosen == "reference":
        return reference(
            logits,
            top_k,
            scoring=scoring,
            softcap=softcap,
            bias=bias,
            num_groups=num_groups,
            topk_groups=topk_groups,
            renormalize=renormalize,
            routed_scale=routed_scale,
            order=order,
            jitter=jitter,
            seed=seed,
        )
    word = 0 if seed is None else seed
    return Routing(
        *_fwd.on(chosen)(
            logits,
            bias,
            num_groups,
            topk_groups,
            top_k,
            scoring == "sigmoid",
            softcap,
            renormalize,
            routed_scale,
            order == "topk_then_softmax",
            jitter,
            word - 2**64 if word >= 2**63 else word,
        )
    )
