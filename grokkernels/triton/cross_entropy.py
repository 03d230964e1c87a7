"""cross_entropy in Triton: the loss of logits (N, V) against targets (N), and dlogits (N, V).

Forward reads the logits once, backward once more. A program has a tile of them in registers: a part of one row, or
several short rows. Parts and rows are put together by cross_entropy_row.py; the host learns nothing of the targets.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from grokkernels.triton.cross_entropy_row import (
    gradient_of_logits,
    gradient_of_row,
    logsumexp,
    merge_parts,
    reduce_rows,
    squash,
    squash_options,
)
from grokkernels.triton.kernel import kernel
from grokkernels.triton.rows import RowTiles


@kernel
def cross_entropy_fwd_kernel(
    logits_ptr,  # (rows, V), rows logits_stride * UNIT elements apart
    targets_ptr,  # (rows)
    target_z_ptr,  # (rows) float32
    part_lse_ptr,  # (parts, rows) float64
    part_sum_ptr,  # (parts, rows) float32: sums of z, or None
    rows: tl.int64,
    logits_stride: tl.int64,
    targets_stride: tl.int64,
    ignore_index: tl.int64,
    inner: tl.float32,
    cap: tl.float32,
    slope: tl.float32,
    CAPPED: tl.constexpr,
    V: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1).to(tl.int64)
    there = row < rows
    target = tl.load(targets_ptr + row * targets_stride, there, 0).to(tl.int64)
    # Of a row that is ignored, or has no target to speak of, nothing is read.
    counts = there & (target != ignore_index) & (target >= 0) & (target < V)
    x_ptr = logits_ptr + row * logits_stride * UNIT
    column = tl.arange(0, COLUMNS)
    inside = counts[:, None] & (column < V - part * COLUMNS)[None, :]
    x = tl.load((x_ptr + part * COLUMNS)[:, None] + column[None, :], inside, 0.0).to(tl.float32)
    z = squash(x, inner, cap, slope, CAPPED)
    lse = logsumexp(z, inside, logits_ptr.dtype.element_ty == tl.float32)
    tl.store(part_lse_ptr + part * rows + row, lse, there)
    if part_sum_ptr is not None:
        tl.store(part_sum_ptr + part * rows + row, tl.sum(tl.where(inside, z, 0.0), 1), there)
    mine = counts & (target // COLUMNS == part)
    at_target = tl.load(x_ptr + target, mine, 0.0).to(tl.float32)
    tl.store(target_z_ptr + row, squash(at_target, inner, cap, slope, CAPPED), mine)


@kernel
def cross_entropy_bwd_kernel(
    dloss_ptr,  # (rows), or one number with dloss_stride 0
    divisor_ptr,  # () float32: the mean's, or None
    logits_ptr,  # (rows, V), rows logits_stride * UNIT elements apart
    targets_ptr,  # (rows)
    lse_ptr,  # (rows) float64
    dlogits_ptr,  # (rows, V)
    rows: tl.int64,
    dloss_stride: tl.int64,
    logits_stride: tl.int64,
    targets_stride: tl.int64,
    ignore_index: tl.int64,
    inner: tl.float32,
    cap: tl.float32,
    slope: tl.float32,
    twice_z_loss: tl.float32,
    q: tl.float32,
    q_target: tl.float32,
    CAPPED: tl.constexpr,
    V: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    target = tl.load(targets_ptr + row * targets_stride, there, 0).to(tl.int64)
    counts = there & (target != ignore_index)
    word = (target >= 0) & (target < V)
    weight = tl.load(dloss_ptr + row * dloss_stride, there, 0.0)
    if divisor_ptr is not None:
        weight = tl.div_rn(weight, tl.load(divisor_ptr))
    lse, weight, p_factor = gradient_of_row(tl.load(lse_ptr + row, there, 0.0), weight, twice_z_loss)
    weight = tl.where(word, weight, float("nan"))
    first = tl.program_id(1).to(tl.int64) * COLUMNS
    column = tl.arange(0, COLUMNS)
    inside = there[:, None] & (column < V - first)[None, :]
    x_ptr = logits_ptr + row * logits_stride * UNIT + first
    x = tl.load(x_ptr[:, None] + column[None, :], inside & (counts & word)[:, None], 0.0).to(tl.float32)
    target = tl.where(target // COLUMNS == tl.program_id(1), target - first, -1).to(tl.int32)
    dx = gradient_of_logits(
        x, column[None, :] == target[:, None], lse[:, None], weight[:, None], p_factor[:, None],
        inner, cap, slope, q, q_target, CAPPED, logits_ptr.dtype.element_ty == tl.float32,
    )  # fmt: skip
    dx = tl.where(counts[:, None], dx, 0.0).to(dlogits_ptr.dtype.element_ty)
    tl.store((dlogits_ptr + row * V + first)[:, None] + column[None, :], dx, inside)


def _rows_of(logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
    """Logits whose rows are dense, and their distance: in units of 16 elements where it can be, so that the compiler
    knows that rows begin where 16-byte vectors do."""
    logits = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    unit = 16 if logits.stride(0) % 16 == 0 else 1
    return logits, {"logits_stride": logits.stride(0) // unit, "UNIT": unit}


def cross_entropy_fwd(
    logits: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocabulary = logits.shape
    logits, distance = _rows_of(logits)
    tiles = RowTiles.of(vocabulary)
    parts = triton.cdiv(vocabulary, tiles.columns)
    target_z = logits.new_empty((rows,), dtype=torch.float32)
    part_lse = logits.new_empty((parts, rows), dtype=torch.float64)
    part_sum = target_z.new_empty((parts, rows)) if label_smoothing > 0 else None
    cross_entropy_fwd_kernel[(triton.cdiv(rows, tiles.rows), parts)](
        logits, targets, target_z, part_lse, part_sum, rows,
        targets_stride=targets.stride(0), ignore_index=ignore_index, **distance, **squash_options(softcap, logit_scale),
        V=vocabulary, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return merge_parts(
        part_lse, part_sum, target_z, targets, vocabulary, z_loss, label_smoothing, ignore_index, reduction
    )


def cross_entropy_bwd(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> torch.Tensor:
    rows, vocabulary = logits.shape
    logits, distance = _rows_of(logits)
    dlogits = logits.new_empty(logits.shape)
    divisor = None
    if reduction == "mean":
        divisor = dloss.new_empty(())
        reduce_rows(None, targets, divisor, ignore_index, True)
    q = label_smoothing / vocabulary
    tiles = RowTiles.of(vocabulary, per_thread=16 if logits.dtype == torch.float32 else 32)
    cross_entropy_bwd_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(vocabulary, tiles.columns))](
        dloss, divisor, logits, targets, lse.contiguous(), dlogits, rows,
        dloss_stride=dloss.stride(0) if reduction == "none" else 0,
        targets_stride=targets.stride(0), ignore_index=ignore_index, **distance, **squash_options(softcap, logit_scale),
        twice_z_loss=2 * z_loss, q=q, q_target=q + (1 - label_smoothing),
        V=vocabulary, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dlogits


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's vocabulary, and one that fills no vectors."""
    for vocabulary, options in (
        (131072, (30.0, 0.58, 1e-4, 0.1)),
        (131072, (0.0, 1.0, 0.0, 0.0)),
        (50257, (30.0, 1.0, 0.0, 0.0)),
    ):
        logits = torch.empty(8192, vocabulary, dtype=dtype, device="meta")
        targets = torch.empty(8192, dtype=torch.int64, device="meta")
        rest: tuple[Any, ...] = (*options, -100, "mean")
        loss, lse = cross_entropy_fwd(logits, targets, *rest)
        cross_entropy_bwd(loss, logits, targets, lse, *rest)
