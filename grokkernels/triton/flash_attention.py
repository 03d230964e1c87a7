"""flash_attention in Triton: o = softmax(scores) v, for batches of equal sequences and for packed ones.

Forward, a program has a tile of query rows (the heads of a group are rows of one tile) and walks over the keys that any
of them sees with a running maximum and sum (FlashAttention-2, arXiv:2307.08691). Exponentials are powers of two, so a
plain score costs one multiply-add and one exponential. Tiles that all rows see whole run through a loop without masks.

Backward, one kernel owns query rows and makes dq, and delta = rowsum(o * do) - dlse beforehand; the other owns keys and
makes dk and dv from scores multiplied transposed, so that p and ds are left operands as they lie. Scores and dp are
formed twice, 7 products instead of 5; in return there are no atomics, and gradients repeat bit for bit.

Kept from forward: lse, and `top` and `inv`, the maximum as raw as the scores (see raw_score) and the inverse of the
sum: p = exp2((raw - top) * factor) * inv. (exp(score - lse) would carry the rounding of lse into every p.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.attention_scores import (
    LN_2,
    LOG2_E,
    clamp,
    first_position,
    limit,
    place,
    power,
    raw_score,
    split,
    stretch,
    temperature_at,
    visible,
)
from grokkernels.triton.kernel import kernel

# Positions and windows are taken to be below it, a longer window to be none: they are int32 in the kernels.
FAR = 1 << 29


@triton.jit
def load(x_ptr, at, inside, first, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr = 0):
    """Columns `first` to `first` + COLUMNS of the rows that begin at offsets `at`; zeros past the WIDTH and where not
    `inside` (None: everywhere inside). REACH: columns that all calls together ask for, where it may be past the WIDTH.
    """
    column = first + tl.arange(0, COLUMNS)
    where = x_ptr + at[:, None] + column[None, :]
    if WIDTH % COLUMNS == 0 and REACH <= WIDTH:
        if inside is None:
            return tl.load(where)
        else:
            return tl.load(where, inside[:, None], 0.0)
    elif inside is None:
        return tl.load(where, (column < WIDTH)[None, :], 0.0)
    else:
        return tl.load(where, inside[:, None] & (column < WIDTH)[None, :], 0.0)


@triton.jit
def store(x_ptr, at, inside, first, x, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, REACH: tl.constexpr = 0):
    column = first + tl.arange(0, COLUMNS)
    inside = inside[:, None]
    if WIDTH % COLUMNS != 0 or REACH > WIDTH:
        inside = inside & (column < WIDTH)[None, :]
    tl.store(x_ptr + at[:, None] + column[None, :], x.to(x_ptr.dtype.element_ty), inside)


@triton.jit
def products(
    a, b, a_ptr, a_at, a_inside, b_ptr, b_at, b_inside,
    A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a b^T of tiles (A, WIDTH) and (B, WIDTH); where not at hand (None) they are read STEP columns at a time."""
    if a is not None:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)
    else:
        total = tl.zeros((A, B), tl.float32)
        for first in range(0, WIDTH, STEP):
            a_part = load(a_ptr, a_at, a_inside, first, WIDTH, STEP)
            b_part = load(b_ptr, b_at, b_inside, first, WIDTH, STEP)
            total = tl.dot(a_part, tl.trans(b_part), total, input_precision=PRECISION)
        return total


