"""dual_rms_norm in Triton: h = residual + x * post_rstd * post_weight, y = h * pre_rstd * pre_weight, over rows of C.

One pass over memory in each direction: a tile of whole rows stays in registers through both of its sums. Backward, with
g = dy * pre_weight, the gradient of h is d = pre_rstd * (g - hhat * mean(g * hhat)) + dh, rounded only where it is
written as dresidual, and that of x is post_rstd * (e - xhat * mean(e * xhat)), e = d * post_weight; a program takes a
share of the rows one tile after another and keeps its sums for both weights in registers. Rows longer than a tile are
read once for each sum forward, and backward go through the kernels of rms_norm twice. (As csrc/cuda/dual_rms_norm.cu.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton.kernel import kernel
from grokkernels.triton.rms_norm import read_scale, rms_norm_bwd
from grokkernels.triton.rows import TILE, RowTiles, sum_of_rows

# Longer rows of 4-byte elements leave the backward pass too few registers.
LONGEST_WIDE = 6144


@triton.jit
def store_h(h_ptr, residual_ptr, at, inside, normed):
    """h = residual + normed, stored, and as rounded: float32."""
    h = (tl.load(residual_ptr + at, inside, 0.0).to(tl.float32) + normed).to(h_ptr.dtype.element_ty)
    tl.store(h_ptr + at, h, inside)
    return h.to(tl.float32)


@kernel
def dual_rms_norm_fwd_kernel(
    x_ptr,  # (rows, C)
    residual_ptr,  # (rows, C)
    post_weight_ptr,  # (C)
    pre_weight_ptr,  # (C)
    y_ptr,  # (rows, C)
    h_ptr,  # (rows, C)
    post_rstd_ptr,  # (rows) float32
    pre_rstd_ptr,  # (rows) float32
    rows: tl.int64,
    eps: tl.float32,
    C: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    if COLUMNS >= C:
        inside = (row < rows)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
        post_rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / C + eps)
        scale = read_scale(post_weight_ptr, column, C, ZERO_CENTERED)
        h = store_h(h_ptr, residual_ptr, at, inside, x * post_rstd[:, None] * scale[None, :])
        pre_rstd = 1.0 / tl.sqrt_rn(tl.sum(h * h, 1) / C + eps)
        scale = read_scale(pre_weight_ptr, column, C, ZERO_CENTERED)
        tl.store(y_ptr + at, (h * pre_rstd[:, None] * scale[None, :]).to(y_ptr.dtype.element_ty), inside)
    else:
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, C, COLUMNS):
            inside = (row < rows)[:, None] & (first + column < C)[None, :]
            x = tl.load(x_ptr + row[:, None] * C + (first + column)[None, :], inside, 0.0).to(tl.float32)
            total += tl.sum(x * x, 1)
        post_rstd = 1.0 / tl.sqrt_rn(total / C + eps)
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, C, COLUMNS):
            inside = (row < rows)[:, None] & (first + column < C)[None, :]
            at = row[:, None] * C + (first + column)[None, :]
            x = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
            scale = read_scale(post_weight_ptr, first + column, C, ZERO_CENTERED)
            h = store_h(h_ptr, residual_ptr, at, inside, x * post_rstd[:, None] * scale[None, :])
            total += tl.sum(h * h, 1)
        pre_rstd = 1.0 / tl.sqrt_rn(total / C + eps)
        for first in range(0, C, COLUMNS):  # the last sum's barrier lies between the writes of h and these reads
            inside = (row < rows)[:, None] & (first + column < C)[None, :]
            at = row[:, None] * C + (first + column)[None, :]
            h = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
            scale = read_scale(pre_weight_ptr, first + column, C, ZERO_CENTERED)
            tl.store(y_ptr + at, (h * pre_rstd[:, None] * scale[None, :]).to(y_ptr.dtype.element_ty), inside)
    tl.store(post_rstd_ptr + row, post_rstd, row < rows)
    tl.store(pre_rstd_ptr + row, pre_rstd, row < rows)


@kernel
def dual_rms_norm_bwd_kernel(
    dy_ptr,  # (rows, C)
    dh_ptr,  # (rows, C), or None: what reaches h beside y
    x_ptr,  # (rows, C)
    h_ptr,  # (rows, C)
    post_weight_ptr,  # (C)
    pre_weight_ptr,  # (C)
    post_rstd_ptr,  # (rows) float32
    pre_rstd_ptr,  # (rows) float32
    dx_ptr,  # (rows, C)
    dresidual_ptr,  # (rows, C)
    post_sums_ptr,  # (programs, C) float32: each program's share of dpost_weight
    pre_sums_ptr,  # (programs, C) float32
    rows: tl.int64,
    chunk: tl.int64,  # rows of a program, a multiple of ROWS
    C: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    post_sums = tl.zeros((COLUMNS,), tl.float32)
    pre_sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(program * chunk, tl.minimum((program + 1) * chunk, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        rstd = tl.load(pre_rstd_ptr + row, row < rows, 0.0)[:, None]
        hhat = tl.load(h_ptr + at, inside, 0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32)
        pre_sums += tl.sum(dy * hhat, 0)
        d = dy * read_scale(pre_weight_ptr, column, C, ZERO_CENTERED)[None, :]
        d = rstd * (d - hhat * (tl.sum(d * hhat, 1)[:, None] / C))
        if dh_ptr is not None:
            d += tl.load(dh_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(dresidual_ptr + at, d.to(dresidual_ptr.dtype.element_ty), inside)
        rstd = tl.load(post_rstd_ptr + row, row < rows, 0.0)[:, None]
        xhat = tl.load(x_ptr + at, inside, 0.0).to(tl.float32) * rstd
        post_sums += tl.sum(d * xhat, 0)
        e = d * read_scale(post_weight_ptr, column, C, ZERO_CENTERED)[None, :]
        dx = rstd * (e - xhat * (tl.sum(e * xhat, 1)[:, None] / C))
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)
    tl.store(post_sums_ptr + program * C + column, post_sums, column < C)
    tl.store(pre_sums_ptr + program * C + column, pre_sums, column < C)


def dual_rms_norm_fwd(
    x: torch.Tensor,
    residual: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    eps: float,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x, residual, post_weight, pre_weight = (t.contiguous() for t in (x, residual, post_weight, pre_weight))
    cols = x.shape[-1]
    rows = x.numel() // max(cols, 1)
    y, h = torch.empty_like(x), torch.empty_like(x)
    post_rstd, pre_rstd = (x.new_empty((rows,), dtype=torch.float32) for _ in range(2))
    tiles = RowTiles.of(cols, per_thread=32 if cols <= TILE else 16)
    dual_rms_norm_fwd_kernel[(triton.cdiv(rows, tiles.rows),)](
        x, residual, post_weight, pre_weight, y, h, post_rstd, pre_rstd, rows, eps,
        C=cols, ZERO_CENTERED=zero_centered, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return y, h, post_rstd, pre_rstd


def dual_rms_norm_bwd(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    x: torch.Tensor,
    h: torch.Tensor,
    post_weight: torch.Tensor,
    pre_weight: torch.Tensor,
    post_rstd: torch.Tensor,
    pre_rstd: torch.Tensor,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    cols = x.shape[-1]
    tiles = RowTiles.of(cols, per_thread=16)
    if cols > (LONGEST_WIDE if x.element_size() == 4 else TILE):  # the gradient of h goes through memory
        dresidual, dpre = rms_norm_bwd(dy, dh, h, pre_weight, pre_rstd, zero_centered)
        dx, dpost = rms_norm_bwd(dresidual, None, x, post_weight, post_rstd, zero_centered)
        return dx, dresidual, dpost, dpre
    dy, x, h, post_weight, pre_weight = (t.contiguous() for t in (dy, x, h, post_weight, pre_weight))
    dh = None if dh is None else dh.contiguous()
    rows = x.numel() // max(cols, 1)
    dx, dresidual = torch.empty_like(x), torch.empty_like(x)
    chunk = max(tiles.chunk(rows), 1)
    programs = triton.cdiv(rows, chunk)
    post_sums, pre_sums = (x.new_empty((programs, cols), dtype=torch.float32) for _ in range(2))
    dual_rms_norm_bwd_kernel[(programs,)](
        dy, dh, x, h, post_weight, pre_weight, post_rstd, pre_rstd, dx, dresidual, post_sums, pre_sums, rows, chunk,
        C=cols, ZERO_CENTERED=zero_centered, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    dpost, dpre = (sum_of_rows(sums, post_weight.dtype) for sums in (post_sums, pre_sums))
    return dx, dresidual, dpost, dpre


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's rows, shorter and longer ones."""
    for cols in (1024, LONGEST_WIDE if dtype == torch.float32 else TILE, 6144, 65536):
        x, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((4096, cols), (cols,)))
        y, h, post_rstd, pre_rstd = dual_rms_norm_fwd(x, x, weight, weight, 1e-5, False)
        dual_rms_norm_bwd(y, h, x, h, weight, weight, post_rstd, pre_rstd, False)
