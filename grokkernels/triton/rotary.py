"""rotary in Triton: turns pairs (a, b) of q and k (B, T, H, D) to (a cos - b sin, a sin + b cos), in one launch.

A program takes one token: it finds the row of the tables that belongs to it, reads its cosines and sines once, and
turns tile after tile of heads, of q and then of k. A tile has been read when any of it is written, so in place needs
nothing else. Nothing is known on the host about positions: a token without a row in the tables, or in no sequence, gets
NaN in what turns, and nothing is read for it outside. The gradient is the same kernel with the other sign of sin. (As
csrc/cuda/rotary.cu; Su et al., "RoFormer", 2021.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton.kernel import kernel

# Elements of a tile, whatever the number of heads: no two threads of a program read the same one.
TILE = 2048
# Starts of packed sequences that are looked at together.
STARTS = 256


@triton.jit
def table_row(
    positions_ptr, cu_seqlens_ptr, sequence, token, tokens, sequences, offset, max_position, PER_TOKEN, STARTS
):  # fmt: skip
    """The row of the tables for a token of a sequence, or of a packed tensor; -1: none."""
    inside = token >= 0
    if PER_TOKEN:
        row = tl.load(positions_ptr + sequence * tokens + token)
    else:
        row = token
        if cu_seqlens_ptr is not None:
            begun = 0  # sequences that begin at or before the token; the last of them has it
            for first in range(0, sequences, STARTS):
                place = first + tl.arange(0, STARTS)
                start = tl.load(cu_seqlens_ptr + place, place < sequences, 0)
                begun += tl.sum(((start <= token) & (place < sequences)).to(tl.int32), 0)
            inside = begun > 0
            sequence = tl.maximum(begun - 1, 0)
            start = tl.load(cu_seqlens_ptr + sequence)
            inside = inside & (start <= token) & (token < tl.load(cu_seqlens_ptr + sequence + 1, inside, 0))
            row = token - start
        if positions_ptr is not None:
            row += tl.load(positions_ptr + sequence, inside, 0)
        else:
            row += offset
    inside = inside & (row >= 0) & (row < max_position)
    return tl.where(inside, row, -1)


@triton.jit
def turned(a, b, cos, sin, y_ptr):
    """The turned pair, in the dtype of y."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    first, second = a * cos - b * sin, a * sin + b * cos
    return first.to(y_ptr.dtype.element_ty), second.to(y_ptr.dtype.element_ty)


@triton.jit
def turn_heads(
    x_ptr,  # of this token
    y_ptr,  # of this token
    heads,
    x_head,  # the distance of heads in x
    y_head,
    cos,  # (HALF) float32
    sin,  # (HALF) float32
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INPLACE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    cos, sin = cos[None, :], sin[None, :]
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS).to(tl.int64)[:, None]
        if INTERLEAVED:
            column = tl.arange(0, 2 * HALF)[None, :]
            inside = (head < heads) & (column < 2 * PAIRS)
            x = tl.load(x_ptr + head * x_head + column, inside, 0.0)
            a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
            a, b = turned(a, b, cos, sin, y_ptr)
            y = tl.reshape(tl.join(a, b), (HEADS, 2 * HALF))
            tl.store(y_ptr + head * y_head + column, y, inside)
        else:
            column = tl.arange(0, HALF)[None, :]
            inside = (head < heads) & (column < PAIRS)
            a = tl.load(x_ptr + head * x_head + column, inside, 0.0)
            b = tl.load(x_ptr + head * x_head + column + PAIRS, inside, 0.0)
            a, b = turned(a, b, cos, sin, y_ptr)
            tl.store(y_ptr + head * y_head + column, a, inside)
            tl.store(y_ptr + head * y_head + column + PAIRS, b, inside)
        if REST > 0 and not INPLACE:  # what does not turn
            column = 2 * PAIRS + tl.arange(0, REST)[None, :]
            inside = (head < heads) & (column < D)
            tl.store(y_ptr + head * y_head + column, tl.load(x_ptr + head * x_head + column, inside), inside)


