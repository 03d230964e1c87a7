"""rotary: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from grokkernels import derivatives, dispatch
from grokkernels.ops import checks
from grokkernels.overlap import check_apart
from grokkernels.reference.rotary import rotary as reference
from grokkernels.reference.rotary import rotary_tables

__all__ = ["rotary", "rotary_tables"]

_OPTIONS = "Tensor cos, Tensor sin, Tensor? positions, int offset, Tensor? cu_seqlens, bool interleaved, bool inverse"


def _fwd_fake(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, *_options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((0,)) if k is None else k.new_empty(k.shape)


def _fwd_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, k, cos, sin, positions, ctx.offset, cu_seqlens, ctx.interleaved, ctx.inverse = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(cos, sin, positions, cu_seqlens)


def _fwd_backward(ctx: Any, dq: torch.Tensor | None, dk: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The gradient turns back: by the opposite angle."""
    if not ctx.has_k:
        dk = None
    first, second = (dk, None) if dq is None else (dq, dk)
    if first is None:
        return (None,) * 9
    cos, sin, positions, cu_seqlens = ctx.saved_tensors
    turned, other = _fwd.on(ctx.backend)(
        first, second, cos, sin, positions, ctx.offset, cu_seqlens, ctx.interleaved, not ctx.inverse
    )
    gradients = (None, turned) if dq is None else (turned, None if dk is None else other)
    return *gradients, None, None, None, None, None, None, None


_fwd = dispatch.define(
    "rotary_fwd",
    f"(Tensor q, Tensor? k, {_OPTIONS}) -> (Tensor q_out, Tensor k_out)",
    _fwd_fake,
    setup_context=_fwd_setup,
    backward=_fwd_backward,
    constants=("cos", "sin"),
)


def _inplace_fake(*_arguments: Any) -> None:
    return None


_inplace = dispatch.define("rotary_inplace", f"(Tensor(a!) q, Tensor(b!)? k, {_OPTIONS}) -> ()", _inplace_fake)


def _supports_native(
    q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, **_options: Any
) -> str | None:
    if cos.dtype != torch.float32 or sin.dtype != torch.float32:
        return f"cos is {cos.dtype} and sin {sin.dtype}; float32 tables are supported"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin requires a gradient, which only the reference computes"
    return dispatch.native_dtypes(q=q, k=k)


ROW = dispatch.Row("rotary", {"cpu": _supports_native, "cuda": _supports_native, "triton": _supports_native})


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: int | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotary position embedding: turns each pair ``(a, b)`` to ``(a cos - b sin, a sin + b cos)``.

    Args:
        q: ``(B, T, H, D)``, or packed sequences ``(total, H, D)`` with `cu_seqlens`; float32, bfloat16 or float16
            (float64 on the reference). Any strides: slices of a packed projection are read where they lie.
        k: like q, with any number of heads, or None.
        cos, sin: ``(max_position, R/2)``, float32: see `rotary_tables`. The first R <= D of the D dims turn, the rest
            pass. No gradient reaches the tables on a native backend.
        positions: None: 0, 1, ... in each sequence. An int, or an int tensor ``(B,)``: the position of each sequence's
            first token. An int tensor ``(B, T)`` or ``(total,)``: the position of each token (in the packed form also
            when ``B == total``). A compiled graph is specialised on an int: give a tensor where it varies.
        cu_seqlens: ``(B+1,)`` int32 or int64, the first token of each packed sequence: rises from 0 to total.
        interleaved: pairs are ``(2i, 2i + 1)`` instead of ``(i, i + R/2)``.
        inplace: write into q and k, which may be slices of one tensor but have no element in common with each other or
            with the tables, and return them. Without gradients this takes no new memory. Where q or k requires a
            gradient, the result is computed beside and copied in; a leaf, which PyTorch forbids to change in place, is
            changed outside autograd and the tensor returned for it is a new one, through which the gradient flows.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``(q, k)`` turned, like q and k; None for a k of None. Computed in float32, rounded once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, a position outside the tables, or
            a backend that cannot run it. Inside a compiled graph or torch.func the values of positions and cu_seqlens
            are checked by the kernel instead, which raises RuntimeError before it writes anything. On a CUDA device no
            value is checked, since that would wait for the device: a token whose position has no row in the tables, or
            which no sequence of cu_seqlens holds, gets NaN in its R turned dims, and nothing is read outside.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    _check(q, k, cos, sin, positions, cu_seqlens, inplace)
    chosen = ROW.choose(backend, q.device, q, k, cos, sin)
    if chosen == "reference":
        return reference(
            q,
            k,
            cos,
            sin,
            positions=positions,
            cu_seqlens=cu_seqlens,
            interleaved=interleaved,
            inplace=inplace,
        )
    offset = positions if isinstance(positions, int) else 0
    rows = positions.long() if isinstance(positions, torch.Tensor) else None
    starts = None if cu_seqlens is None else _int32(cu_seqlens)
    options = cos, sin, rows, offset, starts, interleaved, False
    if not inplace:
        turned_q, turned_k = _fwd.on(chosen)(q, k, *options)
        return turned_q, None if k is None else turned_k
    if derivatives.wanted(q, *(() if k is None else (k,))):
        turned_q, turned_k = _fwd.on(chosen)(q, k, *options)
        return _copied_into(q, turned_q), None if k is None else _copied_into(k, turned_k)
    _inplace.on(chosen)(q, k, *options)
    if not torch.compiler.is_compiling():  # tell autograd that what it may have saved has changed
        torch.autograd.graph.increment_version(q if k is None else (q, k))
    return q, k


