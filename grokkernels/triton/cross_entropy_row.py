"""What the losses share: one logit's z and its gradient, the logsumexp of a tile, rows put together from their parts.

A row's columns are cut into parts whose number depends on V alone. Each leaves its logsumexp, which a second kernel
merges in order and in float64: a row's loss depends on nothing but its own logits, however many other rows there are.
A third kernel reduces the rows' losses. (As in csrc/cuda/cross_entropy_row.cuh; the online logsumexp is that of Milakov
and Gimelshein, arXiv:1805.02867.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.elementary import exponential, tanh
from grokkernels.triton.kernel import kernel

LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
# Rows that a program merges or reduces at once.
TOGETHER = 8192 if INTERPRETED else 1024


def squash_options(softcap: float, logit_scale: float) -> dict[str, float | bool]:
    """z = slope * logit, or cap * tanh(inner * logit): what `squash` wants to know of it, by parameter."""
    capped = softcap > 0
    return {
        "inner": logit_scale / softcap if capped else 0.0,
        "cap": softcap,
        "slope": logit_scale,
        "CAPPED": capped,
    }


@triton.jit
def squash(x, inner, cap, slope, CAPPED: tl.constexpr):
    """A logit in float32 -> z."""
    return cap * tanh(inner * x) if CAPPED else slope * x


@triton.jit
def logsumexp(z, inside, EXACT: tl.constexpr):
    """z (ROWS, COLUMNS), where inside -> the rows' logsumexp in float64; -infinity for a row without columns.

    The maximum is kept finite, so that an infinite z gives an infinite sum rather than infinity - infinity.
    """
    z = tl.where(inside, z, -float("inf"))
    most = tl.minimum(tl.maximum(tl.max(z, 1), -LARGEST), LARGEST)
    return most.to(tl.float64) + tl.log(tl.sum(exponential(z - most[:, None], EXACT), 1).to(tl.float64))


@triton.jit
def gradient_of_row(lse, weight, twice_z_loss):
    """lse in float64, the gradient of the row's loss -> what the rows of `gradient_of_logits` need: lse in float32, and
    the factor of p, in which what that rounding took from every p of the row is given back."""
    rounded = lse.to(tl.float32)
    lost = (rounded.to(tl.float64) - lse).to(tl.float32)  # below half a place of lse, so exp(lost) is 1 + lost
    return rounded, weight, (1.0 + lost) * (1.0 + twice_z_loss * rounded)


@triton.jit
def gradient_of_logits(
    x, is_target, lse, weight, p_factor, inner, cap, slope, q, q_target, CAPPED: tl.constexpr, EXACT: tl.constexpr
):
    """x (ROWS, COLUMNS) in float32, the rest of rows (ROWS, 1) -> weight dz/dx (p (1 + 2 z_loss lse) - q)."""
    if CAPPED:
        t = tanh(inner * x)
        z = cap * t
        slope = slope * (1.0 - t * t)
    else:
        z = slope * x
    p = exponential(z - lse, EXACT)
    return weight * slope * (p * p_factor - tl.where(is_target, q_target, q))


@kernel
def merge_parts_kernel(
    part_lse_ptr,  # (parts, rows) float64
    part_sum_ptr,  # (parts, rows) float32: sums of z, or None
    target_z_ptr,  # (rows) float32
    targets_ptr,  # (rows)
    losses_ptr,  # (rows) float32
    lse_ptr,  # (rows) float64
    rows: tl.int64,
    targets_stride: tl.int64,
    ignore_index: tl.int64,
    z_loss: tl.float32,
    smoothing: tl.float32,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Loss and lse of each row; 0 of those that are ignored, NaN where the target is no word of the vocabulary."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    target = tl.load(targets_ptr + row * targets_stride, there, 0).to(tl.int64)
    most = tl.full((ROWS,), -float("inf"), tl.float64)
    for part in range(PARTS):
        most = tl.maximum(most, tl.load(part_lse_ptr + part * rows + row, there, 0.0))
    most = tl.minimum(tl.maximum(most, -LARGEST), LARGEST)
    total = tl.zeros((ROWS,), tl.float64)
    z_sum = tl.zeros((ROWS,), tl.float64)
    for part in range(PARTS):
        total += tl.exp(tl.load(part_lse_ptr + part * rows + row, there, 0.0) - most)
        if part_sum_ptr is not None:
            z_sum += tl.load(part_sum_ptr + part * rows + row, there, 0.0).to(tl.float64)
    lse = most + tl.log(total)
    expected = tl.load(target_z_ptr + row, there, 0.0).to(tl.float64)
    if part_sum_ptr is not None:
        expected = (1.0 - smoothing) * expected + smoothing * (z_sum / V)
    loss = lse - expected + z_loss * lse * lse
    word = (target >= 0) & (target < V)
    counts = target != ignore_index
    tl.store(lse_ptr + row, tl.where(counts, tl.where(word, lse, float("nan")), 0.0), there)
    tl.store(losses_ptr + row, tl.where(counts, tl.where(word, loss, float("nan")), 0.0).to(tl.float32), there)


def merge_parts(
    part_lse: torch.Tensor,  # (parts, N) float64
    part_sum: torch.Tensor | None,  # (parts, N) float32
    target_z: torch.Tensor,  # (N) float32
    targets: torch.Tensor,
    vocabulary: int,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss as the reduction wants it, and the rows' lse."""
    parts, rows = part_lse.shape
    losses, lse = target_z.new_empty((rows,)), part_lse.new_empty((rows,))
    together = min(TOGETHER, 128)
    merge_parts_kernel[(triton.cdiv(rows, together),)](
        part_lse, part_sum, target_z, targets, losses, lse, rows, targets.stride(0), ignore_index, z_loss,
        label_smoothing, V=vocabulary, PARTS=parts, ROWS=together, num_warps=4,
    )  # fmt: skip
    if reduction == "none":
        return losses, lse
    loss = losses.new_empty(())
    reduce_rows(losses, targets, loss, ignore_index, reduction == "mean")
    return loss, lse


@kernel
def reduce_rows_kernel(
    losses_ptr,  # (rows) float32, or None
    targets_ptr,  # (rows)
    out_ptr,  # () float32
    rows: tl.int64,
    targets_stride: tl.int64,
    ignore_index: tl.int64,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sum of the losses or, if MEAN, that over the number of rows that count; without losses, that number. It is 1
    where no row counts. One program, so that the order is always the same."""
    total = tl.zeros((ROWS,), tl.float64)
    counted = tl.zeros((ROWS,), tl.int32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < rows
        if losses_ptr is not None:
            total += tl.load(losses_ptr + row, there, 0.0).to(tl.float64)
        if MEAN:
            target = tl.load(targets_ptr + row * targets_stride, there, 0).to(tl.int64)
            counted += (there & (target != ignore_index)).to(tl.int32)
    divisor = tl.maximum(tl.sum(counted, 0), 1).to(tl.float64)
    result = divisor if losses_ptr is None else tl.sum(total, 0) / divisor
    tl.store(out_ptr, result.to(tl.float32))


def reduce_rows(
    losses: torch.Tensor | None, targets: torch.Tensor, out: torch.Tensor, ignore_index: int, mean: bool
) -> None:
    reduce_rows_kernel[(1,)](
        losses, targets, out, targets.shape[0], targets.stride(0), ignore_index, MEAN=mean, ROWS=TOGETHER, num_warps=8
    )
