"""moe_permute and moe_unpermute in Triton: rows of C columns from token order to expert order, and back as a sum.

The order is found by expert_order.py. Every pass over rows goes over tokens: a program reads a tile of tokens once and
writes it to the K places of each, or gathers the K rows of each token and adds them up in float32 in the order of k.
The program of token n also clears those of the rows [n K, (n + 1) K) that no pair has. (The division of labour is that
of csrc/cuda/moe_permute.cu.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.expert_order import order_by_expert, pairs_of_rows
from grokkernels.triton.kernel import kernel
from grokkernels.triton.rows import TOGETHER, RowTiles

# A program has at most so many columns of a row at once.
TILE = 2048


@kernel
def scatter_kernel(
    x_ptr,  # (tokens, C)
    slots_ptr,  # (tokens, TOP_K) int32
    offsets_ptr,  # (experts) int32
    rows_ptr,  # (tokens * TOP_K, C)
    tokens: tl.int64,
    experts: tl.int64,
    C: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = token < tokens
    x = tl.load(x_ptr + token[:, None] * C + column, here[:, None] & (column < C), 0.0)
    used = tl.load(offsets_ptr + experts - 1)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        slot = tl.load(slots_ptr + pair, here, -1).to(tl.int64)
        tl.store(rows_ptr + slot[:, None] * C + column, x, (slot >= 0)[:, None] & (column < C))
        unused = (here & (pair >= used))[:, None] & (column < C)
        tl.store(rows_ptr + pair[:, None] * C + column, tl.zeros((ROWS, COLUMNS), rows_ptr.dtype.element_ty), unused)


@kernel
def gather_kernel(
    y_ptr,  # (tokens * TOP_K, C)
    weights_ptr,  # (tokens, TOP_K) float32, or None: 1
    slots_ptr,  # (tokens, TOP_K) int32
    out_ptr,  # (tokens, C)
    tokens: tl.int64,
    C: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    here = token < tokens
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(TOP_K):
        slot = tl.load(slots_ptr + token * TOP_K + k, here, -1).to(tl.int64)
        named = (slot >= 0) & (slot < tokens * TOP_K)
        y = tl.load(y_ptr + slot[:, None] * C + column, named[:, None] & (column < C), 0.0).to(tl.float32)
        if weights_ptr is not None:
            y *= tl.load(weights_ptr + token * TOP_K + k, named, 0.0)[:, None]
        total += y
    tl.store(out_ptr + token[:, None] * C + column, total.to(out_ptr.dtype.element_ty), here[:, None] & (column < C))


@kernel
def moe_unpermute_bwd_kernel(
    dout_ptr,  # (tokens, C)
    y_ptr,  # (tokens * TOP_K, C)
    weights_ptr,  # (tokens, TOP_K) float32
    slots_ptr,  # (tokens, TOP_K) int32
    pair_ptr,  # (tokens * TOP_K) int32: negative for a row that no slot names
    dy_ptr,  # (tokens * TOP_K, C)
    dweights_ptr,  # (tokens, TOP_K) float32
    tokens: tl.int64,
    C: tl.constexpr,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The K pairs of a token one after another: its row of dout is read from memory once, then from the caches."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    here = token < tokens
    for k in range(TOP_K):
        pair = token * TOP_K + k
        slot = tl.load(slots_ptr + pair, here, -1).to(tl.int64)
        named = (slot >= 0) & (slot < tokens * TOP_K)
        unused = here & (tl.load(pair_ptr + pair, here, 0) < 0)
        weight = tl.load(weights_ptr + pair, named, 0.0)[:, None]
        dot = tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(0, C, COLUMNS):
            column = (first + tl.arange(0, COLUMNS))[None, :]
            inside = named[:, None] & (column < C)
            dout = tl.load(dout_ptr + token[:, None] * C + column, inside, 0.0).to(tl.float32)
            dot += dout * tl.load(y_ptr + slot[:, None] * C + column, inside, 0.0).to(tl.float32)
            tl.store(dy_ptr + slot[:, None] * C + column, (weight * dout).to(dy_ptr.dtype.element_ty), inside)
            nothing = tl.zeros((ROWS, COLUMNS), dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + pair[:, None] * C + column, nothing, unused[:, None] & (column < C))
        tl.store(dweights_ptr + pair, tl.sum(dot, 1), here)


def tiles_of(tokens: int, cols: int) -> RowTiles:
    """Whole short rows side by side, or pieces of a long one: 16 elements for each thread."""
    columns = min(triton.next_power_of_2(max(cols, 1)), TILE)
    rows = max(1, TOGETHER // columns)
    if INTERPRETED:
        rows = min(rows, triton.next_power_of_2(max(tokens, 1)))
    return RowTiles(rows, columns, max(1, min(4, rows * columns // 512)))


def gather(y: torch.Tensor, weights: torch.Tensor | None, slots: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """y (N * K, C), weights (N, K), slots (N, K) -> (N, C) in `dtype`: sum over k of weights[n,k] * y[slots[n,k]]."""
    y, slots = y.contiguous(), slots.contiguous()
    weights = None if weights is None else weights.contiguous()
    (tokens, top_k), cols = slots.shape, y.shape[1]
    out = y.new_empty((tokens, cols), dtype=dtype)
    tiles = tiles_of(tokens, cols)
    gather_kernel[(triton.cdiv(tokens, tiles.rows), triton.cdiv(cols, tiles.columns))](
        y, weights, slots, out, tokens,
        C=cols, TOP_K=top_k, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return out


def moe_permute_fwd(
    x: torch.Tensor, indices: torch.Tensor, num_experts: int, capacity: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    slots, offsets = order_by_expert(indices, num_experts, capacity)
    (tokens, top_k), cols = slots.shape, x.shape[1]
    rows = x.new_empty((tokens * top_k, cols))
    tiles = tiles_of(tokens, cols)
    scatter_kernel[(triton.cdiv(tokens, tiles.rows), triton.cdiv(cols, tiles.columns))](
        x, slots, offsets, rows, tokens, num_experts,
        C=cols, TOP_K=top_k, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return rows, slots, offsets


def moe_permute_bwd(drows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return gather(drows, None, slots, drows.dtype)


def moe_unpermute_fwd(y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return gather(y, weights, slots, y.dtype)


def moe_unpermute_bwd(
    dout: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dout, y, weights, slots = dout.contiguous(), y.contiguous(), weights.contiguous(), slots.contiguous()
    (tokens, top_k), cols = slots.shape, y.shape[1]
    dy, dweights = torch.empty_like(y), torch.empty_like(weights)
    tiles = tiles_of(tokens, cols)
    moe_unpermute_bwd_kernel[(triton.cdiv(tokens, tiles.rows),)](
        dout, y, weights, slots, pairs_of_rows(slots), dy, dweights, tokens,
        C=cols, TOP_K=top_k, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dy, dweights


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's eight experts, top-2."""
    x = torch.empty(8192, 6144, dtype=dtype, device="meta")
    indices = torch.empty(8192, 2, dtype=torch.int32, device="meta")
    weights = torch.empty(8192, 2, dtype=torch.float32, device="meta")
    rows, slots, _ = moe_permute_fwd(x, indices, 8, None)
    dx = moe_permute_bwd(rows, slots)
    moe_unpermute_bwd(moe_unpermute_fwd(dx.new_empty(rows.shape), weights, slots), rows, weights, slots)
