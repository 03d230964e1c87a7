"""The order by expert: a stable counting sort of the (n, k) pairs by the expert they chose.

A program compares the pairs of a chunk with each other: a pair's rank in the chunk is how many earlier ones chose the
same expert, and the last of its kind writes their number. One program scans these numbers over chunks and experts, and
a third kernel adds up. Integers only, each written by one program: the same result in every run, for any number of
experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.kernel import kernel

# Pairs that are compared with each other, STEP at a time: CHUNK * STEP comparisons by 256 threads.
CHUNK, STEP = (512, 512) if INTERPRETED else (256, 16)
NUMBERED = 4096 if INTERPRETED else 1024


@kernel
def rank_kernel(
    indices_ptr,  # (pairs) int32
    ranks_ptr,  # (pairs) int32: how many earlier pairs of the chunk chose the same expert
    counts_ptr,  # (chunks, experts) int32, zero before
    pairs: tl.int64,
    experts: tl.int64,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, CHUNK)
    pair = chunk * CHUNK + place
    expert = tl.load(indices_ptr + pair, pair < pairs, -1)
    earlier = tl.zeros((CHUNK,), tl.int32)
    later = tl.zeros((CHUNK,), tl.int32)
    for first in range(0, CHUNK, STEP):
        other = first + tl.arange(0, STEP)
        chosen = tl.load(indices_ptr + chunk * CHUNK + other, chunk * CHUNK + other < pairs, -1)
        same = expert[:, None] == chosen[None, :]
        earlier += tl.sum((same & (other[None, :] < place[:, None])).to(tl.int32), 1)
        later += tl.sum((same & (other[None, :] > place[:, None])).to(tl.int32), 1)
    tl.store(ranks_ptr + pair, earlier, pair < pairs)
    tl.store(counts_ptr + chunk * experts + expert, earlier + 1, (expert >= 0) & (expert < experts) & (later == 0))


@kernel
def scan_kernel(
    counts_ptr,  # (chunks, experts) int32; becomes how many pairs of earlier chunks chose the expert
    offsets_ptr,  # (experts) int32: where each expert's rows end
    chunks: tl.int64,
    experts: tl.int64,
    capacity: tl.int32,
    CHUNKS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    used = tl.full((), 0, tl.int32)
    for first in range(0, experts, EXPERTS):
        expert = first + tl.arange(0, EXPERTS)
        total = tl.zeros((EXPERTS,), tl.int32)
        for before in range(0, chunks, CHUNKS):
            chunk = before + tl.arange(0, CHUNKS)
            at = chunk[:, None] * experts + expert[None, :]
            inside = (chunk < chunks)[:, None] & (expert < experts)[None, :]
            count = tl.load(counts_ptr + at, inside, 0)
            tl.store(counts_ptr + at, total[None, :] + tl.cumsum(count, 0) - count, inside)
            total += tl.sum(count, 0)
        kept = tl.minimum(total, capacity)
        tl.store(offsets_ptr + expert, used + tl.cumsum(kept, 0), expert < experts)
        used += tl.sum(kept, 0)


@kernel
def number_kernel(
    indices_ptr,  # (pairs) int32
    counts_ptr,  # (chunks, experts) int32
    offsets_ptr,  # (experts) int32
    slots_ptr,  # (pairs) int32: the rank in the chunk, then the row, -1 when dropped
    pair_ptr,  # (pairs) int32: the pair of each row that is used, or None
    pairs: tl.int64,
    experts: tl.int64,
    capacity: tl.int32,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = pair < pairs
    expert = tl.load(indices_ptr + pair, here, -1)
    inside = (expert >= 0) & (expert < experts)
    rank = tl.load(slots_ptr + pair, here, 0) + tl.load(counts_ptr + pair // CHUNK * experts + expert, inside, 0)
    begin = tl.load(offsets_ptr + expert - 1, inside & (expert > 0), 0)
    slot = tl.where(inside & (rank < capacity), begin + rank, -1)
    tl.store(slots_ptr + pair, slot, here)
    if pair_ptr is not None:
        tl.store(pair_ptr + slot, pair.to(tl.int32), slot >= 0)


@kernel
def invert_kernel(
    slots_ptr,  # (pairs) int32
    pair_ptr,  # (pairs) int32: the pair of each row, unchanged where no slot names it
    pairs: tl.int64,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + pair, pair < pairs, -1)
    tl.store(pair_ptr + slot, pair.to(tl.int32), (slot >= 0) & (slot < pairs))


def order_by_expert(
    indices: torch.Tensor, experts: int, capacity: int | None, pair: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """indices (N, K) int32 -> slots (N, K), offsets (experts), both int32.

    `pair` (N * K) int32 is told the pair of each row that is used.
    """
    indices, pairs = indices.contiguous(), indices.numel()
    if pairs >= 2**31:
        raise ValueError(f"N * K must be below 2^31, got {pairs}")
    chunks = triton.cdiv(pairs, CHUNK)
    slots, offsets = torch.empty_like(indices), indices.new_empty((experts,))
    counts = indices.new_zeros((chunks, experts))
    limit = pairs if capacity is None else min(capacity, pairs)
    rank_kernel[(chunks,)](indices, slots, counts, pairs, experts, CHUNK=CHUNK, STEP=STEP, num_warps=8)
    width = min(triton.next_power_of_2(experts), 256)
    scan_kernel[(1,)](counts, offsets, chunks, experts, limit, CHUNKS=2048 // width, EXPERTS=width, num_warps=8)
    number_kernel[(triton.cdiv(pairs, NUMBERED),)](
        indices, counts, offsets, slots, pair, pairs, experts, limit, CHUNK=CHUNK, BLOCK=NUMBERED, num_warps=4
    )
    return slots, offsets


def pairs_of_rows(slots: torch.Tensor) -> torch.Tensor:
    """slots (N, K) int32 -> (N * K) int32: the pair whose slot each row is, -1 where there is none."""
    slots = slots.contiguous()
    pair = slots.new_full((slots.numel(),), -1)
    invert_kernel[(triton.cdiv(pair.numel(), NUMBERED),)](slots, pair, pair.numel(), BLOCK=NUMBERED, num_warps=4)
    return pair