@kernel
def rotary_kernel(
    q_ptr,  # (batch, tokens, q_heads, D), any strides but the last; the strides come in units of VECTOR elements
    k_ptr,  # (batch, tokens, k_heads, D), or None
    q_out_ptr,  # like q, without gaps; in place q itself
    k_out_ptr,
    cos_ptr,  # (max_position, PAIRS) float32
    sin_ptr,
    positions_ptr,  # int64 of each token or each sequence, or None
    cu_seqlens_ptr,  # (sequences + 1) int32 of a packed tensor, or None
    tokens: tl.int64,
    sequences: tl.int64,
    offset: tl.int64,
    max_position: tl.int64,
    q_heads: tl.int64,
    k_heads: tl.int64,
    q_batch: tl.int64,
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    INPLACE: tl.constexpr,
    VECTOR: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    STARTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    batch, token = program // tokens, program % tokens
    row = table_row(
        positions_ptr, cu_seqlens_ptr, batch, token, tokens, sequences, offset, max_position, PER_TOKEN, STARTS
    )
    pair = tl.arange(0, HALF)
    there = pair < tl.where(row < 0, 0, PAIRS)
    cos = tl.load(cos_ptr + row * PAIRS + pair, there, float("nan"))
    sin = tl.load(sin_ptr + row * PAIRS + pair, there, float("nan"))
    sin = -sin if INVERSE else sin

    x_at = batch * (q_batch * VECTOR) + token * (q_token * VECTOR)
    y_at = x_at if INPLACE else program * q_heads * D
    y_head = q_head * VECTOR if INPLACE else D
    turn_heads(
        q_ptr + x_at, q_out_ptr + y_at, q_heads, q_head * VECTOR, y_head, cos, sin,
        D, PAIRS, INTERLEAVED, INPLACE, HEADS, HALF, REST,
    )  # fmt: skip
    if k_ptr is not None:
        x_at = batch * (k_batch * VECTOR) + token * (k_token * VECTOR)
        y_at = x_at if INPLACE else program * k_heads * D
        y_head = k_head * VECTOR if INPLACE else D
        turn_heads(
            k_ptr + x_at, k_out_ptr + y_at, k_heads, k_head * VECTOR, y_head, cos, sin,
            D, PAIRS, INTERLEAVED, INPLACE, HEADS, HALF, REST,
        )  # fmt: skip


def _dense_last_dim(x: torch.Tensor) -> torch.Tensor:
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> list[int]:
    """Of batch, tokens and heads; where there is but one entry the distance is nobody's."""
    strides = [stride if size > 1 else 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True)]
    return strides if x.dim() == 4 else [0, *strides]


def _turn(
    q: torch.Tensor,
    q_out: torch.Tensor,
    k: torch.Tensor | None,
    k_out: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Turns q and k, which have a dense last dim, into q_out and k_out: themselves, or tensors without gaps."""
    if q.numel() == 0 and (k is None or k.numel() == 0):
        return
    batch, tokens = (1, q.shape[0]) if q.dim() == 3 else q.shape[:2]
    dim, pairs = q.shape[-1], cos.shape[1]
    strides = _strides(q) + (_strides(k) if k is not None else [0, 0, 0])
    vector = 16 // q.element_size()
    if any(stride % vector for stride in strides):
        vector = 1
    half = triton.next_power_of_2(max(pairs, 1))
    rotary_kernel[(batch * tokens,)](
        q, k, q_out, k_out, cos.contiguous(), sin.contiguous(),
        None if positions is None else positions.contiguous(), None if cu_seqlens is None else cu_seqlens.contiguous(),
        tokens, batch if cu_seqlens is None else cu_seqlens.numel() - 1, offset, cos.shape[0],
        q.shape[-2], 0 if k is None else k.shape[-2], *(stride // vector for stride in strides),
        D=dim, PAIRS=pairs, INTERLEAVED=interleaved, INVERSE=inverse, INPLACE=q_out is q, VECTOR=vector,
        PER_TOKEN=positions is not None and (positions.dim() == 2 or (q.dim() == 3 and positions.numel() == tokens)),
        HEADS=max(1, TILE // 2 // half), HALF=half, STARTS=STARTS,
        REST=triton.next_power_of_2(dim - 2 * pairs) if dim > 2 * pairs else 0, num_warps=4,
    )  # fmt: skip


def rotary_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    q, k = _dense_last_dim(q), None if k is None else _dense_last_dim(k)
    _turn(q, q_out, k, k_out, cos, sin, positions, offset, cu_seqlens, interleaved, inverse)
    return q_out, q.new_empty((0,)) if k_out is None else k_out


def rotary_inplace(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    offset: int,
    cu_seqlens: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
) -> None:
    dense_q, dense_k = _dense_last_dim(q), None if k is None else _dense_last_dim(k)
    _turn(dense_q, dense_q, dense_k, dense_k, cos, sin, positions, offset, cu_seqlens, interleaved, inverse)
    for x, dense in ((q, dense_q), (k, dense_k)):
        if dense is not x:
            x.copy_(dense)


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's heads, then in place, packed, in part."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    q, k = empty(1, 8192, 48, 128), empty(1, 8192, 8, 128)
    cos = empty(8192, 64, of=torch.float32)
    rotary_fwd(q, k, cos, cos, None, 0, None, False, False)
    rotary_fwd(q, k, cos, cos, None, 0, None, True, True)
    q, k, _ = empty(8192, 64, 128).split((48, 8, 8), dim=1)
    rotary_inplace(q, k, cos, cos, None, 0, empty(9, of=torch.int32), False, False)
    positions = empty(1, 8192, of=torch.int64)
    rotary_fwd(empty(1, 8192, 48, 192), None, cos, cos, positions, 0, None, True, False)
    rotary_fwd(empty(1, 8192, 48, 81), None, empty(8192, 20), cos, positions, 0, None, False, False)
