"""Operands of matrix products, and where the tiles of groups of rows lie: for every kernel that multiplies matrices.

Matrices are read with tensor descriptors: the copy engine of sm_90 and newer, pointers and bounds on other GPUs, in one
text. So that these read 16-byte vectors everywhere, one that is not of whole vectors is filled up with zeros before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from grokkernels.triton import INTERPRETED, release
from grokkernels.triton.tuning import Config

# Rows of tiles that go over the columns together, so that programs at work share operands in the L2 cache.
BAND = tl.constexpr(8)


@triton.jit
def in_bands(program, high, ACROSS: tl.constexpr):
    """Program number -> (row, column) of `high` x ACROSS tiles: bands of BAND rows, column by column in a band."""
    band = program // (BAND * ACROSS) * BAND
    in_band = tl.minimum(high - band, BAND)
    rest = program - band * ACROSS
    return band + rest % in_band, rest // in_band


@triton.jit
def find_tile(offsets_ptr, tile, rows, GROUPS: tl.constexpr, BM: tl.constexpr):
    """Row tile number `tile` of groups that end before rows offsets[e]: its group, its first row, the group's end.

    Rows past the last group are group GROUPS; where the group is higher there is no such tile. Whatever offsets hold, a
    tile begins inside the rows there are.
    """
    SLOTS: tl.constexpr = triton.next_power_of_2(GROUPS + 1)
    group = tl.arange(0, SLOTS)
    begin = tl.load(offsets_ptr + group - 1, (group > 0) & (group <= GROUPS), 0)
    end = tl.load(offsets_ptr + group, group < GROUPS, rows)
    begin = tl.minimum(tl.maximum(begin, 0), rows)
    end = tl.minimum(tl.maximum(end, 0), rows)
    tiles = tl.maximum(end - begin + (BM - 1), 0) // BM
    upto = tl.cumsum(tiles, 0)
    found = tl.sum(((upto <= tile) & (group <= GROUPS)).to(tl.int32), 0)
    first = tl.sum(tl.where(group == found, begin - (upto - tiles) * BM, 0), 0) + tile * BM
    return found, first, tl.sum(tl.where(group == found, end, 0), 0)


@triton.jit
def rows_of_group(offsets_ptr, group, rows):
    """First row and end of a group, inside the rows there are."""
    begin = tl.minimum(tl.maximum(tl.load(offsets_ptr + group - 1, group > 0, 0), 0), rows)
    return begin, tl.maximum(tl.minimum(tl.load(offsets_ptr + group), rows), begin)


@triton.jit
def token_of(pair_ptr, row, end, TOP_K: tl.constexpr):
    """The tokens of rows in expert order, int64, from the pair of each; some token for rows from `end` on."""
    return tl.maximum(tl.load(pair_ptr + row, row < end, 0), 0).to(tl.int64) // TOP_K


@triton.jit
def gathered_tile(x_ptr, token, depth, DEPTH: tl.constexpr, BK: tl.constexpr):
    """x[token, depth : depth + BK], zero from DEPTH on."""
    at = depth + tl.arange(0, BK)
    place = x_ptr + token[:, None] * DEPTH + at[None, :]
    return tl.load(place) if DEPTH % BK == 0 else tl.load(place, (at < DEPTH)[None, :], 0.0)


@triton.jit
def rows_matrix(x_ptr, rows, COLS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr):
    """x (rows, COLS), contiguous, to load tiles HIGH x WIDE of; zero outside."""
    return tl.make_tensor_descriptor(x_ptr, [rows, COLS], [COLS, 1], [HIGH, WIDE])


@triton.jit
def right_matrix(
    w_ptr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH_STRIDE: tl.constexpr,
    COL_STRIDE: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    """w (DEPTH, COLS), one of its strides 1, for `right_tile`."""
    if COL_STRIDE == 1:
        return tl.make_tensor_descriptor(w_ptr, [DEPTH, COLS], [DEPTH_STRIDE, 1], [BK, BN])
    else:
        return tl.make_tensor_descriptor(w_ptr, [COLS, DEPTH], [COL_STRIDE, 1], [BN, BK])


@triton.jit
def right_tile(w, depth, column, COL_STRIDE: tl.constexpr):
    """w[depth : depth + BK, column : column + BN], zero outside."""
    if COL_STRIDE == 1:
        return w.load([depth, column])
    else:
        return w.load([column, depth]).T


def configs(dtype: torch.dtype, cols: int, depth: int, rows: int = 64) -> tuple[Config, ...]:
    """Tiles BM x BN of a product, the sum taken BK at a time: the same for all sizes on a GPU."""
    if INTERPRETED:
        return (interpreted(cols, depth, rows),)
    if dtype == torch.float32:  # three tf32 products: the parts of the operands take registers
        return (Config({"BM": 128, "BN": 64, "BK": 32}, num_warps=8, num_stages=3),)
    square = Config({"BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3)
    if cols % 8 and release(triton.__version__) < (3, 8):  # rows that are not whole vectors: a wide tile would spill
        return (square,)
    return square, Config({"BM": 128, "BN": 256, "BK": 32}, num_warps=8, num_stages=3)


def interpreted(cols: int, depth: int, rows: int = 64) -> Config:
    """Few tiles, as programs are slow in the interpreter, but small ones for small matrices."""
    sizes = {"BM": rows, "BN": cols, "BK": depth}
    return Config({name: min(max(triton.next_power_of_2(size), 16), 256) for name, size in sizes.items()})


def row_tiles(rows: int, groups: int, tile: int) -> int:
    """The most tiles that `groups` groups of `rows` rows in all, and those past the last one, can have."""
    if rows > 2**31 - tile:
        raise ValueError(f"there must be fewer than 2^31 rows, got {rows}")
    return min(triton.cdiv(rows, tile) + groups, rows)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x (..., K) or (E, K, N), contiguous, its matrix dimensions filled up with zeros to multiples of 16 bytes."""
    vector = 16 // x.element_size()
    lacking = [(0, -size % vector) for size in (x.shape[-1], *x.shape[1:-1])]
    x = torch.nn.functional.pad(x, sum(lacking, ())) if any(add for _, add in lacking) else x.contiguous()
    return x if _starts_aligned(x) else x.clone()


def aligned_stack(w: torch.Tensor) -> torch.Tensor:
    """w (E, K, N), dense along K or N, filled up likewise: w itself, however its matrices lie, where nothing lacks."""
    vector = 16 // w.element_size()
    for dim, other in ((2, 1), (1, 2)):
        steps = (w.shape[1], w.shape[2], w.stride(0), w.stride(other))
        if w.stride(dim) == 1 and w.stride(other) >= w.shape[dim] and not any(step % vector for step in steps):
            return w if _starts_aligned(w) else aligned(w)
    return aligned(w.mT).mT if w.stride(1) == 1 else aligned(w)


def stacks_alike(w: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as `aligned_stack` gives them, with the same strides."""
    w, other = aligned_stack(w), aligned_stack(other)
    return (w, other) if w.stride() == other.stride() else (aligned(w), aligned(other))


def _starts_aligned(x: torch.Tensor) -> bool:
    return x.is_meta or x.data_ptr() % 16 == 0