@triton.jit
def attend(
    total, top, sum, q, q_ptr, q_at, here, k_ptr, v_ptr, first, last, seen_end, k_row, v_row,
    position, begin, end, temperature, slope, inner, cap, factor, column,
    CAPPED: tl.constexpr, GENERAL: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from `first` to `last`, into the (rows, OUT) total and the rows' maxima and sums."""
    lane = tl.arange(0, KEYS)
    for from_key in range(first, last, KEYS):
        key = from_key + lane
        inside = key < seen_end if MASKED else None
        k_tile = k_ptr + from_key * k_row.to(tl.int64)
        v_tile = v_ptr + from_key * v_row.to(tl.int64)
        k = load(k_tile, lane * k_row, inside, 0, D, PADDED) if STEP == PADDED else None
        qk = products(q, k, q_ptr, q_at, here, k_tile, lane * k_row, inside, ROWS, KEYS, D, STEP, PRECISION)
        raw, _ = raw_score(
            qk, position[:, None], key[None, :], temperature, slope, inner, cap, CAPPED=CAPPED, GENERAL=GENERAL
        )
        if MASKED:
            raw = tl.minimum(raw, limit(key[None, :], begin[:, None], end[:, None], WINDOWED))
        new_top = tl.maximum(top, tl.max(raw, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
        p = power(raw, shift[:, None], factor, k_ptr.dtype.element_ty)
        shrink = tl.exp2((top - shift) * factor)
        sum = sum * shrink + tl.sum(p, 1)
        v = load(v_tile, lane * v_row, inside, column, DV, OUT)
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return total, top, sum


@kernel
def flash_attention_fwd_kernel(
    q_ptr,  # (batch, queries, KV_HEADS * GROUP, D) or packed (queries, ...), by its strides
    k_ptr,  # (batch, keys, KV_HEADS, D)
    v_ptr,  # (batch, keys, KV_HEADS, DV)
    cu_seqlens_q_ptr,  # (batch + 1) int32, or None
    cu_seqlens_k_ptr,  # (batch + 1) int32, or None
    q_start_ptr,  # (batch) int64, or None
    sinks_ptr,  # (H) float32, or None
    slopes_ptr,  # (H) or (batch, H) float32, or None
    o_ptr,  # (batch, queries, H, DV)
    lse_ptr,  # (batch, H, queries) float32, as top and inv
    top_ptr,
    inv_ptr,
    tiles: tl.int32,
    batch: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    q_batch: tl.int64,  # strides, in units of UNIT elements
    q_row: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_row: tl.int32,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_row: tl.int32,
    v_head: tl.int64,
    slopes_batch: tl.int32,
    left: tl.int32,
    right: tl.int32,
    temperature_len: tl.int32,
    log2_len: tl.float32,
    inner: tl.float32,
    cap: tl.float32,
    factor: tl.float32,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CAPPED: tl.constexpr,
    GENERAL: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,  # columns of q and k that are multiplied at a time
    OUT: tl.constexpr,  # columns of o that a program makes
    PRECISION: tl.constexpr,
):
    H: tl.constexpr = KV_HEADS * GROUP
    PARTS: tl.constexpr = (DV + OUT - 1) // OUT
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # under a causal mask the longest first
    kv_head = (program % KV_HEADS).to(tl.int64)
    column = program // KV_HEADS % PARTS * OUT
    number = program // (KV_HEADS * PARTS)
    b, tile = place(number, tiles, cu_seqlens_q_ptr, queries, batch, GROUP, ROWS)
    first_query, count = stretch(b, queries, batch, cu_seqlens_q_ptr)
    first_key, key_count = stretch(b, keys, batch, cu_seqlens_k_ptr)
    start = first_position(b, count, key_count, batch, q_start_ptr)
    rows = count * GROUP
    first_row = tile * ROWS
    if (tile < 0) | (first_row >= rows):
        return
    own = tl.where(b < batch, rows, 0)  # rows that belong to a sequence
    key_count = tl.where(b < batch, key_count, 0)

    row = first_row + tl.arange(0, ROWS)
    here = row < rows
    head = kv_head * GROUP + row % GROUP
    position = start + row // GROUP
    begin, end = visible(position, key_count, left, right)
    first_begin, first_end = visible(start + first_row // GROUP, key_count, left, right)
    last_begin, last_end = visible(start + (tl.minimum(first_row + ROWS, rows) - 1) // GROUP, key_count, left, right)
    near, far = split(first_begin, last_begin, first_end, last_end, KEYS)

    if cu_seqlens_q_ptr is None:
        q_ptr += b * (q_batch * UNIT)
        k_ptr += b * (k_batch * UNIT)
        v_ptr += b * (v_batch * UNIT)
    q_ptr += first_query * (q_row * UNIT) + kv_head * GROUP * (q_head * UNIT)
    k_ptr += first_key * (k_row * UNIT) + kv_head * (k_head * UNIT)
    v_ptr += first_key * (v_row * UNIT) + kv_head * (v_head * UNIT)
    q_at = row // GROUP * (q_row * UNIT) + row % GROUP * (q_head * UNIT)
    q = load(q_ptr, q_at, here, 0, D, PADDED) if STEP == PADDED else None

    temperature = temperature_at(position, log2_len, temperature_len)[:, None] if TEMPERATURE else None
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * slopes_batch + head, row < own, 0.0)[:, None]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    if sinks_ptr is not None:  # the first entry of the running maximum and sum
        top = tl.load(sinks_ptr + head, row < own, float("-inf")) * (LOG2_E / factor)
    sum = tl.where(top == float("-inf"), 0.0, 1.0)
    total = tl.zeros((ROWS, OUT), tl.float32)
    if WINDOWED:
        total, top, sum = attend(
            total, top, sum, q, q_ptr, q_at, here, k_ptr, v_ptr, first_begin, near, last_end,
            k_row * UNIT, v_row * UNIT, position, begin, end, temperature, slope, inner, cap, factor, column,
            CAPPED, GENERAL, WINDOWED, True, PRECISION, D, DV, PADDED, STEP, OUT, ROWS, KEYS,
        )  # fmt: skip
    total, top, sum = attend(
        total, top, sum, q, q_ptr, q_at, here, k_ptr, v_ptr, near, far, last_end,
        k_row * UNIT, v_row * UNIT, position, begin, end, temperature, slope, inner, cap, factor, column,
        CAPPED, GENERAL, WINDOWED, False, PRECISION, D, DV, PADDED, STEP, OUT, ROWS, KEYS,
    )  # fmt: skip
    total, top, sum = attend(
        total, top, sum, q, q_ptr, q_at, here, k_ptr, v_ptr, far, last_end, last_end,
        k_row * UNIT, v_row * UNIT, position, begin, end, temperature, slope, inner, cap, factor, column,
        CAPPED, GENERAL, WINDOWED, True, PRECISION, D, DV, PADDED, STEP, OUT, ROWS, KEYS,
    )  # fmt: skip

    dead = sum == 0.0
    inv = tl.where(dead, 0.0, 1.0 / tl.where(dead, 1.0, sum))
    if cu_seqlens_q_ptr is None:
        at = (b * H + head) * queries + row // GROUP
        o_ptr += b * queries * (H * DV)
    else:
        at = head * queries + first_query + row // GROUP
    if column == 0:
        top = tl.where(dead, 0.0, top)
        lse = tl.where(dead, float("-inf"), top * (factor * LN_2) + tl.log(tl.where(dead, 1.0, sum)))
        tl.store(lse_ptr + at, lse, here)
        tl.store(top_ptr + at, top, here)
        tl.store(inv_ptr + at, inv, here)
    at = (first_query + row // GROUP) * (H * DV) + head * DV
    store(o_ptr, at, here, column, total * inv[:, None], DV, OUT)


@triton.jit
def dq_step(
    dq, share, q, do, q_ptr, q_at, do_ptr, do_at, here, k_ptr, v_ptr, first, last, seen_end, k_row, v_row,
    position, begin, end, top, inv, delta, temperature, slope, inner, cap, factor, column,
    CAPPED: tl.constexpr, GENERAL: tl.constexpr, SINKS: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, STEP: tl.constexpr, OUT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of keys from `first` to `last`, into dq divided by the scale; and rowsum(p * dp) for the sinks."""
    lane = tl.arange(0, KEYS)
    for from_key in range(first, last, KEYS):
        key = from_key + lane
        inside = key < seen_end if MASKED else None
        k_tile = k_ptr + from_key * k_row.to(tl.int64)
        v_tile = v_ptr + from_key * v_row.to(tl.int64)
        k = load(k_tile, lane * k_row, inside, 0, D, PADDED) if STEP == PADDED else None
        v = load(v_tile, lane * v_row, inside, 0, DV, PADDED) if STEP == PADDED else None
        qk = products(q, k, q_ptr, q_at, here, k_tile, lane * k_row, inside, ROWS, KEYS, D, STEP, PRECISION)
        raw, derivative = raw_score(
            qk, position[:, None], key[None, :], temperature, slope, inner, cap, CAPPED=CAPPED, GENERAL=GENERAL
        )
        if MASKED:
            raw = tl.minimum(raw, limit(key[None, :], begin[:, None], end[:, None], WINDOWED))
        p = power(raw, top[:, None], factor, k_ptr.dtype.element_ty) * inv[:, None]
        dp = products(do, v, do_ptr, do_at, here, v_tile, lane * v_row, inside, ROWS, KEYS, DV, STEP, PRECISION)
        if SINKS:
            share += tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None]) * derivative
        k_out = k if STEP == PADDED and OUT == PADDED else load(k_tile, lane * k_row, inside, column, D, OUT)
        dq = tl.dot(ds.to(k_out.dtype), k_out, dq, input_precision=PRECISION)
    return dq, share


@kernel
def flash_attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,  # (batch, queries, H, DV), dense
    do_ptr,  # the same, by its strides
    top_ptr,
    inv_ptr,
    dlse_ptr,  # (batch, H, queries) float32, or None
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_start_ptr,
    slopes_ptr,
    dq_ptr,  # (batch, queries, H, D)
    delta_ptr,  # (batch, H, queries) float32: rowsum(o * do) - dlse
    share_ptr,  # the same: rowsum(p * dp) - dlse, or None where there are no sinks
    tiles: tl.int32,
    batch: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    q_batch: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_row: tl.int32,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_row: tl.int32,
    v_head: tl.int64,
    do_batch: tl.int64,
    do_row: tl.int64,
    do_head: tl.int64,
    slopes_batch: tl.int32,
    left: tl.int32,
    right: tl.int32,
    temperature_len: tl.int32,
    log2_len: tl.float32,
    inner: tl.float32,
    cap: tl.float32,
    factor: tl.float32,
    scale: tl.float32,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CAPPED: tl.constexpr,
    GENERAL: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H: tl.constexpr = KV_HEADS * GROUP
    PARTS: tl.constexpr = (D + OUT - 1) // OUT
    SINKS: tl.constexpr = share_ptr is not None
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = (program % KV_HEADS).to(tl.int64)
    column = program // KV_HEADS % PARTS * OUT
    number = program // (KV_HEADS * PARTS)
    b, tile = place(number, tiles, cu_seqlens_q_ptr, queries, batch, GROUP, ROWS)
    first_query, count = stretch(b, queries, batch, cu_seqlens_q_ptr)
    first_key, key_count = stretch(b, keys, batch, cu_seqlens_k_ptr)
    start = first_position(b, count, key_count, batch, q_start_ptr)
    rows = count * GROUP
    first_row = tile * ROWS
    if (tile < 0) | (first_row >= rows):
        return
    own = tl.where(b < batch, rows, 0)
    key_count = tl.where(b < batch, key_count, 0)

    row = first_row + tl.arange(0, ROWS)
    here = row < rows
    head = kv_head * GROUP + row % GROUP
    position = start + row // GROUP
    begin, end = visible(position, key_count, left, right)
    first_begin, first_end = visible(start + first_row // GROUP, key_count, left, right)
    last_begin, last_end = visible(start + (tl.minimum(first_row + ROWS, rows) - 1) // GROUP, key_count, left, right)
    near, far = split(first_begin, last_begin, first_end, last_end, KEYS)

    at = head * queries + first_query + row // GROUP
    if cu_seqlens_q_ptr is None:
        at += b * H * queries
        q_ptr += b * (q_batch * UNIT)
        k_ptr += b * (k_batch * UNIT)
        v_ptr += b * (v_batch * UNIT)
        do_ptr += b * (do_batch * UNIT)
        o_ptr += b * queries * (H * DV)
        dq_ptr += b * queries * (H * D)
    q_ptr += first_query * (q_row * UNIT) + kv_head * GROUP * (q_head * UNIT)
    do_ptr += first_query * (do_row * UNIT) + kv_head * GROUP * (do_head * UNIT)
    o_ptr += first_query * (H * DV) + kv_head * (GROUP * DV)
    dq_ptr += first_query * (H * D) + kv_head * (GROUP * D)
    k_ptr += first_key * (k_row * UNIT) + kv_head * (k_head * UNIT)
    v_ptr += first_key * (v_row * UNIT) + kv_head * (v_head * UNIT)
    q_at = row // GROUP * (q_row * UNIT) + row % GROUP * (q_head * UNIT)
    do_at = row // GROUP * (do_row * UNIT) + row % GROUP * (do_head * UNIT)
    dense = (row // GROUP).to(tl.int64) * H + row % GROUP

    q = load(q_ptr, q_at, here, 0, D, PADDED) if STEP == PADDED else None
    do = load(do_ptr, do_at, here, 0, DV, PADDED) if STEP == PADDED else None
    delta = tl.zeros((ROWS,), tl.float32)
    for first in range(0, DV, STEP):
        do_part = do if STEP == PADDED else load(do_ptr, do_at, here, first, DV, STEP)
        o_part = load(o_ptr, dense * DV, here, first, DV, STEP)
        delta += tl.sum(o_part.to(tl.float32) * do_part.to(tl.float32), 1)
    share = tl.zeros((ROWS,), tl.float32)
    if dlse_ptr is not None:
        share -= tl.load(dlse_ptr + at, here, 0.0)
        delta += share
    top = tl.load(top_ptr + at, here, 0.0)
    inv = tl.load(inv_ptr + at, here, 0.0)

    temperature = temperature_at(position, log2_len, temperature_len)[:, None] if TEMPERATURE else None
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + b * slopes_batch + head, row < own, 0.0)[:, None]
    dq = tl.zeros((ROWS, OUT), tl.float32)
    if WINDOWED:
        dq, share = dq_step(
            dq, share, q, do, q_ptr, q_at, do_ptr, do_at, here, k_ptr, v_ptr, first_begin, near, last_end,
            k_row * UNIT, v_row * UNIT, position, begin, end, top, inv, delta,
            temperature, slope, inner, cap, factor, column,
            CAPPED, GENERAL, SINKS, WINDOWED, True, PRECISION, D, DV, PADDED, STEP, OUT, ROWS, KEYS,
        )  # fmt: skip
    dq, share = dq_step(
        dq, share, q, do, q_ptr, q_at, do_ptr, do_at, here, k_ptr, v_ptr, near, far, last_end,
        k_row * UNIT, v_row * UNIT, position, begin, end, top, inv, delta,
        temperature, slope, inner, cap, factor, column,
        CAPPED, GENERAL, SINKS, WINDOWED, False, PRECISION, D, DV, PADDED, STEP, OUT, ROWS, KEYS,
    )  # fmt: skip
    dq, share = dq_step(
        dq, share, q, do, q_ptr, q_at, do_ptr, do_at, here, k_ptr, v_ptr, far, last_end, last_end,
        k_row * UNIT, v_row * UNIT, position, begin, end, top, inv, delta,
        temperature, slope, inner, cap, factor, column,
        CAPPED, GENERAL, SINKS, WINDOWED, True, PRECISION, D, DV, PADDED, STEP, OUT, ROWS, KEYS,
    )  # fmt: skip
    if column == 0:
        tl.store(delta_ptr + at, delta, here)
        if SINKS:
            tl.store(share_ptr + at, share, here)
    store(dq_ptr, dense * D, here, column, dq * scale, D, OUT)


@triton.jit
def dk_dv_step(
    dk, dv, k, v, key, seen, k_ptr, k_at, v_ptr, v_at, q_ptr, do_ptr, top_ptr, inv_ptr, delta_ptr, slopes_ptr,
    first, last, rows, key_count, q_row, q_head, do_row, do_head, queries, start, left, right,
    temperature_len, log2_len, inner, cap, factor, column,
    GROUP: tl.constexpr, CAPPED: tl.constexpr, GENERAL: tl.constexpr, TEMPERATURE: tl.constexpr,
    WINDOWED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    PADDED: tl.constexpr, STEP: tl.constexpr, OUT: tl.constexpr, REACH: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of folded rows from `first` to `last`, into dk divided by the scale and dv. Scores are (keys, rows)."""
    for from_row in range(first, last, ROWS):
        row = from_row + tl.arange(0, ROWS)
        inside = row < rows
        t, g = row // GROUP, row % GROUP
        q_at = t * q_row + g * q_head
        do_at = t * do_row + g * do_head
        q = load(q_ptr, q_at, inside, 0, D, PADDED) if STEP == PADDED else None
        do = load(do_ptr, do_at, inside, 0, DV, PADDED) if STEP == PADDED else None
        at = g * queries + t
        top = tl.load(top_ptr + at, inside, 0.0)
        inv = tl.load(inv_ptr + at, inside, 0.0)  # of a row that is not there p is 0
        delta = tl.load(delta_ptr + at, inside, 0.0)
        position = start + t
        temperature = temperature_at(position, log2_len, temperature_len)[None, :] if TEMPERATURE else None
        slope = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + g)[None, :]
        qk = products(k, q, k_ptr, k_at, seen, q_ptr, q_at, inside, KEYS, ROWS, D, STEP, PRECISION)
        raw, derivative = raw_score(
            qk, position[None, :], key[:, None], temperature, slope, inner, cap, CAPPED=CAPPED, GENERAL=GENERAL
        )
        if MASKED:
            begin, end = visible(position, key_count, left, right)
            raw = tl.minimum(raw, limit(key[:, None], begin[None, :], end[None, :], WINDOWED))
        p = power(raw, top[None, :], factor, k_ptr.dtype.element_ty) * inv[None, :]
        do_out = do if STEP == PADDED and OUT == PADDED else load(do_ptr, do_at, inside, column, DV, OUT, REACH)
        dv = tl.dot(p.to(do_out.dtype), do_out, dv, input_precision=PRECISION)
        dp = products(v, do, v_ptr, v_at, seen, do_ptr, do_at, inside, KEYS, ROWS, DV, STEP, PRECISION)
        ds = p * (dp - delta[None, :]) * derivative
        q_out = q if STEP == PADDED and OUT == PADDED else load(q_ptr, q_at, inside, column, D, OUT, REACH)
        dk = tl.dot(ds.to(q_out.dtype), q_out, dk, input_precision=PRECISION)
    return dk, dv


@kernel
def flash_attention_bwd_dk_dv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    top_ptr,
    inv_ptr,
    delta_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    q_start_ptr,
    slopes_ptr,
    dk_ptr,  # (batch, keys, KV_HEADS, D)
    dv_ptr,  # (batch, keys, KV_HEADS, DV)
    tiles: tl.int32,
    batch: tl.int32,
    queries: tl.int32,
    keys: tl.int32,
    q_batch: tl.int64,
    q_row: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_row: tl.int32,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_row: tl.int32,
    v_head: tl.int64,
    do_batch: tl.int64,
    do_row: tl.int64,
    do_head: tl.int64,
    slopes_batch: tl.int32,
    left: tl.int32,
    right: tl.int32,
    temperature_len: tl.int32,
    log2_len: tl.float32,
    inner: tl.float32,
    cap: tl.float32,
    factor: tl.float32,
    scale: tl.float32,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PADDED: tl.constexpr,
    UNIT: tl.constexpr,
    CAPPED: tl.constexpr,
    GENERAL: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    WINDOWED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEP: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H: tl.constexpr = KV_HEADS * GROUP
    PARTS: tl.constexpr = ((D if D > DV else DV) + OUT - 1) // OUT
    REACH: tl.constexpr = PARTS * OUT
    program = tl.program_id(0)
    kv_head = (program % KV_HEADS).to(tl.int64)
    column = program // KV_HEADS % PARTS * OUT
    number = program // (KV_HEADS * PARTS)
    b, tile = place(number, tiles, cu_seqlens_k_ptr, keys, batch, 1, KEYS)
    first_query, count = stretch(b, queries, batch, cu_seqlens_q_ptr)
    first_key, key_count = stretch(b, keys, batch, cu_seqlens_k_ptr)
    start = first_position(b, count, key_count, batch, q_start_ptr)
    if (tile < 0) | (tile * KEYS >= key_count):
        return
    count = tl.where(b < batch, count, 0)

    key_begin = tile * KEYS
    key_end = tl.minimum(key_begin + KEYS, key_count)
    key = key_begin + tl.arange(0, KEYS)
    here = key < key_count
    seen_begin, _ = visible(start, key_count, left, right)
    _, seen_end = visible(start + count - 1, key_count, left, right)
    seen = (key >= seen_begin) & (key < seen_end)  # by any query; the others are not read
    # the queries that see any of the keys, and those that see all; one in between may see none, where keys end
    any_begin = tl.where(right < 0, 0, clamp(key_begin - right - start, 0, count))
    any_end = tl.where(left < 0, count, clamp(key_end + left - start, 0, count))
    all_begin = tl.where(right < 0, 0, clamp(key_end - 1 - right - start, 0, count))
    all_end = tl.where(left < 0, count, clamp(key_begin + left - start + 1, 0, count))
    first, last = any_begin * GROUP, any_end * GROUP
    near, far = split(first, all_begin * GROUP, all_end * GROUP, last, ROWS)
    if not WINDOWED:
        far = last  # rows past the last one need no mask

    stats = (kv_head * GROUP) * queries + first_query
    if cu_seqlens_q_ptr is None:
        stats += b * H * queries
        q_ptr += b * (q_batch * UNIT)
        k_ptr += b * (k_batch * UNIT)
        v_ptr += b * (v_batch * UNIT)
        do_ptr += b * (do_batch * UNIT)
        dk_ptr += b * keys * (KV_HEADS * D)
        dv_ptr += b * keys * (KV_HEADS * DV)
    q_ptr += first_query * (q_row * UNIT) + kv_head * GROUP * (q_head * UNIT)
    do_ptr += first_query * (do_row * UNIT) + kv_head * GROUP * (do_head * UNIT)
    k_ptr += (first_key + key_begin) * (k_row * UNIT) + kv_head * (k_head * UNIT)
    v_ptr += (first_key + key_begin) * (v_row * UNIT) + kv_head * (v_head * UNIT)
    k_at = tl.arange(0, KEYS) * (k_row * UNIT)
    v_at = tl.arange(0, KEYS) * (v_row * UNIT)
    if slopes_ptr is not None:
        slopes_ptr += b * slopes_batch + kv_head * GROUP
    top_ptr += stats
    inv_ptr += stats
    delta_ptr += stats

    k = load(k_ptr, k_at, seen, 0, D, PADDED) if STEP == PADDED else None
    v = load(v_ptr, v_at, seen, 0, DV, PADDED) if STEP == PADDED else None
    dk = tl.zeros((KEYS, OUT), tl.float32)
    dv = tl.zeros((KEYS, OUT), tl.float32)
    dk, dv = dk_dv_step(
        dk, dv, k, v, key, seen, k_ptr, k_at, v_ptr, v_at, q_ptr, do_ptr, top_ptr, inv_ptr, delta_ptr, slopes_ptr,
        first, near, last, key_count, q_row * UNIT, q_head * UNIT, do_row * UNIT, do_head * UNIT, queries, start,
        left, right, temperature_len, log2_len, inner, cap, factor, column,
        GROUP, CAPPED, GENERAL, TEMPERATURE, WINDOWED, True, PRECISION, D, DV, PADDED, STEP, OUT, REACH, ROWS, KEYS,
    )  # fmt: skip
    dk, dv = dk_dv_step(
        dk, dv, k, v, key, seen, k_ptr, k_at, v_ptr, v_at, q_ptr, do_ptr, top_ptr, inv_ptr, delta_ptr, slopes_ptr,
        near, far, last, key_count, q_row * UNIT, q_head * UNIT, do_row * UNIT, do_head * UNIT, queries, start,
        left, right, temperature_len, log2_len, inner, cap, factor, column,
        GROUP, CAPPED, GENERAL, TEMPERATURE, WINDOWED, False, PRECISION, D, DV, PADDED, STEP, OUT, REACH, ROWS, KEYS,
    )  # fmt: skip
    if WINDOWED:
        dk, dv = dk_dv_step(
            dk, dv, k, v, key, seen, k_ptr, k_at, v_ptr, v_at, q_ptr, do_ptr, top_ptr, inv_ptr, delta_ptr, slopes_ptr,
            far, last, last, key_count, q_row * UNIT, q_head * UNIT, do_row * UNIT, do_head * UNIT, queries, start,
            left, right, temperature_len, log2_len, inner, cap, factor, column,
            GROUP, CAPPED, GENERAL, TEMPERATURE, WINDOWED, True, PRECISION, D, DV, PADDED, STEP, OUT, REACH, ROWS, KEYS,
        )  # fmt: skip
    store(dk_ptr, (first_key + key) * (KV_HEADS * D) + kv_head * D, here, column, dk * scale, D, OUT, REACH)
    store(dv_ptr, (first_key + key) * (KV_HEADS * DV) + kv_head * DV, here, column, dv, DV, OUT, REACH)


@kernel
def flash_attention_bwd_sinks_kernel(
    sinks_ptr,  # (H) float32
    top_ptr,  # (batch, H, queries) float32, as inv and share; one batch where sequences are packed
    inv_ptr,
    share_ptr,
    dsinks_ptr,  # (H) float32
    batch: tl.int64,
    queries: tl.int64,
    factor: tl.float32,
    ROWS: tl.constexpr,
):
    """dsinks = -sum over the rows of exp(sink - top) * inv * share, a program for each head, in float64."""
    head = tl.program_id(0).to(tl.int64)
    sink = tl.load(sinks_ptr + head) * LOG2_E
    total = tl.zeros((ROWS,), tl.float64)
    for first in range(0, batch * queries, ROWS):
        row = first + tl.arange(0, ROWS)
        here = row < batch * queries
        at = (row // queries * tl.num_programs(0) + head) * queries + row % queries
        p = tl.exp2(sink - tl.load(top_ptr + at, here, 0.0) * factor) * tl.load(inv_ptr + at, here, 0.0)
        total -= p.to(tl.float64) * tl.load(share_ptr + at, here, 0.0).to(tl.float64)
    tl.store(dsinks_ptr + head, tl.sum(total, 0).to(tl.float32))


@dataclass(frozen=True)
class Tiles:
    """Query rows and keys of a tile; of head dims, columns multiplied at a time and columns of outputs per program."""

    rows: int
    keys: int
    step: int
    out: int
    num_warps: int
    num_stages: int = 2

    def meta(self) -> dict[str, int]:
        return {
            "ROWS": self.rows,
            "KEYS": self.keys,
            "STEP": self.step,
            "OUT": self.out,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def _tiles(kernel: str, dtype: torch.dtype, dim: int, keys: int) -> Tiles:
    """Tiles of a kernel ("fwd", "dq", "dk_dv") for head dims padded to `dim`."""
    wide = dtype == torch.float32
    if INTERPRETED:
        step = min(dim, 128) if wide else dim
        return Tiles(64, 128 if keys <= 512 else 512, step, step, 4)
    if wide:  # the halves of three tf32 products lie in registers: few columns at a time
        warps = 8 if kernel == "dk_dv" and dim > 64 else 4
        return Tiles(64 if kernel == "fwd" else 32, 16, min(dim, 32), min(dim, 64), warps)
    if kernel == "fwd":
        return Tiles(64, 32, min(dim, 128), min(dim, 128), 8)
    return Tiles(32, 32, min(dim, 128), 64 if kernel == "dk_dv" and dim > 128 else min(dim, 128), 4)


def _readable(x: torch.Tensor) -> torch.Tensor:
    """Any strides will do as long as the last dim is dense."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


@dataclass(frozen=True)
class Problem:
    """What all three kernels are told beside their own tensors."""

    tensors: dict[str, torch.Tensor]  # with strides: q, k, v, and do in the backward pass
    packed: bool
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    arguments: dict[str, Any]

    @classmethod
    def of(
        cls,
        tensors: dict[str, torch.Tensor],
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        q_start: torch.Tensor | None,
        alibi_slopes: torch.Tensor | None,
        causal: bool,
        scale: float,
        softcap: float,
        left: int,
        right: int,
        temperature_len: int,
    ) -> Problem:
        tensors = {name: _readable(x) for name, x in tensors.items()}
        q, k, v = (tensors[name] for name in "qkv")
        packed = cu_seqlens_q is not None
        batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
        heads, kv_heads = q.shape[-2], k.shape[-2]
        # Strides in units of 16 bytes where they are such: so the compiler knows, whatever their values.
        strides = {
            f"{name}_{part}": x.stride(place) if place >= -x.dim() and x.shape[place] > 1 else 0
            for name, x in tensors.items()
            for part, place in (("batch", -4), ("row", -3), ("head", -2))
        }
        unit = 16 // q.element_size()
        unit = unit if all(stride % unit == 0 for stride in strides.values()) else 1
        capped, general = softcap > 0, temperature_len > 0 or alibi_slopes is not None or not scale > 0
        arguments = {
            "cu_seqlens_q_ptr": None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
            "cu_seqlens_k_ptr": None if cu_seqlens_k is None else cu_seqlens_k.contiguous(),
            "q_start_ptr": None if q_start is None else q_start.contiguous(),
            "slopes_ptr": None if alibi_slopes is None else alibi_slopes.contiguous(),
            "slopes_batch": heads if alibi_slopes is not None and alibi_slopes.dim() == 2 else 0,
            **{f"{name}_ptr": x for name, x in tensors.items()},
            **{name: stride // unit for name, stride in strides.items()},
            "batch": batch,
            "queries": q.shape[-3],
            "keys": k.shape[-3],
            "left": left if left < FAR else -1,
            "right": 0 if causal else right if right < FAR else -1,
            "temperature_len": min(temperature_len, FAR),
            "log2_len": math.log2(max(temperature_len, 2)),
            "inner": scale / softcap if capped else scale,
            "cap": softcap,
            "factor": (1.0 if general else softcap if capped else scale) * math.log2(math.e),
            "KV_HEADS": kv_heads,
            "GROUP": heads // kv_heads,
            "D": q.shape[-1],
            "DV": v.shape[-1],
            "PADDED": max(16, triton.next_power_of_2(max(q.shape[-1], v.shape[-1]))),
            "UNIT": unit,
            "CAPPED": capped,
            "GENERAL": general,
            "TEMPERATURE": temperature_len > 0,
            "WINDOWED": 0 <= left < FAR,
        }
        return cls(tensors, packed, batch, q.shape[-3], k.shape[-3], heads, kv_heads, arguments)

    def tiles(self, kernel: str) -> Tiles:
        return _tiles(kernel, self.tensors["q"].dtype, self.arguments["PADDED"], self.keys)

    def programs(self, rows: int, per_tile: int, cols: int, per_part: int) -> tuple[int, int]:
        """Tiles of an unpacked sequence with so many rows, and programs, which make parts of the columns."""
        tiles = triton.cdiv(rows, per_tile)
        all_tiles = rows // per_tile + self.batch + 1 if self.packed else tiles * self.batch
        return tiles, all_tiles * self.kv_heads * triton.cdiv(cols, per_part)

    def new_rows(self) -> torch.Tensor:
        """One float32 for each row and head."""
        outer = () if self.packed else (self.batch,)
        return self.tensors["q"].new_empty((*outer, self.heads, self.queries), dtype=torch.float32)


def flash_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    q_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    temperature_len: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = Problem.of(
        {"q": q, "k": k, "v": v}, cu_seqlens_q, cu_seqlens_k, q_start, alibi_slopes,
        causal, scale, softcap, left, right, temperature_len,
    )  # fmt: skip
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse, top, inv = (problem.new_rows() for _ in range(3))
    rows = problem.queries * (problem.heads // problem.kv_heads)
    shape = problem.tiles("fwd")
    if not problem.packed and rows <= 16:  # decoding (a packed row's bits must not depend on its neighbours' number)
        shape = replace(shape, rows=16, num_warps=4)
    tiles, programs = problem.programs(rows, shape.rows, v.shape[-1], shape.out)
    flash_attention_fwd_kernel[(programs,)](
        **problem.arguments, sinks_ptr=None if sinks is None else sinks.contiguous(),
        o_ptr=o, lse_ptr=lse, top_ptr=top, inv_ptr=inv, tiles=tiles, **shape.meta(),
    )  # fmt: skip
    return o, lse, top, inv


def flash_attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    top: torch.Tensor,
    inv: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    q_start: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    temperature_len: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    problem = Problem.of(
        {"q": q, "k": k, "v": v, "do": dout}, cu_seqlens_q, cu_seqlens_k, q_start, alibi_slopes,
        causal, scale, softcap, left, right, temperature_len,
    )  # fmt: skip
    top, inv = top.contiguous(), inv.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dsinks = q.new_empty((0 if sinks is None else problem.heads,), dtype=torch.float32)
    delta = problem.new_rows()
    share = None if sinks is None else problem.new_rows()

    shape = problem.tiles("dq")
    rows = problem.queries * (problem.heads // problem.kv_heads)
    tiles, programs = problem.programs(rows, shape.rows, q.shape[-1], shape.out)
    flash_attention_bwd_dq_kernel[(programs,)](
        **problem.arguments, o_ptr=o.contiguous(), top_ptr=top, inv_ptr=inv,
        dlse_ptr=None if dlse is None else dlse.contiguous(), dq_ptr=dq, delta_ptr=delta, share_ptr=share,
        tiles=tiles, scale=scale, **shape.meta(),
    )  # fmt: skip
    shape = problem.tiles("dk_dv")
    tiles, programs = problem.programs(problem.keys, shape.keys, max(k.shape[-1], v.shape[-1]), shape.out)
    flash_attention_bwd_dk_dv_kernel[(programs,)](
        **problem.arguments, top_ptr=top, inv_ptr=inv, delta_ptr=delta, dk_ptr=dk, dv_ptr=dv,
        tiles=tiles, scale=scale, **shape.meta(),
    )  # fmt: skip
    if sinks is not None:
        flash_attention_bwd_sinks_kernel[(problem.heads,)](
            sinks.contiguous(), top, inv, share, dsinks, 1 if problem.packed else problem.batch, problem.queries,
            problem.arguments["factor"], ROWS=1024, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv, dsinks


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok's heads, capped and with everything; others."""

    def call(
        dim: int,
        queries: int = 8192,
        *,
        packed: bool = False,
        softcap: float = 0.0,
        left: int = -1,
        general: bool = False,
        backward: bool = True,
    ) -> None:
        def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        outer = () if packed else (2,)
        q, k, v = empty(*outer, queries, 48, dim), empty(*outer, 8192, 8, dim), empty(*outer, 8192, 8, dim)
        offsets = empty(5, dtype=torch.int32) if packed else None
        numbers = empty(48, dtype=torch.float32) if general else None
        options = (offsets, offsets, None, numbers, numbers, True, dim**-0.5, softcap, left, -1, 1024 * general)
        o, lse, top, inv = flash_attention_fwd(q, k, v, *options)
        if backward:
            flash_attention_bwd(o, lse if general else None, q, k, v, o, top, inv, *options)

    call(128, softcap=30.0)
    call(128, packed=True)
    call(128, softcap=30.0, left=1024, general=True)
    call(128, 1, softcap=30.0, backward=False)
    call(64, softcap=30.0)
    call(256, left=1024)
