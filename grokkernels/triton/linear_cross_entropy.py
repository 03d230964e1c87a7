"""linear_cross_entropy in Triton: cross_entropy of x (N, C) times weight (V, C) transposed, and dx and dweight, without
(N, V) logits.

The rows that count are listed on the device and gathered into a dense matrix first: ignored ones cost nothing but that.
Forward, 2 N V C operations, a program takes BM of them and RANGE columns, tile by tile; of its logits it leaves each
row's logsumexp. Backward, 6 N V C, for as many columns at once as HELD bytes take:

    dlogits (rows that count, columns)    the logits again, turned into their gradients before they leave registers
    dx_sum (N, C) += dlogits weight       float32; rounded into dx in the end
    dweight (columns, C) = dlogits^T x

dlogits have the dtype of x, so that both products run at its rate; so that float16 holds them they are multiplied by a
power of two, which the products take back. Every sum has one owner and a fixed order.

The idea of never storing logits is that of Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
arXiv:2411.09009; the division of labour that of csrc/cuda/linear_cross_entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED, tuning
from grokkernels.triton.cross_entropy_row import (
    LARGEST,
    TOGETHER,
    gradient_of_logits,
    gradient_of_row,
    merge_parts,
    squash,
    squash_options,
)
from grokkernels.triton.elementary import exponential
from grokkernels.triton.kernel import kernel
from grokkernels.triton.matmul import aligned, rows_matrix
from grokkernels.triton.tuning import Config

# Columns whose logits one program adds up; no function of N, so that a row does not see the batch.
RANGE = 2048
# Bytes of dlogits at once; never fewer columns than LEAST. Their rows are a multiple of UNIT columns long, whole tiles.
HELD, LEAST, UNIT = 64 << 20, 1024, 1024 if INTERPRETED else 256
# Row tiles that go over the columns together, so that programs at work share operands in the L2 cache.
BAND = tl.constexpr(8)
# What dlogits come to at most: a fourth of float16's largest.
ROOM = tl.constexpr(8192.0)
_FLOAT32 = Config({"BM": 128, "BN": 64, "BK": 32}, num_warps=8, num_stages=2)  # each number in two parts
_16_BIT = Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3)
# Tiles of each product: of float32 numbers, of 16-bit ones, and in the interpreter, where every program takes its time
# and words, of which there are many, come many at once.
CONFIGS = {
    "fwd": (_FLOAT32, _16_BIT, Config({"BM": 64, "BN": 1024, "BK": 64})),
    "dlogits": (_FLOAT32, _16_BIT, Config({"BM": 64, "BN": 1024, "BK": 64})),
    "dx": (_FLOAT32, _16_BIT, Config({"BM": 64, "BN": 256, "BK": 256})),
    "dweight": (Config({"BM": 64, "BN": 64, "BK": 32}, 4, 3), _16_BIT, Config({"BM": 1024, "BN": 256, "BK": 64})),
}


@kernel
def list_rows_kernel(
    targets_ptr,  # (rows)
    index_ptr,  # (rows + 1) int32: the rows that count, in order; how many
    dloss_ptr,  # (rows), or one number with dloss_stride 0; None where scales are not wanted
    lse_ptr,  # (rows) float64
    scales_ptr,  # (3) float32: what dlogits are multiplied by, its inverse, the mean's divisor
    rows: tl.int64,
    targets_stride: tl.int64,
    dloss_stride: tl.int64,
    ignore_index: tl.int64,
    steepest: tl.float32,  # |logit_scale|
    twice_z_loss: tl.float32,
    MEAN: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program."""
    count = tl.full((), 0, tl.int32)
    largest = tl.zeros((ROWS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        there = row < rows
        counts = there & (tl.load(targets_ptr + row * targets_stride, there, 0).to(tl.int64) != ignore_index)
        ones = counts.to(tl.int32)
        tl.store(index_ptr + count + tl.cumsum(ones, 0) - 1, row.to(tl.int32), counts)
        count += tl.sum(ones, 0)
        if dloss_ptr is not None:
            lse = tl.load(lse_ptr + row, counts, 0.0)
            weight = tl.load(dloss_ptr + row * dloss_stride, counts, 0.0)
            _, weight, p_factor = gradient_of_row(lse, weight, twice_z_loss)
            most = tl.abs(weight) * tl.maximum(tl.abs(p_factor), 1.0)
            largest = tl.maximum(largest, tl.where(most <= LARGEST, most, 0.0))
    tl.store(index_ptr + rows, count)
    if dloss_ptr is not None:
        divisor = tl.maximum(count, 1).to(tl.float32) if MEAN else 1.0
        most = tl.max(largest, 0) * steepest / divisor
        # The power of two at or below it; where it is far from 1, one that is not.
        most = tl.minimum(tl.maximum(most, 7.703719777548943e-34), 1.329227995784916e36)
        most = (most.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        tl.store(scales_ptr, tl.div_rn(ROOM, most))
        tl.store(scales_ptr + 1, most / ROOM)
        tl.store(scales_ptr + 2, divisor)


@kernel
def gather_rows_kernel(
    x_ptr,  # (rows, C), rows x_stride * UNIT elements apart
    index_ptr,  # (rows + 1) int32
    gathered_ptr,  # (rows, WIDTH)
    rows: tl.int64,
    x_stride: tl.int64,
    UNIT: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    counts = slot < tl.load(index_ptr + rows)
    row = tl.load(index_ptr + slot, counts, 0).to(tl.int64)
    inside = counts[:, None] & (column < C)[None, :]
    x = tl.load((x_ptr + row * x_stride * UNIT)[:, None] + column[None, :], inside, 0.0)
    tl.store((gathered_ptr + slot * WIDTH)[:, None] + column[None, :], x, counts[:, None] & (column < WIDTH)[None, :])


@triton.jit
def logits_tile(
    x, w, first, column, WIDTH: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Of the descriptors of x and weight: rows from `first`, columns from `column`."""
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, WIDTH, BK):
        acc = tl.dot(x.load([first, k]), w.load([column, k]).T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rows_of_tile(index_ptr, targets_ptr, first, count, targets_stride, V: tl.constexpr, BM: tl.constexpr):
    """Slots first ... first + BM - 1: whether they are there, their rows in x, targets; -1 for no word."""
    slot = first + tl.arange(0, BM)
    there = slot < count
    row = tl.load(index_ptr + slot, there, 0).to(tl.int64)
    target = tl.load(targets_ptr + row * targets_stride, there, -1).to(tl.int64)
    return there, row, tl.where((target >= 0) & (target < V), target.to(tl.int32), -1)


@kernel
def linear_cross_entropy_fwd_kernel(
    x_ptr,  # (rows, WIDTH): those that count
    weight_ptr,  # (V, WIDTH), rows W_STRIDE elements apart
    index_ptr,  # (rows + 1) int32
    targets_ptr,  # (rows)
    target_z_ptr,  # (rows) float32
    part_lse_ptr,  # (parts, rows) float64
    part_sum_ptr,  # (parts, rows) float32: sums of z, or None
    rows: tl.int32,
    targets_stride: tl.int64,
    inner: tl.float32,
    cap: tl.float32,
    slope: tl.float32,
    CAPPED: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    W_STRIDE: tl.constexpr,
    RANGE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    PARTS: tl.constexpr = (V + RANGE - 1) // RANGE
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    down, part = tl.swizzle2d(program // PARTS, program % PARTS, tl.num_programs(0) // PARTS, PARTS, BAND)
    count = tl.load(index_ptr + rows)
    first = down * BM
    if first >= count:
        return
    there, row, target = rows_of_tile(index_ptr, targets_ptr, first, count, targets_stride, V, BM)
    x = rows_matrix(x_ptr, count, WIDTH, BM, BK)
    w = tl.make_tensor_descriptor(weight_ptr, [V, WIDTH], [W_STRIDE, 1], [BN, BK])
    most = tl.full((BM,), -LARGEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    z_sum = tl.zeros((BM,), tl.float32)
    target_z = tl.zeros((BM,), tl.float32)
    # What is the same in every tile is computed anew: hoisted, addresses would take the registers that sums need.
    for begin in tl.range(part * RANGE, tl.minimum((part + 1) * RANGE, V), BN, disable_licm=True):
        z = squash(logits_tile(x, w, first, begin, WIDTH, PRECISION, BM, BN, BK), inner, cap, slope, CAPPED)
        column = begin + tl.arange(0, BN)
        target_z += tl.sum(tl.where(column[None, :] == target[:, None], z, 0.0), 1)
        if part_sum_ptr is not None:
            z_sum += tl.sum(z, 1)  # z of a column that is not there is 0
        if V % BN != 0:
            z += tl.where(column < V, 0.0, -float("inf"))[None, :]
        highest = tl.minimum(tl.maximum(most, tl.max(z, 1)), LARGEST)
        total = total * exponential(most - highest, EXACT) + tl.sum(exponential(z - highest[:, None], EXACT), 1)
        most = highest
    lse = most.to(tl.float64) + tl.log(total.to(tl.float64))
    place = part.to(tl.int64) * rows + row
    tl.store(part_lse_ptr + place, lse, there)
    if part_sum_ptr is not None:
        tl.store(part_sum_ptr + place, z_sum, there)
    tl.store(target_z_ptr + row, target_z, there & (target // RANGE == part) & (target >= 0))


@kernel
def linear_cross_entropy_dlogits_kernel(
    x_ptr,  # (rows, WIDTH): those that count
    weight_ptr,  # (V, WIDTH), rows W_STRIDE elements apart
    index_ptr,  # (rows + 1) int32
    targets_ptr,  # (rows)
    dloss_ptr,  # (rows), or one number with dloss_stride 0
    lse_ptr,  # (rows) float64
    scales_ptr,  # (3) float32
    dlogits_ptr,  # (rows that count, units * UNIT): columns `begin` and so on of the logits
    rows: tl.int32,
    targets_stride: tl.int64,
    dloss_stride: tl.int64,
    begin: tl.int32,
    units: tl.int32,
    inner: tl.float32,
    cap: tl.float32,
    slope: tl.float32,
    twice_z_loss: tl.float32,
    q: tl.float32,
    q_target: tl.float32,
    CAPPED: tl.constexpr,
    UNIT: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    W_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    across = (tl.minimum(units * UNIT, V - begin) + BN - 1) // BN
    program = tl.program_id(0)
    down, tile = tl.swizzle2d(program // across, program % across, tl.num_programs(0) // across, across, BAND)
    count = tl.load(index_ptr + rows)
    first = down * BM
    if first >= count:
        return
    x = rows_matrix(x_ptr, count, WIDTH, BM, BK)
    w = tl.make_tensor_descriptor(weight_ptr, [V, WIDTH], [W_STRIDE, 1], [BN, BK])
    acc = logits_tile(x, w, first, begin + tile * BN, WIDTH, PRECISION, BM, BN, BK)
    there, row, target = rows_of_tile(index_ptr, targets_ptr, first, count, targets_stride, V, BM)
    dloss = tl.load(dloss_ptr + row * dloss_stride, there, 0.0)
    weight = tl.div_rn(dloss, tl.load(scales_ptr + 2)) * tl.load(scales_ptr)
    weight = tl.where(target >= 0, weight, float("nan"))
    lse, weight, p_factor = gradient_of_row(tl.load(lse_ptr + row, there, 0.0), weight, twice_z_loss)
    column = tile * BN + tl.arange(0, BN)
    dx = gradient_of_logits(
        acc, (begin + column)[None, :] == target[:, None], lse[:, None], weight[:, None], p_factor[:, None],
        inner, cap, slope, q, q_target, CAPPED, EXACT,
    )  # fmt: skip
    slot = first.to(tl.int64) + tl.arange(0, BM)
    place = dlogits_ptr + (slot * (units * UNIT))[:, None] + column[None, :]
    tl.store(place, dx.to(dlogits_ptr.dtype.element_ty), there[:, None])


@kernel
def linear_cross_entropy_dx_kernel(
    dlogits_ptr,  # (rows that count, units * UNIT): columns `begin` and so on of the logits
    weight_ptr,  # (V, WIDTH), rows W_STRIDE elements apart
    index_ptr,  # (rows + 1) int32
    dx_sum_ptr,  # (rows that count, WIDTH) float32: of the columns before `begin`, then with these
    rows: tl.int32,
    begin: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    V: tl.constexpr,
    WIDTH: tl.constexpr,
    W_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    ACROSS: tl.constexpr = (WIDTH + BN - 1) // BN
    program = tl.program_id(0)
    down, tile = tl.swizzle2d(program // ACROSS, program % ACROSS, tl.num_programs(0) // ACROSS, ACROSS, BAND)
    count = tl.load(index_ptr + rows)
    first = down * BM
    if first >= count:
        return
    columns = tl.minimum(units * UNIT, V - begin)
    left = tl.make_tensor_descriptor(dlogits_ptr, [count, columns], [units * UNIT, 1], [BM, BK])
    w = tl.make_tensor_descriptor(weight_ptr, [V, WIDTH], [W_STRIDE, 1], [BK, BN])
    sums = rows_matrix(dx_sum_ptr, count, WIDTH, BM, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if begin > 0:
        acc = sums.load([first, tile * BN])
    for k in range(0, columns, BK):
        acc = tl.dot(left.load([first, k]), w.load([begin + k, tile * BN]), acc, input_precision=PRECISION)
    sums.store([first, tile * BN], acc)


@kernel
def scatter_rows_kernel(
    dx_sum_ptr,  # (rows that count, WIDTH) float32
    index_ptr,  # (rows + 1) int32
    scales_ptr,  # (3) float32
    dx_ptr,  # (rows, C)
    rows: tl.int64,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    counts = slot < tl.load(index_ptr + rows)
    row = tl.load(index_ptr + slot, counts, 0).to(tl.int64)
    inside = counts[:, None] & (column < C)[None, :]
    dx = tl.load((dx_sum_ptr + slot * WIDTH)[:, None] + column[None, :], inside, 0.0) * tl.load(scales_ptr + 1)
    tl.store((dx_ptr + row * C)[:, None] + column[None, :], dx.to(dx_ptr.dtype.element_ty), inside)


@kernel
def linear_cross_entropy_dweight_kernel(
    dlogits_ptr,  # (rows that count, units * UNIT): columns `begin` and so on of the logits
    x_ptr,  # (rows, WIDTH): those that count
    index_ptr,  # (rows + 1) int32
    scales_ptr,  # (3) float32
    dweight_ptr,  # (V, C)
    rows: tl.int32,
    begin: tl.int32,
    units: tl.int32,
    UNIT: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    ACROSS: tl.constexpr = (C + BN - 1) // BN
    program = tl.program_id(0)
    down, tile = tl.swizzle2d(program // ACROSS, program % ACROSS, tl.num_programs(0) // ACROSS, ACROSS, BAND)
    count = tl.load(index_ptr + rows)
    left = tl.make_tensor_descriptor(dlogits_ptr, [count, units * UNIT], [units * UNIT, 1], [BK, BM])
    x = rows_matrix(x_ptr, count, WIDTH, BK, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, count, BK):
        acc = tl.dot(left.load([k, down * BM]).T, x.load([k, tile * BN]), acc, input_precision=PRECISION)
    word = begin + down * BM + tl.arange(0, BM)
    column = tile * BN + tl.arange(0, BN)
    place = dweight_ptr + (word.to(tl.int64) * C)[:, None] + column[None, :]
    inside = (word < V)[:, None] & (column < C)[None, :]
    tl.store(place, (acc * tl.load(scales_ptr + 1)).to(dweight_ptr.dtype.element_ty), inside)


class _Products:
    """The operands as the kernels want them: the rows of x that count, in whole vectors, and the weight."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> None:
        self.rows, self.width = x.shape
        self.vocabulary, self.dtype = weight.shape[0], x.dtype
        self.targets, self.ignore_index = targets, ignore_index
        self.x = x if x.stride(1) == 1 else x.contiguous()
        vector = 16 // x.element_size()
        whole = weight.stride(1) == 1 and weight.stride(0) >= self.width and not weight.stride(0) % vector
        starts_aligned = weight.is_meta or weight.data_ptr() % 16 == 0
        self.weight = weight if whole and starts_aligned and not self.width % vector else aligned(weight)
        self.index = targets.new_empty((self.rows + 1,), dtype=torch.int32)
        self.shape = {"V": self.vocabulary, "WIDTH": self.weight.shape[1]}
        self.strided = {**self.shape, "W_STRIDE": self.weight.stride(0)}

    def list_rows(self, *gradient: torch.Tensor, **options: Any) -> None:
        dloss, lse, scales = gradient or (None, None, None)
        list_rows_kernel[(1,)](
            self.targets, self.index, dloss, lse, scales, self.rows, self.targets.stride(0),
            ignore_index=self.ignore_index, **options, ROWS=TOGETHER, num_warps=8,
        )  # fmt: skip

    def copy_rows(self) -> tuple[tuple[int, int], dict[str, int]]:
        """How `gather_rows_kernel` and its inverse share out the matrix."""
        width = self.weight.shape[1]
        columns = min(triton.next_power_of_2(width), 1024)
        together = (65536 if INTERPRETED else 4096) // columns
        tiles = {"C": self.width, "WIDTH": width, "ROWS": together, "COLUMNS": columns, "num_warps": 8}
        return (triton.cdiv(self.rows, together), triton.cdiv(width, columns)), tiles

    def gather(self) -> torch.Tensor:
        gathered = self.x.new_empty((self.rows, self.weight.shape[1]))
        unit = 16 if self.x.stride(0) % 16 == 0 else 1
        grid, tiles = self.copy_rows()
        gather_rows_kernel[grid](self.x, self.index, gathered, self.rows, self.x.stride(0) // unit, UNIT=unit, **tiles)
        return gathered

    def run(self, product: str, launch: Callable[[Config], None]) -> None:
        config = CONFIGS[product][2 if INTERPRETED else int(self.dtype != torch.float32)]
        key = (self.width, self.vocabulary, self.dtype)
        launch(tuning.choose(f"linear_cross_entropy_{product}_kernel", key, (config,), launch))


def linear_cross_entropy_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    a = _Products(x, weight, targets, ignore_index)
    a.list_rows(dloss_stride=0, steepest=0.0, twice_z_loss=0.0, MEAN=False)
    gathered = a.gather()
    parts = triton.cdiv(a.vocabulary, RANGE)
    target_z = x.new_empty((a.rows,), dtype=torch.float32)
    part_lse = x.new_empty((parts, a.rows), dtype=torch.float64)
    part_sum = target_z.new_empty((parts, a.rows)) if label_smoothing > 0 else None

    def launch(config: Config) -> None:
        linear_cross_entropy_fwd_kernel[(triton.cdiv(a.rows, config.tiles["BM"]) * parts,)](
            gathered, a.weight, a.index, targets, target_z, part_lse, part_sum, a.rows, targets.stride(0),
            **squash_options(softcap, logit_scale), **a.strided, RANGE=RANGE, **config.meta(),
        )  # fmt: skip

    a.run("fwd", launch)
    return merge_parts(
        part_lse, part_sum, target_z, targets, a.vocabulary, z_loss, label_smoothing, ignore_index, reduction
    )


def linear_cross_entropy_bwd(
    dloss: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    need_dx: bool,
    need_dweight: bool,
    softcap: float,
    logit_scale: float,
    z_loss: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, width = x.shape
    vocabulary = weight.shape[0]
    dx = x.new_zeros(x.shape if need_dx else (0,))  # what ignored rows get
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    if rows == 0:
        return dx, dweight.zero_()
    a = _Products(x, weight, targets, ignore_index)
    lse, scales = lse.contiguous(), dloss.new_empty((3,))
    rates = {"dloss_stride": dloss.stride(0) if reduction == "none" else 0, "twice_z_loss": 2 * z_loss}
    a.list_rows(dloss, lse, scales, **rates, steepest=abs(logit_scale), MEAN=reduction == "mean")
    gathered = a.gather()
    held = max(HELD // x.element_size() // rows // LEAST, 1) * LEAST
    units = min(held, triton.cdiv(vocabulary, UNIT) * UNIT) // UNIT
    held = units * UNIT
    dlogits = x.new_empty((rows, held))
    dx_sum = x.new_empty((rows if need_dx else 0, gathered.shape[1]), dtype=torch.float32)
    q = label_smoothing / vocabulary
    for begin in range(0, vocabulary, held):
        columns = min(held, vocabulary - begin)
        piece = {"begin": begin, "units": units, "UNIT": UNIT}

        def grid(config: Config, high: int, wide: int) -> tuple[int]:
            return (triton.cdiv(high, config.tiles["BM"]) * triton.cdiv(wide, config.tiles["BN"]),)

        def launch_dlogits(config: Config, columns: int = columns, piece: dict[str, int] = piece) -> None:
            linear_cross_entropy_dlogits_kernel[grid(config, rows, columns)](
                gathered, a.weight, a.index, targets, dloss, lse, scales, dlogits, rows, targets.stride(0),
                **rates, **piece, **squash_options(softcap, logit_scale), q=q, q_target=q + (1 - label_smoothing),
                **a.strided, **config.meta(),
            )  # fmt: skip

        def launch_dx(config: Config, piece: dict[str, int] = piece) -> None:
            linear_cross_entropy_dx_kernel[grid(config, rows, dx_sum.shape[1])](
                dlogits, a.weight, a.index, dx_sum, rows, **piece, **a.strided, **config.meta()
            )

        def launch_dweight(config: Config, columns: int = columns, piece: dict[str, int] = piece) -> None:
            linear_cross_entropy_dweight_kernel[grid(config, columns, width)](
                dlogits, gathered, a.index, scales, dweight, rows, **piece, C=width, **a.shape, **config.meta()
            )

        a.run("dlogits", launch_dlogits)
        if need_dx:
            a.run("dx", launch_dx)
        if need_dweight:
            a.run("dweight", launch_dweight)
    if need_dx:
        over, tiles = a.copy_rows()
        scatter_rows_kernel[over](dx_sum, a.index, scales, dx, rows, **tiles)
    return dx, dweight


def example_calls(dtype: torch.dtype) -> None:
    """The launchers at real sizes, for the ahead-of-time check: Grok-1's head, and odd widths with the options that
    take most registers."""
    for width, vocabulary, options in (
        (6144, 131072, (30.0, 0.58, 1e-4, 0.0)),
        (6143, 50257, (0.0, 1.0, 0.0, 0.1)),
    ):
        x, weight = (torch.empty(size, width, dtype=dtype, device="meta") for size in (8192, vocabulary))
        targets = torch.empty(8192, dtype=torch.int64, device="meta")
        rest: tuple[Any, ...] = (*options, -100, "mean")
        loss, lse = linear_cross_entropy_fwd(x, weight, targets, *rest)
        linear_cross_entropy_bwd(loss, x, weight, targets, lse, True, True, *rest)
