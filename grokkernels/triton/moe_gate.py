"""moe_gate in Triton: weights, indices (N, K), counts (E) and two losses from logits (N, E), and the gradient of the
logits. The mathematics and its sources: grokkernels/reference/moe_gate.py.

A tile of whole rows stays in registers. What is known of a choice stays with its expert: after K rounds of a maximum
each expert has its rank or none, so that weights are made, summed and stored without a gather. A round compares one
64-bit integer per expert, the score's bits in integer order above the index from behind, so equal scores go to the
lower expert in any order of comparison. Groups begin at multiples of a power of two, which makes them an axis.

Counts and losses are summed by program and then by a second kernel, in an order that the shape alone decides. Backward
takes one pass and needs logits, indices and counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED
from grokkernels.triton.elementary import tanh
from grokkernels.triton.kernel import kernel
from grokkernels.triton.philox import uniform

# Elements of a tile: 8 for each of 128 threads; the interpreter takes more.
TILE = 65536 if INTERPRETED else 1024
MOST_EXPERTS = 1024
# A sum that something is divided by is at least this.
SMALLEST: tl.constexpr = tl.constexpr(1e-20)


@triton.jit
def experts_of_columns(E: tl.constexpr, GROUPS: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of each column, and whether there is one. Every group has SLOTS columns."""
    column = tl.arange(0, EXPERTS)
    if GROUPS == 1 or GROUPS * SLOTS == E:
        expert, there = column, column < E
    else:
        group, place = column // SLOTS, column % SLOTS
        expert, there = group * (E // GROUPS) + place, (group < GROUPS) & (place < E // GROUPS)
    return expert, there


@triton.jit
def capped_logits(
    logits_ptr, at, inside, softcap, jitter, seed, CAPPED: tl.constexpr, JITTERED: tl.constexpr
):  # fmt: skip
    """z, what the softmax sees, -infinity outside; and dz/dlogits."""
    z = tl.load(logits_ptr + at, inside, 0.0).to(tl.float32)
    slope = 1.0
    if JITTERED:
        slope = 1.0 + jitter * (2.0 * uniform(at, seed) - 1.0)
        z *= slope
    if CAPPED:
        t = tanh(z / softcap)
        z = softcap * t
        slope *= 1.0 - t * t
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def score(z, inside, SIGMOID: tl.constexpr):
    """z, scores, softmax(z), logsumexp(z) and whether it is finite, that is, the row routed; all 0 where it is not.

    Scores are softmax(z) or sigmoid(z), and 0 outside.
    """
    largest = tl.max(tl.where(z == z, z, float("-inf")), 1)
    softmax = tl.exp(z - largest[:, None])
    denominator = tl.sum(softmax, 1)
    log = tl.log(denominator)
    routed = tl.abs(largest + log) < float("inf")
    softmax = tl.where(routed[:, None], softmax / denominator[:, None], 0.0)
    z = tl.where(routed[:, None], z, 0.0)
    lse = tl.where(routed, largest.to(tl.float64) + log.to(tl.float64), 0.0)
    scores = softmax
    if SIGMOID:
        scores = tl.where(routed[:, None] & inside, 1.0 / (1.0 + tl.exp(-z)), 0.0)
    return z, scores, softmax, lse, routed


@triton.jit
def ranks(values, usable, COUNT: tl.constexpr):
    """values (ROWS, N) float32, usable (1, N) -> int32 (ROWS, N): the place of each of the COUNT largest that are
    usable, the lower column first among equals; COUNT for all others. A NaN counts as infinity."""
    none: tl.constexpr = -(2**63)
    values = tl.where(values == values, values, float("inf"))
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)  # one zero
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    behind = values.shape[1] - 1 - tl.arange(0, values.shape[1])
    key = tl.where(usable, (order.to(tl.int64) << 32) | behind[None, :].to(tl.int64), none)
    rank = tl.full(values.shape, COUNT, tl.int32)
    for k in range(COUNT):
        best = key == tl.max(key, 1)[:, None]
        rank = tl.where(best, k, rank)
        key = tl.where(best, none, key)
    return rank