def _int32(starts: torch.Tensor) -> torch.Tensor:
    """The entries as int32, where those that do not fit stay numbers that no sequence can have."""
    return starts if starts.dtype == torch.int32 else starts.clamp(-1, 2**31 - 1).int()


def _copied_into(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    if x.is_leaf and x.requires_grad:
        x.detach().copy_(y.detach())
        return y
    return x.copy_(y)


def _check(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: int | torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    inplace: bool,
) -> None:
    checks.floating("q", q)
    packed = cu_seqlens is not None
    form = "(total, H, D)" if packed else "(B, T, H, D)"
    checks.shape("q", q, (None,) * (3 if packed else 4), form)
    *tokens, _, dim = q.shape  # (B, T), or (total,)
    if k is not None:
        checks.floating("k", k, dtypes=(q.dtype,))
        checks.shape("k", k, (*tokens, None, dim), form.replace("H", "Hkv"))
    checks.floating("cos", cos)
    checks.floating("sin", sin, dtypes=(cos.dtype,))
    checks.shape("cos", cos, (None, None), "(max_position, R/2)")
    checks.shape("sin", sin, cos.shape, "of cos")
    if 2 * cos.shape[1] > dim:
        raise ValueError(f"cos must have at most D/2 = {dim / 2:g} columns, got {cos.shape[1]}")
    if packed:
        checks.integers("cu_seqlens", cu_seqlens)
        checks.shape("cu_seqlens", cu_seqlens, (None,), "(B+1,)")
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens must have at least one entry, got none")
    given = positions if isinstance(positions, torch.Tensor) else None
    if given is not None:
        checks.integers("positions", given)
        sequences = cu_seqlens.shape[0] - 1 if packed else tokens[0]
        per_token = tuple(tokens)
        if tuple(given.shape) not in ((sequences,), per_token):
            raise ValueError(
                f"positions must have shape (B,) = ({sequences},) or one entry per token = {per_token}, "
                f"got {tuple(given.shape)}"
            )
    elif isinstance(positions, bool) or not (positions is None or isinstance(positions, (int, torch.SymInt))):
        raise TypeError(f"positions must be None, an int or an integer tensor, got {type(positions).__name__}")
    checks.same_device(q=q, k=k, cos=cos, sin=sin, cu_seqlens=cu_seqlens, positions=given)
    if inplace and q is k:
        raise ValueError("q and k must not be the same tensor for inplace, as it would be turned twice")
    if inplace and not torch.compiler.is_compiling():
        tensors = {"cos": cos, "sin": sin, "positions": given, "cu_seqlens": cu_seqlens}
        check_apart({"q": q} if k is None else {"q": q, "k": k}, {n: t for n, t in tensors.items() if t is not None})
    if q.numel() and checks.readable(q, given, cu_seqlens):
        _check_values(tokens[-1], cos.shape[0], positions, cu_seqlens)


def _check_values(
    tokens: int, max_position: int, positions: int | torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> None:
    """Every position has a row in the tables. Costs a few microseconds, as much as the values are read."""
    longest = [tokens]
    if cu_seqlens is not None:
        starts = cu_seqlens.tolist()
        longest = [end - begin for begin, end in pairwise(starts)]
        if starts[0] != 0 or starts[-1] != tokens or min(longest, default=0) < 0:
            raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} tokens of q, got {_shortened(starts)}")
    if not isinstance(positions, torch.Tensor):
        low, high = positions or 0, (positions or 0) + max(longest) - 1
    elif positions.dim() == 2 or (cu_seqlens is not None and positions.shape[0] == tokens):
        low, high = (int(bound) for bound in positions.aminmax())
    else:
        firsts = positions.tolist()
        lengths = longest if cu_seqlens is not None else longest * len(firsts)
        spans = [(first, first + length - 1) for first, length in zip(firsts, lengths, strict=True) if length]
        low, high = min(begin for begin, _ in spans), max(end for _, end in spans)
    if low < 0 or high >= max_position:
        raise ValueError(
            f"positions must lie in [0, {max_position}), the rows of cos and sin; got positions from {low} to {high}"
        )


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
