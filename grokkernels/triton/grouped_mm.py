"""grouped_mm in Triton: y[r] = x[r] @ w[e] for the rows r of group e, x (M, K), w (E, K, N), and its derivatives.

A program has one tile of one group, which it finds from the offsets on the device: the grid is the most tiles that M
rows in E groups can have, and the few programs without a tile end at once. Rows past the last group are a group of
their own that is filled with zeros. The gradient of x is the same product with w's strides exchanged; that of w has a
program for each tile of each group and goes over the group's rows. (Idea: Gale et al., "MegaBlocks", 2022.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import tuning
from grokkernels.triton.kernel import kernel
from grokkernels.triton.matmul import (
    aligned,
    aligned_stack,
    configs,
    find_tile,
    gathered_tile,
    in_bands,
    right_matrix,
    right_tile,
    row_tiles,
    rows_matrix,
    rows_of_group,
    stacks_alike,
    token_of,
)
from grokkernels.triton.tuning import Config


@kernel
def grouped_mm_kernel(
    x_ptr,  # (rows, DEPTH); with x_pair_ptr of tokens, not of rows
    x_pair_ptr,  # (rows) int32, or None: the pair of each row; a token has TOP_K
    w_ptr,  # (GROUPS, DEPTH, COLS), of the strides W_STACK, W_DEPTH and W_COL, one of the last two 1
    other_x_ptr,  # like x, or None: y is the sum of two products
    other_w_ptr,  # like w, or None
    offsets_ptr,  # (GROUPS) int32
    y_ptr,  # (rows, Y_COLS), the first columns of the product
    rows: tl.int32,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    Y_COLS: tl.constexpr,
    W_STACK: tl.constexpr,
    W_DEPTH: tl.constexpr,
    W_COL: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    ACROSS: tl.constexpr = (Y_COLS + BN - 1) // BN
    tile, across = in_bands(tl.program_id(0), tl.num_programs(0) // ACROSS, ACROSS)
    group, first, end = find_tile(offsets_ptr, tile, rows, GROUPS, BM)
    if group > GROUPS:
        return
    acc = tl.zeros((BM, BN), tl.float32)
    if group < GROUPS:
        w = right_matrix(w_ptr + group.to(tl.int64) * W_STACK, DEPTH, COLS, W_DEPTH, W_COL, BK, BN)
        if x_pair_ptr is None:
            x = rows_matrix(x_ptr, rows, DEPTH, BM, BK)
            for k in range(0, DEPTH, BK):
                right = right_tile(w, k, across * BN, W_COL)
                acc = tl.dot(x.load([first, k]), right, acc, input_precision=PRECISION)
        else:
            token = token_of(x_pair_ptr, first + tl.arange(0, BM), end, TOP_K)
            for k in range(0, DEPTH, BK):
                left = gathered_tile(x_ptr, token, k, DEPTH, BK)
                acc = tl.dot(left, right_tile(w, k, across * BN, W_COL), acc, input_precision=PRECISION)
        if other_x_ptr is not None:
            x = rows_matrix(other_x_ptr, rows, DEPTH, BM, BK)
            w = right_matrix(other_w_ptr + group.to(tl.int64) * W_STACK, DEPTH, COLS, W_DEPTH, W_COL, BK, BN)
            for k in range(0, DEPTH, BK):
                right = right_tile(w, k, across * BN, W_COL)
                acc = tl.dot(x.load([first, k]), right, acc, input_precision=PRECISION)
    row, column = first + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    inside = (row < end)[:, None] & (column < Y_COLS)[None, :]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * Y_COLS + column[None, :], acc.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def rows_tile(
    x, pair_ptr, first, end, column,
    COLS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """BK rows from `first`, BLOCK columns: of the descriptor x, or of the pointer x the rows of pair_ptr's tokens.

    Without WHOLE the rows from `end` on are 0.
    """
    row = first + tl.arange(0, BK)
    if pair_ptr is None:
        tile = x.load([first, column])
    else:
        token = token_of(pair_ptr, row, end, TOP_K)
        place = column + tl.arange(0, BLOCK)
        tile = tl.load(x + token[:, None] * COLS + place[None, :], (place < COLS)[None, :], 0.0)
    return tile if WHOLE else tl.where((row < end)[:, None], tile, tl.zeros_like(tile))


@kernel
def grouped_mm_dw_kernel(
    a_ptr,  # (rows, A_COLS); with a_pair_ptr of tokens, not of rows
    a_pair_ptr,  # (rows) int32, or None: the pair of each row; a token has TOP_K
    b_ptr,  # (rows, B_COLS), likewise
    b_pair_ptr,
    offsets_ptr,  # (groups) int32
    dw_ptr,  # (groups, HEIGHT, WIDTH), the first rows and columns of the products
    rows: tl.int32,
    A_COLS: tl.constexpr,
    B_COLS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    HIGH: tl.constexpr = (HEIGHT + BM - 1) // BM
    ACROSS: tl.constexpr = (WIDTH + BN - 1) // BN
    group = tl.program_id(0) // (HIGH * ACROSS)
    down, across = in_bands(tl.program_id(0) % (HIGH * ACROSS), HIGH, ACROSS)
    begin, end = rows_of_group(offsets_ptr, group, rows)
    a = rows_matrix(a_ptr, rows, A_COLS, BK, BM) if a_pair_ptr is None else a_ptr
    b = rows_matrix(b_ptr, rows, B_COLS, BK, BN) if b_pair_ptr is None else b_ptr
    acc = tl.zeros((BM, BN), tl.float32)
    # The last step leaves out what the next group has there: NaN, maybe, which times 0 would come through.
    whole = begin + (end - begin) // BK * BK
    for first in range(begin, whole, BK):
        left = rows_tile(a, a_pair_ptr, first, end, down * BM, A_COLS, TOP_K, BM, BK, True)
        right = rows_tile(b, b_pair_ptr, first, end, across * BN, B_COLS, TOP_K, BN, BK, True)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    for first in tl.range(whole, end, BK, num_stages=1):
        left = rows_tile(a, a_pair_ptr, first, end, down * BM, A_COLS, TOP_K, BM, BK, False)
        right = rows_tile(b, b_pair_ptr, first, end, across * BN, B_COLS, TOP_K, BN, BK, False)
        acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    row, column = down * BM + tl.arange(0, BM), across * BN + tl.arange(0, BN)
    inside = (row < HEIGHT)[:, None] & (column < WIDTH)[None, :]
    place = (group.to(tl.int64) * HEIGHT + row)[:, None] * WIDTH + column[None, :]
    tl.store(dw_ptr + place, acc.to(dw_ptr.dtype.element_ty), inside)


def product(
    x: torch.Tensor,
    w: torch.Tensor,
    offsets: torch.Tensor,
    dtype: torch.dtype,
    *,
    other: tuple[torch.Tensor, torch.Tensor] | None = None,
    x_pair: torch.Tensor | None = None,
    top_k: int = 1,
) -> torch.Tensor:
    """x (M, K), w (E, K, N) -> (M, N) in `dtype`, the sum with the product of two `other` tensors like them.

    With x_pair (M) int32, x has tokens: row r is x[x_pair[r] // top_k].
    """
    rows, (groups, depth, cols) = (x if x_pair is None else x_pair).shape[0], w.shape
    if depth == 0:
        return x.new_zeros((rows, cols), dtype=dtype)
    if other is None:
        x, (w, other_w), other_x = aligned(x), (aligned_stack(w), None), None
    else:
        x, (w, other_w), other_x = aligned(x), stacks_alike(w, other[1]), aligned(other[0])
    offsets = offsets.contiguous()
    y = x.new_empty((rows, cols), dtype=dtype)

    def launch(config: Config) -> None:
        grid = row_tiles(rows, groups, config.tiles["BM"]) * triton.cdiv(cols, config.tiles["BN"])
        grouped_mm_kernel[(grid,)](
            x, x_pair, w, other_x, other_w, offsets, y, rows,
            GROUPS=groups, DEPTH=w.shape[1], COLS=w.shape[2], Y_COLS=cols, W_STACK=w.stride(0), W_DEPTH=w.stride(1),
            W_COL=w.stride(2), TOP_K=max(top_k, 1), **config.meta(),
        )  # fmt: skip

    key = (groups, depth, cols, w.stride(2) == 1, x.dtype, dtype, other is None, x_pair is None)
    launch(tuning.choose("grouped_mm_kernel", key, configs(x.dtype, cols, depth), launch))
    return y


def products_of_rows(
    a: torch.Tensor,
    b: torch.Tensor,
    offsets: torch.Tensor,
    *,
    a_pair: torch.Tensor | None = None,
    b_pair: torch.Tensor | None = None,
    top_k: int = 1,
) -> torch.Tensor:
    """a (M, K), b (M, N) -> (E, K, N): a_e^T b_e over the rows of each group.

    With a_pair (M) int32, a has tokens: row r is a[a_pair[r] // top_k]; b_pair likewise.
    """
    rows = (a if a_pair is None else a_pair).shape[0]
    groups, a_cols, b_cols = offsets.shape[0], a.shape[1], b.shape[1]
    dw = a.new_empty((groups, a_cols, b_cols))
    a, b, offsets = aligned(a), aligned(b), offsets.contiguous()

    def launch(config: Config) -> None:
        grid = groups * triton.cdiv(a_cols, config.tiles["BM"]) * triton.cdiv(b_cols, config.tiles["BN"])
        grouped_mm_dw_kernel[(grid,)](
            a, a_pair, b, b_pair, offsets, dw, rows, A_COLS=a.shape[1], B_COLS=b.shape[1], HEIGHT=a_cols, WIDTH=b_cols,
            TOP_K=max(top_k, 1), **config.meta(),
        )  # fmt: skip

    key = (groups, a_cols, b_cols, a_pair is None, b_pair is None, a.dtype)
    launch(
        tuning.choose("grouped_mm_dw_kernel", key, configs(a.dtype, b_cols, 64, a_cols)[:1], launch)
    )  # wider ones spill on sm_80
    return dw


def grouped_mm(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    return product(x, w, offsets, x.dtype)


def grouped_mm_bwd(
    dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = product(dy, w.mT, offsets, x.dtype)
    if w.stride(1) == 1 and w.stride(2) != 1:  # dw lies in memory as w does
        return dx, products_of_rows(dy, x, offsets).mT
    return dx, products_of_rows(x, dy, offsets)


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's down projection, as nn.Linear keeps it and as
    it is multiplied, and odd widths."""
    offsets = torch.empty(8, dtype=torch.int32, device="meta")
    for depth, cols in ((32768, 6144), (6143, 6145)):
        x, w = (torch.empty(*shape, dtype=dtype, device="meta") for shape in ((16384, depth), (8, cols, depth)))
        grouped_mm_bwd(grouped_mm(x, w.mT, offsets), x, w.mT, offsets)
