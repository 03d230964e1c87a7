"""merge_attention_states in Triton: o = s1 o1 + s2 o2 over rows (B, T, H) of D, lse = log(e^lse1 + e^lse2), where
s_i = e^(lse_i - lse), and the gradients of all four.

One pass over memory in each direction; a program takes a tile of rows, whatever heads and tokens they are. Backward,
with delta = do . (o1 - o2): do_i = s_i do, dlse1 = s1 (dlse + s2 delta), dlse2 = s2 (dlse - s1 delta); nothing is saved
but the arguments. Where both states are dead (lse -inf) shares are 0, the result is 0 with lse -inf, and so is every
gradient. (As csrc/cuda/merge_attention_states.cu; Milakov and Gimelshein, "Online normalizer calculation for softmax",
2018.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.kernel import kernel

# Elements of a tile: 16 of each tensor for each of 128 threads; the interpreter takes more.
TILE = 65536 if INTERPRETED else 2048


@triton.jit
def rows_of_program(batches, tokens, heads, ROWS: tl.constexpr):
    """Batch, token and head of the program's rows, where their statistics lie in (B, H, T), and which are there."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head, token = row % heads, (row // heads) % tokens
    batch = row // (heads * tokens)
    return row, batch, token, head, (batch * heads + head) * tokens + token, batch < batches


@triton.jit
def shares(lse1, lse2):
    """The weights of the two states, and the logarithm of their sum."""
    top = tl.maximum(lse1, lse2)
    top = tl.where(top == float("-inf"), 0.0, top)
    first, second = tl.exp(lse1 - top), tl.exp(lse2 - top)
    total = first + second
    divisor = tl.where(total == 0.0, 1.0, total)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(divisor))
    return first / divisor, second / divisor, lse


