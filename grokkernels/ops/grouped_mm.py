"""grouped_mm: the contract. What it takes, what comes back, its derivative, which backend can run it."""

from __future__ import annotations

from typing import Any

import torch

from grokkernels import dispatch
from grokkernels.ops import checks
from grokkernels.reference.grouped_mm import grouped_mm as reference

__all__ = ["grouped_mm"]


def _bwd_fake(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    experts, depth, cols = w.shape
    if w.stride(1) == 1 and w.stride(2) != 1:
        return x.new_empty(x.shape), w.new_empty((experts, cols, depth)).transpose(1, 2)
    return x.new_empty(x.shape), w.new_empty(w.shape)


_bwd = dispatch.define(
    "grouped_mm_bwd",
    "(Tensor dy, Tensor x, Tensor w, Tensor offsets) -> (Tensor dx, Tensor dw)",
    _bwd_fake,
)


def _fake(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], w.shape[2]))


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None
    return *_bwd.on(ctx.backend)(dy, *ctx.saved_tensors), None


_grouped_mm = dispatch.define(
    "grouped_mm", "(Tensor x, Tensor w, Tensor offsets) -> Tensor", _fake, setup_context=_setup, backward=_backward
)


def _supports_native(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> str | None:
    return dispatch.native_dtypes(x=x, w=w)


ROW = dispatch.Row("grouped_mm", dict.fromkeys(("cpu", "cuda", "triton"), _supports_native))


def _check_values(offsets: torch.Tensor, rows: int) -> None:
    """offsets rise from 0 to at most rows, where they are readable."""
    if not checks.readable(offsets):
        return
    before = 0
    for expert, end in enumerate(offsets.tolist()):
        if not before <= end <= rows:
            raise ValueError(
                f"offsets must rise from 0 to at most the {rows} rows of x, got offsets[{expert}] = {end}"
                + (f" after {before}" if expert else "")
            )
        before = end


def grouped_mm(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """One matrix product per group of rows: ``y[r] = x[r] @ w[e]`` for the rows r of group e.

    Args:
        x: ``(M, K)``, any strides; float32, bfloat16 or float16 (float64 on the reference).
        w: ``(E, K, N)``, any strides, the dtype of x. A layer's ``(E, out, in)`` weight is passed as its ``.mT``.
        offsets: ``(E,)`` int32: group e ends before row ``offsets[e]``. They rise, from 0 to at most M, and a group may
            be empty: torch's ``F.grouped_mm`` takes the same. Checked on the CPU, except under torch.compile and
            torch.func, where wrong values give wrong rows and nothing worse.
        backend: who computes; see `grokkernels.use`.

    Returns:
        ``(M, N)`` in the dtype of x, products summed in float32 and rounded once. Rows past ``offsets[-1]`` are 0.
        Gradients reach x and w; dw lies in memory as w does, and is zero for an empty group. Float32 products are made
        of several narrower ones on cuda, where an infinity in x or w gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, offsets that do not rise, or a
            backend that cannot run it.

    Source: Gale et al., "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", 2022.
    """
    checks.floating("x", x)
    checks.floating("w", w, dtypes=(x.dtype,))
    checks.floating("offsets", offsets, dtypes=(torch.int32,))
    checks.shape("w", w, (None, None, None), "(E, K, N)")
    checks.shape("x", x, (None, w.shape[1]), "(M, K)")
    checks.shape("offsets", offsets, (w.shape[0],), "(E,)")
    if w.shape[0] == 0:
        raise ValueError("w must have at least one group, got E = 0")
    device = checks.same_device(x=x, w=w, offsets=offsets)
    _check_values(offsets, x.shape[0])
    chosen = ROW.choose(backend, device, x, w, offsets)
    if chosen == "reference":
        return reference(x, w, offsets)
    return _grouped_mm.on(chosen)(x, w, offsets)
