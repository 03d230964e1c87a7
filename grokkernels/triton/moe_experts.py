"""moe_experts in Triton: y_n = sum over k of weights[n,k] * down_e(act(gate_e x_n) * up_e x_n), e = indices[n,k].

With M = N K rows in expert order (expert_order.py), F hidden columns, w the weight of a row and g = dy_n down_e:

    gate_up    tiles of gate and up share the gathered tokens; act(gate) up before they leave the registers
    down       hidden down_e as float32 rows, which are added up for each token in the order of k
    g          dy down_e, dy gathered, as float32 rows
    between    from a row of g: dgate = w g up act'(gate), dup = w g act(gate), w hidden, and g . hidden, which is dw
    dx         dgate gate_e + dup up_e in one sum, float32 rows, added up likewise
    gradients  dgate_e^T x_e, dup_e^T x_e, dy_e^T (w hidden)_e, tokens gathered as the sum goes over them

No permuted copy of x or dy is made, and nothing is added atomically. The plain products are those of grouped_mm.py.
(The division of labour is that of csrc/cuda/moe_experts.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.activation import activate, value_and_slope
from grokkernels.triton.expert_order import order_by_expert, pairs_of_rows
from grokkernels.triton.grouped_mm import product, products_of_rows
from grokkernels.triton.kernel import kernel
from grokkernels.triton.matmul import (
    aligned,
    find_tile,
    gathered_tile,
    in_bands,
    interpreted,
    right_matrix,
    right_tile,
    row_tiles,
    stacks_alike,
    token_of,
)
from grokkernels.triton.moe_permute import gather, tiles_of
from grokkernels.triton.tuning import Config


@kernel
def moe_gate_up_kernel(
    x_ptr,  # (tokens, DEPTH)
    pair_ptr,  # (rows) int32: the pair of each row; a token has TOP_K
    gate_proj_ptr,  # (GROUPS, DEPTH, COLS), of the strides W_STACK, W_DEPTH and W_COL, one of the last two 1
    up_proj_ptr,  # likewise
    offsets_ptr,  # (GROUPS) int32
    hidden_ptr,  # (rows, F), the first columns of the products
    gate_ptr,  # (rows, F), or None
    up_ptr,
    rows: tl.int32,
    GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    F: tl.constexpr,
    W_STACK: tl.constexpr,
    W_DEPTH: tl.constexpr,
    W_COL: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    ACROSS: tl.constexpr = (F + BN - 1) // BN
    tile, across = in_bands(tl.program_id(0), tl.num_programs(0) // ACROSS, ACROSS)
    group, first, end = find_tile(offsets_ptr, tile, rows, GROUPS, BM)
    if group >= GROUPS:
        return
    row = first + tl.arange(0, BM)
    token = token_of(pair_ptr, row, end, TOP_K)
    stack = group.to(tl.int64) * W_STACK
    gate_proj = right_matrix(gate_proj_ptr + stack, DEPTH, COLS, W_DEPTH, W_COL, BK, BN)
    up_proj = right_matrix(up_proj_ptr + stack, DEPTH, COLS, W_DEPTH, W_COL, BK, BN)
    gate = tl.zeros((BM, BN), tl.float32)
    up = tl.zeros((BM, BN), tl.float32)
    for k in range(0, DEPTH, BK):
        x = gathered_tile(x_ptr, token, k, DEPTH, BK)
        gate = tl.dot(x, right_tile(gate_proj, k, across * BN, W_COL), gate, input_precision=PRECISION)
        up = tl.dot(x, right_tile(up_proj, k, across * BN, W_COL), up, input_precision=PRECISION)
    column = across * BN + tl.arange(0, BN)
    inside = (row < end)[:, None] & (column < F)[None, :]
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    if gate_ptr is not None:
        tl.store(gate_ptr + at, gate.to(gate_ptr.dtype.element_ty), inside)
        tl.store(up_ptr + at, up.to(up_ptr.dtype.element_ty), inside)
    tl.store(hidden_ptr + at, (activate(gate, KIND) * up).to(hidden_ptr.dtype.element_ty), inside)


@kernel
def moe_differentiate_kernel(
    g_ptr,  # (rows, F) float32: the gradient of hidden, before the row's weight
    gate_ptr,  # (rows, F)
    up_ptr,
    pair_ptr,  # (rows) int32, negative for a row without a pair
    weights_ptr,  # (pairs) float32
    dgate_ptr,  # (rows, F)
    dup_ptr,
    scaled_ptr,  # (rows, F): hidden by the row's weight
    dweights_ptr,  # (pairs) float32
    rows: tl.int64,
    F: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.load(pair_ptr + row, row < rows, -1)
    weight = tl.load(weights_ptr + pair, pair >= 0, 0.0)[:, None]
    dot = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, F, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (pair >= 0)[:, None] & (column < F)[None, :]
        at = row[:, None] * F + column[None, :]
        g = tl.load(g_ptr + at, inside, 0.0)
        gate = tl.load(gate_ptr + at, inside, 0.0).to(tl.float32)
        up = tl.load(up_ptr + at, inside, 0.0).to(tl.float32)
        value, slope = value_and_slope(gate, KIND)
        hidden = value * up
        dot += g * hidden
        tl.store(scaled_ptr + at, (weight * hidden).to(scaled_ptr.dtype.element_ty), inside)
        tl.store(dgate_ptr + at, (weight * g * up * slope).to(dgate_ptr.dtype.element_ty), inside)
        tl.store(dup_ptr + at, (weight * g * value).to(dup_ptr.dtype.element_ty), inside)
    tl.store(dweights_ptr + pair, tl.sum(dot, 1), pair >= 0)


def _gate_up_config(dtype: torch.dtype, cols: int, depth: int) -> Config:
    """Two tiles of sums for one of tokens: half as wide as in a plain product."""
    if INTERPRETED:
        return interpreted(cols, depth)
    if dtype == torch.float32:
        return Config({"BM": 128, "BN": 32, "BK": 32}, num_warps=8, num_stages=3)
    return Config({"BM": 128, "BN": 64, "BK": 64}, num_warps=8, num_stages=3)


def moe_experts_fwd(
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    activation: int,
    capacity: int | None,
    keep: bool,
) -> tuple[torch.Tensor, ...]:
    (experts, cols, _), (rows, top_k) = gate_proj.shape, (indices.numel(), indices.shape[1])
    pair = indices.new_empty((rows,))
    slots, offsets = order_by_expert(indices, experts, capacity, pair)
    hidden = x.new_empty((rows, cols))
    gate, up = (x.new_empty((rows if keep else 0, cols)) for _ in range(2))
    tokens, (gate_w, up_w) = aligned(x), stacks_alike(gate_proj.mT, up_proj.mT)

    config = _gate_up_config(x.dtype, cols, x.shape[1])
    grid = row_tiles(rows, experts, config.tiles["BM"]) * triton.cdiv(cols, config.tiles["BN"])
    moe_gate_up_kernel[(grid,)](
        tokens, pair, gate_w, up_w, offsets, hidden, gate if keep else None, up if keep else None, rows,
        GROUPS=experts, TOP_K=max(top_k, 1), DEPTH=gate_w.shape[1], COLS=gate_w.shape[2], F=cols,
        W_STACK=gate_w.stride(0), W_DEPTH=gate_w.stride(1), W_COL=gate_w.stride(2), KIND=activation, **config.meta(),
    )  # fmt: skip
    down = product(hidden, down_proj.mT, offsets, torch.float32)
    return gather(down, weights, slots, x.dtype), gate, up, slots, offsets


def moe_experts_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_proj: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    activation: int,
) -> tuple[torch.Tensor, ...]:
    cols, (rows, top_k) = gate_proj.shape[1], (slots.numel(), slots.shape[1])
    slots, offsets, weights = slots.contiguous(), offsets.contiguous(), weights.contiguous()
    gate, up, pair = gate.contiguous(), up.contiguous(), pairs_of_rows(slots)
    g = product(dy, down_proj, offsets, torch.float32, x_pair=pair, top_k=top_k)
    dgate, dup, scaled = (torch.empty_like(gate) for _ in range(3))
    dweights = torch.zeros_like(weights)
    tiles = tiles_of(rows, cols)
    moe_differentiate_kernel[(triton.cdiv(rows, tiles.rows),)](
        g, gate, up, pair, weights, dgate, dup, scaled, dweights, rows,
        F=cols, KIND=activation, ROWS=tiles.rows, COLUMNS=tiles.columns, num_warps=tiles.num_warps,
    )  # fmt: skip
    dx_rows = product(dgate, gate_proj, offsets, torch.float32, other=(dup, up_proj))
    return (
        gather(dx_rows, None, slots, x.dtype),
        products_of_rows(dgate, x, offsets, b_pair=pair, top_k=top_k),
        products_of_rows(dup, x, offsets, b_pair=pair, top_k=top_k),
        products_of_rows(dy, scaled, offsets, a_pair=pair, top_k=top_k),
        dweights,
    )


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's experts and top-2."""
    x = torch.empty(8192, 6144, dtype=dtype, device="meta")
    up_proj = torch.empty(8, 32768, 6144, dtype=dtype, device="meta")
    weights = torch.empty(8192, 2, device="meta")
    indices = torch.empty(8192, 2, dtype=torch.int32, device="meta")
    y, *kept = moe_experts_fwd(x, up_proj, up_proj, up_proj.mT, weights, indices, 0, None, True)
    moe_experts_bwd(y, x, up_proj, up_proj, up_proj.mT.contiguous(), weights, *kept, 0)