@kernel
def merge_attention_states_fwd_kernel(
    o1_ptr,  # (batches, tokens, heads, D), any strides but the last; the strides come in units of VECTOR elements
    o2_ptr,
    lse1_ptr,  # (batches, heads, tokens) float32
    lse2_ptr,
    o_ptr,  # (batches, tokens, heads, D)
    lse_ptr,  # (batches, heads, tokens)
    batches: tl.int64,
    tokens: tl.int64,
    heads: tl.int64,
    o1_batch: tl.int64,
    o1_token: tl.int64,
    o1_head: tl.int64,
    o2_batch: tl.int64,
    o2_token: tl.int64,
    o2_head: tl.int64,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, batch, token, head, statistic, there = rows_of_program(batches, tokens, heads, ROWS)
    lse1, lse2 = tl.load(lse1_ptr + statistic, there, 0.0), tl.load(lse2_ptr + statistic, there, 0.0)
    first, second, lse = shares(lse1, lse2)
    tl.store(lse_ptr + statistic, lse, there)
    o1_ptr += (batch * (o1_batch * VECTOR) + token * (o1_token * VECTOR) + head * (o1_head * VECTOR))[:, None]
    o2_ptr += (batch * (o2_batch * VECTOR) + token * (o2_token * VECTOR) + head * (o2_head * VECTOR))[:, None]
    for begin in range(0, D, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        inside = there[:, None] & (column < D)
        o1 = tl.load(o1_ptr + column, inside, 0.0).to(tl.float32)
        o2 = tl.load(o2_ptr + column, inside, 0.0).to(tl.float32)
        o = first[:, None] * o1 + second[:, None] * o2
        tl.store(o_ptr + row[:, None] * D + column, o.to(o_ptr.dtype.element_ty), inside)


@kernel
def merge_attention_states_bwd_kernel(
    dout_ptr,  # (batches, tokens, heads, D), any strides but the last
    o1_ptr,
    o2_ptr,
    dlse_ptr,  # (batches, heads, tokens) float32, or None
    lse1_ptr,
    lse2_ptr,
    do1_ptr,  # (batches, tokens, heads, D)
    do2_ptr,
    dlse1_ptr,  # (batches, heads, tokens) float32
    dlse2_ptr,
    batches: tl.int64,
    tokens: tl.int64,
    heads: tl.int64,
    dout_batch: tl.int64,
    dout_token: tl.int64,
    dout_head: tl.int64,
    o1_batch: tl.int64,
    o1_token: tl.int64,
    o1_head: tl.int64,
    o2_batch: tl.int64,
    o2_token: tl.int64,
    o2_head: tl.int64,
    D: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, batch, token, head, statistic, there = rows_of_program(batches, tokens, heads, ROWS)
    lse1, lse2 = tl.load(lse1_ptr + statistic, there, 0.0), tl.load(lse2_ptr + statistic, there, 0.0)
    first, second, _ = shares(lse1, lse2)
    dout_ptr += (batch * (dout_batch * VECTOR) + token * (dout_token * VECTOR) + head * (dout_head * VECTOR))[:, None]
    o1_ptr += (batch * (o1_batch * VECTOR) + token * (o1_token * VECTOR) + head * (o1_head * VECTOR))[:, None]
    o2_ptr += (batch * (o2_batch * VECTOR) + token * (o2_token * VECTOR) + head * (o2_head * VECTOR))[:, None]
    delta = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, D, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)[None, :]
        inside = there[:, None] & (column < D)
        dout = tl.load(dout_ptr + column, inside, 0.0).to(tl.float32)
        o1 = tl.load(o1_ptr + column, inside, 0.0).to(tl.float32)
        o2 = tl.load(o2_ptr + column, inside, 0.0).to(tl.float32)
        delta += tl.sum(dout * (o1 - o2), 1)
        at = row[:, None] * D + column
        tl.store(do1_ptr + at, (first[:, None] * dout).to(do1_ptr.dtype.element_ty), inside)
        tl.store(do2_ptr + at, (second[:, None] * dout).to(do2_ptr.dtype.element_ty), inside)
    dlse = 0.0
    if dlse_ptr is not None:
        dlse = tl.load(dlse_ptr + statistic, there, 0.0)
    tl.store(dlse1_ptr + statistic, first * (dlse + second * delta), there)
    tl.store(dlse2_ptr + statistic, second * (dlse - first * delta), there)


def _launch(
    kernel_function, rows: tuple[torch.Tensor, ...], statistics: tuple[torch.Tensor | None, ...], *outputs: torch.Tensor
) -> None:
    """`rows` (B, T, H, D) of any strides, `statistics` (B, H, T), `outputs` without gaps."""
    batches, tokens, heads, dim = rows[0].shape
    rows = tuple(o if dim == 1 or o.stride(3) == 1 else o.contiguous() for o in rows)
    # Where there is but one entry the distance is nobody's.
    strides = [stride if size > 1 else 0 for o in rows for stride, size in zip(o.stride()[:3], o.shape, strict=False)]
    vector = 16 // rows[0].element_size()
    if any(stride % vector for stride in strides):
        vector = 1
    columns = min(triton.next_power_of_2(max(dim, 1)), TILE)
    tile = max(1, TILE // columns // (1 if vector > 1 else 4))  # off the grid a thread works on many rows at once
    kernel_function[(triton.cdiv(batches * tokens * heads, tile),)](
        *rows, *(None if lse is None else lse.contiguous() for lse in statistics), *outputs,
        batches, tokens, heads, *(stride // vector for stride in strides),
        D=dim, VECTOR=vector, ROWS=tile, COLUMNS=columns, num_warps=4,
    )  # fmt: skip


def merge_attention_states_fwd(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)
    _launch(merge_attention_states_fwd_kernel, (o1, o2), (lse1, lse2), o, lse)
    return o, lse


def merge_attention_states_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    o1: torch.Tensor,
    lse1: torch.Tensor,
    o2: torch.Tensor,
    lse2: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    do1, do2 = (o1.new_empty(o1.shape) for _ in range(2))
    dlse1, dlse2 = (lse1.new_empty(lse1.shape) for _ in range(2))
    _launch(merge_attention_states_bwd_kernel, (dout, o1, o2), (dlse, lse1, lse2), do1, do2, dlse1, dlse2)
    return do1, do2, dlse1, dlse2


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's heads, then off the grid and long rows."""
    for dim in (128, 81, 4096):
        o = torch.empty(1, 8192, 48, dim, dtype=dtype, device="meta")
        lse = torch.empty(1, 48, 8192, device="meta")
        o, lse = merge_attention_states_fwd(o, lse, o, lse)
        merge_attention_states_bwd(o, lse, o, lse, o, lse)
    merge_attention_states_bwd(o, None, o, lse, o, lse)
