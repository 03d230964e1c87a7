"""rms_norm in Triton: h = x (+ residual), y = h * rstd * weight, over rows of C columns.

A program has a tile of whole rows in registers from the one read to the last use; a row longer than a tile is read
twice. Backward, a program takes a share of the rows one tile after another and keeps its sums of dy * xhat in
registers; a second kernel adds up what the programs found, so dweight is the same in every run. Of rows longer than a
tile each program sums one tile's columns, and dx is a pass of its own. (How rows are shared out is as in
csrc/cuda/rms_norm.cu.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton.kernel import kernel
from grokkernels.triton.rows import RowTiles, sum_of_rows


@triton.jit
def read_sum(x_ptr, residual_ptr, h_ptr, at, inside):
    """x, or x + residual as rounded, which is also stored: float32."""
    h = tl.load(x_ptr + at, inside, 0.0).to(tl.float32)
    if residual_ptr is not None:
        rounded = (h + tl.load(residual_ptr + at, inside, 0.0).to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at, rounded, inside)
        h = rounded.to(tl.float32)
    return h


@triton.jit
def read_scale(weight_ptr, column, C: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    scale = tl.load(weight_ptr + column, column < C, 0.0).to(tl.float32)
    return 1.0 + scale if ZERO_CENTERED else scale


@kernel
def rms_norm_fwd_kernel(
    x_ptr,  # (rows, C)
    residual_ptr,  # (rows, C), or None
    weight_ptr,  # (C)
    y_ptr,  # (rows, C)
    h_ptr,  # (rows, C) = x + residual, or None
    rstd_ptr,  # (rows) float32
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
        h = read_sum(x_ptr, residual_ptr, h_ptr, at, inside)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(h * h, 1) / C + eps)
        scale = read_scale(weight_ptr, column, C, ZERO_CENTERED)
        tl.store(y_ptr + at, (h * rstd[:, None] * scale[None, :]).to(y_ptr.dtype.element_ty), inside)
    else:
        total = tl.zeros((ROWS,), tl.float32)
        for first in range(0, C, COLUMNS):
            inside = (row < rows)[:, None] & (first + column < C)[None, :]
            h = read_sum(x_ptr, residual_ptr, h_ptr, row[:, None] * C + (first + column)[None, :], inside)
            total += tl.sum(h * h, 1)
        rstd = 1.0 / tl.sqrt_rn(total / C + eps)
        h_ptr = x_ptr if residual_ptr is None else h_ptr
        for first in range(0, C, COLUMNS):
            inside = (row < rows)[:, None] & (first + column < C)[None, :]
            at = row[:, None] * C + (first + column)[None, :]
            h = tl.load(h_ptr + at, inside, 0.0).to(tl.float32)
            scale = read_scale(weight_ptr, first + column, C, ZERO_CENTERED)
            tl.store(y_ptr + at, (h * rstd[:, None] * scale[None, :]).to(y_ptr.dtype.element_ty), inside)
    tl.store(rstd_ptr + row, rstd, row < rows)


@triton.jit
def store_dx(dx_ptr, dh_ptr, at, inside, dx):
    if dh_ptr is not None:
        dx += tl.load(dh_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), inside)


@kernel
def rms_norm_bwd_kernel(
    dy_ptr,  # (rows, C)
    dh_ptr,  # (rows, C), or None: what reaches h beside y
    x_ptr,  # (rows, C)
    weight_ptr,  # (C)
    rstd_ptr,  # (rows) float32
    dx_ptr,  # (rows, C)
    sums_ptr,  # (programs, C) float32: each program's share of dweight
    rows: tl.int64,
    chunk: tl.int64,  # rows of a program, a multiple of ROWS
    C: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for first in range(program * chunk, tl.minimum((program + 1) * chunk, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        at = row[:, None] * C + column[None, :]
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)[:, None]
        xhat = tl.load(x_ptr + at, inside, 0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, inside, 0.0).to(tl.float32)
        sums += tl.sum(dy * xhat, 0)
        # Read again for every tile, from the cache: kept, it would cost registers that rows of 8192 do not have.
        g = dy * read_scale(weight_ptr, column, C, ZERO_CENTERED)[None, :]
        dot = tl.sum(g * xhat, 1)[:, None] / C
        store_dx(dx_ptr, dh_ptr, at, inside, rstd * (g - xhat * dot))
    tl.store(sums_ptr + program * C + column, sums, column < C)


@kernel
def rms_norm_bwd_dx_long_kernel(
    dy_ptr,  # (rows, C)
    dh_ptr,  # (rows, C), or None
    x_ptr,  # (rows, C)
    weight_ptr,  # (C)
    rstd_ptr,  # (rows) float32
    dx_ptr,  # (rows, C)
    C: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for each row."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    dot = 0.0
    for first in range(0, C, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + row * C + column, column < C, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + column, column < C, 0.0).to(tl.float32)
        dot += tl.sum(dy * read_scale(weight_ptr, column, C, ZERO_CENTERED) * (x * rstd), 0)
    for first in range(0, C, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        xhat = tl.load(x_ptr + row * C + column, column < C, 0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + row * C + column, column < C, 0.0).to(tl.float32)
        g = dy * read_scale(weight_ptr, column, C, ZERO_CENTERED)
        store_dx(dx_ptr, dh_ptr, row * C + column, column < C, rstd * (g - xhat * (dot / C)))


@kernel
def rms_norm_bwd_dweight_long_kernel(
    dy_ptr,  # (rows, C)
    x_ptr,  # (rows, C)
    rstd_ptr,  # (rows) float32
    sums_ptr,  # (programs, C) float32
    rows: tl.int64,
    chunk: tl.int64,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for each share of the rows and tile of columns."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((COLUMNS,), tl.float32)
    for row in range(program * chunk, tl.minimum((program + 1) * chunk, rows)):
        x = tl.load(x_ptr + row * C + column, column < C, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * C + column, column < C, 0.0).to(tl.float32)
        sums += dy * (x * tl.load(rstd_ptr + row))
    tl.store(sums_ptr + program * C + column, sums, column < C)


def _forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    residual = None if residual is None else residual.contiguous()
    cols = x.shape[-1]
    rows = x.numel() // max(cols, 1)
    y, rstd = torch.empty_like(x), x.new_empty((rows,), dtype=torch.float32)
    h = None if residual is None else torch.empty_like(x)
    tiles = RowTiles.of(cols, per_thread=32 if x.dtype == torch.float32 else 16)
    rms_norm_fwd_kernel[(triton.cdiv(rows, tiles.rows),)](
        x, residual, weight, y, h, rstd, rows, eps,
        C=cols, ZERO_CENTERED=zero_centered, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return y, h, rstd


def rms_norm_fwd(
    x: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = _forward(x, None, weight, eps, zero_centered)
    return y, rstd


def add_rms_norm_fwd(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    return _forward(x, residual, weight, eps, zero_centered)


def rms_norm_bwd(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    zero_centered: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    dh = None if dh is None else dh.contiguous()
    cols = x.shape[-1]
    rows = x.numel() // max(cols, 1)
    dx = torch.empty_like(x)
    tiles = RowTiles.of(cols, per_thread=16)
    chunk = max(tiles.chunk(rows), 1)
    programs = triton.cdiv(rows, chunk)
    sums = x.new_empty((programs, cols), dtype=torch.float32)
    shape = {"C": cols, "COLUMNS": tiles.columns, "num_warps": tiles.num_warps}
    if tiles.columns >= cols:
        rms_norm_bwd_kernel[(programs,)](
            dy, dh, x, weight, rstd, dx, sums, rows, chunk, ZERO_CENTERED=zero_centered, ROWS=tiles.rows, **shape
        )
    else:
        rms_norm_bwd_dx_long_kernel[(rows,)](dy, dh, x, weight, rstd, dx, ZERO_CENTERED=zero_centered, **shape)
        rms_norm_bwd_dweight_long_kernel[(programs, triton.cdiv(cols, tiles.columns))](
            dy, x, rstd, sums, rows, chunk, **shape
        )
    return dx, sum_of_rows(sums, weight.dtype)


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's rows, with a residual, and very long ones."""
    for cols in (6144, 8192, 65536):
        x, weight = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((4096, cols), (cols,)))
        y, _, rstd = add_rms_norm_fwd(x, x, weight, 1e-5, False)
        rms_norm_bwd(y, x, x, weight, rstd, False)
    rms_norm_fwd(x, weight, 1e-5, False)