@triton.jit
def limit_groups(choice, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, SLOTS: tl.constexpr, TWO: tl.constexpr):
    """choice (ROWS, EXPERTS), -infinity in columns without expert -> also -infinity outside the row's best groups.

    A group's score is its best value, or the sum of its TWO best.
    """
    grouped = tl.reshape(choice, (choice.shape[0], choice.shape[1] // SLOTS, SLOTS))
    value = tl.max(grouped, 2)
    if TWO:
        best = grouped == value[:, :, None]
        second = tl.max(tl.where(best, float("-inf"), grouped), 2)
        value += tl.where(tl.sum(best.to(tl.int32), 2) > 1, value, second)
    there = tl.arange(0, choice.shape[1] // SLOTS) < GROUPS
    allowed = ranks(value, there[None, :], TOPK_GROUPS) < TOPK_GROUPS
    return tl.reshape(tl.where(allowed[:, :, None], grouped, float("-inf")), choice.shape)


@triton.jit
def softmax_of_chosen(z, chosen):
    """0 for those not chosen."""
    largest = tl.max(tl.where(chosen, z, float("-inf")), 1)[:, None]
    weights = tl.where(chosen, tl.exp(z - largest), 0.0)
    return weights / tl.sum(weights, 1)[:, None]


@kernel
def moe_gate_fwd_kernel(
    logits_ptr,  # (rows, E)
    bias_ptr,  # (E) float32, or None
    weights_ptr,  # (rows, K) float32
    indices_ptr,  # (rows, K) int32
    shares_ptr,  # (programs, E) float32: sums of the scores, divided by each row's total
    chosen_ptr,  # (programs, E) int32: how often each expert was chosen
    squares_ptr,  # (programs) float64: sums of squares of the logsumexp
    rows: tl.int64,
    chunk: tl.int64,  # rows of a program, a multiple of ROWS
    softcap: tl.float32,
    routed_scale: tl.float32,
    jitter: tl.float32,
    seed: tl.int64,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOPK_FIRST: tl.constexpr,
    CAPPED: tl.constexpr,
    JITTERED: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    expert, there = experts_of_columns(E, GROUPS, SLOTS, EXPERTS)
    shares = tl.zeros((EXPERTS,), tl.float32)
    counts = tl.zeros((EXPERTS,), tl.int32)
    squares = tl.zeros((ROWS,), tl.float64)
    for first in range(program * chunk, tl.minimum((program + 1) * chunk, rows), ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & there[None, :]
        z, _ = capped_logits(
            logits_ptr, row[:, None] * E + expert[None, :], inside, softcap, jitter, seed, CAPPED, JITTERED
        )
        z, scores, _, lse, routed = score(z, inside, SIGMOID)
        squares += lse * lse
        share = scores
        if SIGMOID:
            share = scores / tl.maximum(tl.sum(scores, 1), SMALLEST)[:, None]
        shares += tl.sum(share, 0)

        choice = z if TOPK_FIRST else scores
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert, there, 0.0)[None, :]
        if GROUPS > 1:
            choice = tl.where(choice == choice, choice, float("inf"))
            choice = tl.where(there[None, :], choice, float("-inf"))
            choice = limit_groups(choice, GROUPS, TOPK_GROUPS, SLOTS, bias_ptr is not None and SLOTS > 1)
        rank = ranks(choice, there[None, :], K)
        chosen = rank < K

        weights = softmax_of_chosen(z, chosen) if TOPK_FIRST else tl.where(chosen, scores, 0.0)
        if RENORMALIZE:
            weights = weights / tl.maximum(tl.sum(weights, 1), SMALLEST)[:, None]
        weights = tl.where(routed[:, None], weights * routed_scale, 0.0)
        at = row[:, None] * K + rank
        tl.store(weights_ptr + at, weights, inside & chosen)
        tl.store(indices_ptr + at, tl.where(routed[:, None], expert[None, :], -1), inside & chosen)
        counts += tl.sum((chosen & routed[:, None]).to(tl.int32), 0)
    tl.store(shares_ptr + program * E + expert, shares, there)
    tl.store(chosen_ptr + program * E + expert, counts, there)
    tl.store(squares_ptr + program, tl.sum(squares, 0))


@kernel
def moe_gate_losses_kernel(
    shares_ptr,  # (programs, E) float32
    chosen_ptr,  # (programs, E) int32
    squares_ptr,  # (programs) float64
    counts_ptr,  # (E) int32
    load_balance_loss_ptr,  # () float32
    z_loss_ptr,  # () float32
    programs: tl.int64,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    expert = tl.arange(0, EXPERTS)
    shares = tl.zeros((EXPERTS,), tl.float64)
    counts = tl.zeros((EXPERTS,), tl.int64)
    squares = tl.zeros((ROWS,), tl.float64)
    for first in range(0, programs, ROWS):
        program = first + tl.arange(0, ROWS)
        inside = (program < programs)[:, None] & (expert < E)[None, :]
        at = program[:, None] * E + expert[None, :]
        shares += tl.sum(tl.load(shares_ptr + at, inside, 0.0).to(tl.float64), 0)
        counts += tl.sum(tl.load(chosen_ptr + at, inside, 0).to(tl.int64), 0)
        squares += tl.load(squares_ptr + program, program < programs, 0.0)
    tl.store(counts_ptr + expert, counts.to(tl.int32), expert < E)
    tokens = tl.maximum(tl.sum(counts, 0) // K, 1).to(tl.float64)
    balance = tl.sum(shares * counts.to(tl.float64), 0) * E / (tokens * tokens * K)
    tl.store(load_balance_loss_ptr, balance.to(tl.float32))
    tl.store(z_loss_ptr, (tl.sum(squares, 0) / tokens).to(tl.float32))


@kernel
def moe_gate_bwd_kernel(
    dweights_ptr,  # (rows, K) float32, or None
    dload_balance_loss_ptr,  # () float32, or None
    dz_loss_ptr,  # () float32, or None
    logits_ptr,  # (rows, E)
    indices_ptr,  # (rows, K) int32
    counts_ptr,  # (E) int32
    dlogits_ptr,  # (rows, E)
    rows: tl.int64,
    softcap: tl.float32,
    routed_scale: tl.float32,
    jitter: tl.float32,
    seed: tl.int64,
    E: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOPK_FIRST: tl.constexpr,
    CAPPED: tl.constexpr,
    JITTERED: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    inside = (row < rows)[:, None] & (expert < E)[None, :]
    at = row[:, None] * E + expert[None, :]
    z, slope = capped_logits(logits_ptr, at, inside, softcap, jitter, seed, CAPPED, JITTERED)
    z, scores, softmax, lse, routed = score(z, inside, SIGMOID)

    counts = tl.load(counts_ptr + expert, expert < E, 0)
    choices = tl.sum(counts.to(tl.int64), 0).to(tl.float64)
    tokens = tl.where(choices > 0, choices / K, 1.0)
    dz = tl.zeros((ROWS, EXPERTS), tl.float32)  # what reaches the scores
    if dload_balance_loss_ptr is not None:
        dbalance = (tl.load(dload_balance_loss_ptr).to(tl.float64) * E / (tokens * tokens * K)).to(tl.float32)
        dz += counts.to(tl.float32)[None, :]
        if SIGMOID:  # through the division by the total
            total = tl.sum(scores, 1)
            divisor = tl.maximum(total, SMALLEST)
            mean = tl.where(total >= SMALLEST, tl.sum(scores * dz, 1) / divisor, 0.0)
            dz = (dz - mean[:, None]) / divisor[:, None]
        dz *= dbalance

    dchosen = tl.zeros((ROWS, EXPERTS), tl.float32)  # what reaches z through a softmax over the chosen
    if dweights_ptr is not None:
        dr = tl.zeros((ROWS, EXPERTS), tl.float32)
        chosen = tl.zeros((ROWS, EXPERTS), tl.int32)
        for k in range(K):
            index = tl.load(indices_ptr + row * K + k, row < rows, -1)
            dweight = tl.load(dweights_ptr + row * K + k, row < rows, 0.0) * routed_scale
            here = (index[:, None] == expert[None, :]) & inside
            dr += tl.where(here, dweight[:, None], 0.0)
            chosen = tl.where(here, 1, chosen)
        r = softmax_of_chosen(z, chosen > 0) if TOPK_FIRST else tl.where(chosen > 0, scores, 0.0)
        if RENORMALIZE:
            total = tl.sum(r, 1)
            inverse = 1.0 / tl.maximum(total, SMALLEST)
            dot = tl.where(total >= SMALLEST, tl.sum(dr * r, 1) * inverse, 0.0)
            dr = tl.where(chosen > 0, (dr - dot[:, None]) * inverse[:, None], 0.0)
        if TOPK_FIRST:
            dchosen = r * (dr - tl.sum(dr * r, 1)[:, None])
        else:
            dz += dr

    c = tl.zeros((ROWS,), tl.float32)
    if dz_loss_ptr is not None:
        c = (2.0 * tl.load(dz_loss_ptr).to(tl.float64) / tokens * lse).to(tl.float32)
    if SIGMOID:
        dz = softmax * c[:, None] + scores * (1.0 - scores) * dz
    else:
        dz = scores * (dz - tl.sum(scores * dz, 1)[:, None] + c[:, None])
    dz = tl.where(routed[:, None], (dz + dchosen) * slope, 0.0)
    tl.store(dlogits_ptr + at, dz.to(dlogits_ptr.dtype.element_ty), inside)


def _tile(experts: int) -> dict[str, int]:
    """Rows of so many columns."""
    return {"ROWS": max(1, TILE // experts), "EXPERTS": experts, "num_warps": max(4, experts // 256)}


def moe_gate_fwd(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    num_groups: int,
    topk_groups: int,
    top_k: int,
    sigmoid: bool,
    softcap: float,
    renormalize: bool,
    routed_scale: float,
    topk_first: bool,
    jitter: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    experts = logits.shape[-1]
    rows = logits.numel() // experts
    slots = triton.next_power_of_2(experts // num_groups)
    tile = _tile(triton.next_power_of_2(num_groups) * slots)
    # The more experts, the fewer programs, since one program adds up what all of them found.
    most = max(128, min(512, 65536 // experts))
    chunk = max(triton.cdiv(triton.cdiv(rows, most), tile["ROWS"]), 1) * tile["ROWS"]
    programs = triton.cdiv(rows, chunk)
    weights = logits.new_empty((rows, top_k), dtype=torch.float32)
    indices = logits.new_empty((rows, top_k), dtype=torch.int32)
    counts = logits.new_empty((experts,), dtype=torch.int32)
    load_balance_loss, z_loss = (logits.new_empty((), dtype=torch.float32) for _ in range(2))
    shares = logits.new_empty((programs, experts), dtype=torch.float32)
    chosen = logits.new_empty((programs, experts), dtype=torch.int32)
    squares = logits.new_empty((programs,), dtype=torch.float64)
    moe_gate_fwd_kernel[(programs,)](
        logits.contiguous(), None if bias is None else bias.contiguous(), weights, indices, shares, chosen, squares,
        rows, chunk, softcap, routed_scale, jitter, seed,
        E=experts, K=top_k, GROUPS=num_groups, TOPK_GROUPS=topk_groups, SLOTS=slots, SIGMOID=sigmoid,
        RENORMALIZE=renormalize, TOPK_FIRST=topk_first, CAPPED=softcap > 0, JITTERED=jitter > 0, **tile,
    )  # fmt: skip
    columns = triton.next_power_of_2(experts)
    moe_gate_losses_kernel[(1,)](
        shares, chosen, squares, counts, load_balance_loss, z_loss, programs,
        E=experts, K=top_k, ROWS=max(1, 4096 // columns), EXPERTS=columns, num_warps=8,
    )  # fmt: skip
    return weights, indices, counts, load_balance_loss, z_loss


def moe_gate_bwd(
    dweights: torch.Tensor | None,
    dload_balance_loss: torch.Tensor | None,
    dz_loss: torch.Tensor | None,
    logits: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    top_k: int,
    sigmoid: bool,
    softcap: float,
    renormalize: bool,
    routed_scale: float,
    topk_first: bool,
    jitter: float,
    seed: int,
) -> torch.Tensor:
    experts = logits.shape[-1]
    rows = logits.numel() // experts
    dlogits = logits.new_empty(logits.shape)
    tile = _tile(triton.next_power_of_2(experts))
    moe_gate_bwd_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        None if dweights is None else dweights.contiguous(), dload_balance_loss, dz_loss,
        logits.contiguous(), indices.contiguous(), counts.contiguous(), dlogits,
        rows, softcap, routed_scale, jitter, seed,
        E=experts, K=top_k, SIGMOID=sigmoid, RENORMALIZE=renormalize, TOPK_FIRST=topk_first,
        CAPPED=softcap > 0, JITTERED=jitter > 0, **tile,
    )  # fmt: skip
    return dlogits


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: the gates of Grok-1, Grok-2, Qwen3, DeepSeek-V3,
    Mixtral's order, and the most experts."""

    def gate(experts: int, bias: bool, num_groups: int, topk_groups: int, *options: int | float) -> None:
        logits = torch.empty(8192, experts, dtype=dtype, device="meta")
        biases = torch.empty(experts, device="meta") if bias else None
        weights, indices, counts, balance, z_loss = moe_gate_fwd(logits, biases, num_groups, topk_groups, *options)
        moe_gate_bwd(weights, balance, z_loss, logits, indices, counts, *options)

    gate(8, False, 1, 1, 2, False, 0.0, False, 1.0, False, 0.0, 0)
    gate(8, False, 1, 1, 2, False, 30.0, False, 1.0, False, 0.0, 0)
    gate(8, False, 1, 1, 2, False, 30.0, False, 1.0, True, 0.01, 1)
    gate(128, False, 1, 1, 8, False, 0.0, True, 1.0, False, 0.0, 0)
    gate(160, False, 8, 3, 6, False, 0.0, False, 16.0, False, 0.0, 0)
    gate(256, True, 8, 4, 8, True, 0.0, True, 2.5, False, 0.0, 0)
    gate(1024, True, 1, 1, 12, True, 30.0, True, 1.0, False, 0.01, 1)
